"""Evaluation during UM3's training: the numbers of `make eval`, and losses that do not change."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.run import main as evaluate
from tests.train.conftest import arguments, losses, train_apart, train_here
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.metrics import read_metrics

EVAL = """
eval:
  num_threads: 2
  images: [{name: scenes, kind: scenes, length: 200}]
  language: {num_items: 2, num_documents: 2, max_tokens: 28}
  captions: {num_images: 6, max_new_tokens: 4}
  generation: {num_images: 4, per_skill: 2}
"""
PARTS = ("language", "captions", "generation")


def options(folder, *overrides, config=EVAL):
    (folder / "eval.yaml").write_text(config)
    every_two = ["evaluate.every_steps=2", f"evaluate.parts=[{', '.join(PARTS)}]"]
    return [f"evaluate.config={folder}/eval.yaml", *every_two, *overrides]


def measured(folder):
    """The evaluation's metrics of every step."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows]


@pytest.mark.slow
def test_it_gives_the_numbers_of_make_eval_and_changes_nothing(made, tmp_path):
    assert train_here("um3", made, tmp_path / "um3", *options(tmp_path)) == losses(made / "um3")
    steps = measured(tmp_path / "um3")
    assert [bool(step) for step in steps] == [False, True, False, True] and steps[1] != steps[3]
    assert {"eval/um3_prose/bits_per_byte", "eval/scenes_captions/cider", "eval/skills/mean"} <= steps[3].keys()
    parts = f"parts=[{', '.join(PARTS)}]"
    evaluate(["--config", f"{tmp_path}/eval.yaml", f"run={tmp_path}", parts, "num_threads=1"])
    for part in PARTS:
        for score in read_json(tmp_path / f"eval/{part}.json")["scores"]:
            if score["value"] is not None:
                assert steps[3][f"eval/{score['task']}/{score['metric']}"] == score["value"]
    assert torch.get_num_threads() == 1  # not the two of the config: later steps would change in their last digits
    kept = {path.name for path in (tmp_path / "um3/eval/step-00000004").iterdir()}
    assert "captions.json" in kept and "model" not in kept


def test_captions_are_measured_while_training(made, tmp_path):
    loggers = ["evaluate.parts=[captions]", "loop.loggers=[tensorboard]"]
    train_here("um3", made, tmp_path / "um3", *options(tmp_path, *loggers))
    images = EventAccumulator(str(tmp_path / "um3/tensorboard")).Reload().Images("eval/captions/scenes")
    assert [image.step for image in images] == [2, 4]
    assert ["eval/scenes_captions/cider" in step for step in measured(tmp_path / "um3")] == [False, True, False, True]


@pytest.mark.slow
def test_the_other_ranks_wait(made, tmp_path):
    overrides = options(tmp_path, "engine.zero_stage=3", "evaluate.parts=[captions]")
    train_apart(arguments("um3", made, f"loop.output_dir={tmp_path}/um3", *overrides), processes=2)
    assert [len(step) > 3 for step in measured(tmp_path / "um3")] == [False, True, False, True]


@pytest.mark.slow
def test_a_failed_evaluation_does_not_stop_the_run(made, tmp_path, capsys):
    config = EVAL + "  fid_features: inception-2015\n  inception_weights: nowhere.pth\n"
    train_here("um3", made, tmp_path / "um3", *options(tmp_path, "evaluate.parts=[generation]", config=config))
    messages = [line for line in capsys.readouterr().err.splitlines() if "nowhere.pth" in line]
    assert len(messages) == 2 and "step 2" in messages[0]
    assert measured(tmp_path / "um3") == [{}] * 4 and (tmp_path / "um3/model").is_dir()


def test_mistakes_are_found_before_the_first_step(made, tmp_path):
    for overrides, message in (
        (["evaluate.config=none.yaml"], r"none\.yaml"),
        (["evaluate.every_steps=15", "loop.log_every_steps=10"], r"evaluate\.every_steps=15"),
    ):
        with pytest.raises(UserError, match=message):
            train_here("um3", made, tmp_path / "um3", *options(tmp_path, *overrides))
    with pytest.raises(UserError, match="images"):
        train_here("um3", made, tmp_path / "um3", *options(tmp_path, config="eval:\n  captions: {num_images: 2}\n"))
