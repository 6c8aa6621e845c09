"""metrics.jsonl reads as one run without interruption, whatever happened to the process that wrote it."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from um3.core.metrics import MetricsWriter, Samples, read_metrics


def write(folder, *steps, resume_step=0):
    metrics = MetricsWriter(folder, resume_step=resume_step)
    for step in steps:
        metrics.log(step, {"train/loss": step / 10})
    metrics.close()


def steps_in(folder):
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_every_row_is_on_disk_at_once(tmp_path):
    assert steps_in(tmp_path / "stage1") == []
    metrics = MetricsWriter(tmp_path / "stage1")
    metrics.log(1, {"train/loss": 0.5, "data/samples": 3})
    assert read_metrics(metrics.path) == [{"step": 1, "train/loss": 0.5, "data/samples": 3}]
    metrics.close()


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    write(tmp_path, 1, 10, 20, 30)
    write(tmp_path, 30, 40, resume_step=20)
    assert steps_in(tmp_path) == [1, 10, 20, 30, 40]
    write(tmp_path, 1)
    assert steps_in(tmp_path) == [1]


def test_a_line_cut_by_a_kill_is_skipped_and_gone_after_a_resume(tmp_path, caplog):
    write(tmp_path, 10, 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level("WARNING"):
        assert steps_in(tmp_path) == [10]
    assert str(path) in caplog.text and "1 line" in caplog.text
    write(tmp_path, 20, resume_step=10)
    caplog.clear()
    assert steps_in(tmp_path) == [10, 20] and not caplog.text


@pytest.mark.parametrize("has", [0, 1, 3])
def test_rows_that_vanished_before_a_resume_are_told(has, tmp_path, caplog):
    write(tmp_path, 10, 20, 30)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:has]))
    if not has:
        path.unlink()
    with caplog.at_level("WARNING"):
        resumed = MetricsWriter(tmp_path, resume_step=30, num_rows=3)
    assert (f"{path} was cut or deleted: it has {has} of the 3 rows" in caplog.text) == (has < 3)
    resumed.log(40, {})
    assert resumed.num_rows == has + 1 == len(steps_in(tmp_path))


@pytest.mark.parametrize("line", [b'{"train/loss": 1}', b'{"step": "x"}', b"3", b"[]", b"\xff\0", b"[" * 99999])
def test_a_line_without_a_step_does_not_stop_a_resume(line, tmp_path):
    write(tmp_path, 10, 20)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    write(tmp_path, 30, resume_step=20)
    assert steps_in(tmp_path) == [10, 20, 30]


def test_a_non_finite_value_is_its_name_and_the_file_stays_json(tmp_path):
    metrics = MetricsWriter(tmp_path)
    metrics.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 0.0}
    write(tmp_path, 2, resume_step=1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == row


def test_tensorboard_shows_the_same_values_and_images_with_their_texts(tmp_path):
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    metrics = MetricsWriter(tmp_path, views=("tensorboard",))
    for step in (1, 2):
        metrics.log(step, {"train/loss": step / 2, "optim/grad_norm": math.nan})
    metrics.show(7, {"eval/captions/scenes": Samples(images, ["a red circle", "two <squares>"])})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]
    assert len(events.Scalars("optim/grad_norm")) == 2
    (image,) = events.Images("eval/captions/scenes")
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 7 and (shown[:8, :8] == images[0]).all()
    (text,) = events.Tensors("eval/captions/scenes/text_summary")
    assert b"a red circle" in text.tensor_proto.string_val[0] and b"two <squares>" in text.tensor_proto.string_val[0]
