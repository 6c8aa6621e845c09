"""The um3 command on a tiny saved model, and its one-line errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from um3 import cli
from um3.core.errors import UserError
from um3.pipeline import UM3Pipeline


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Holiday photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_generate_writes_pictures_sheet_and_samples(model_folder: Path, pipeline: UM3Pipeline, tmp_path: Path) -> None:
    options = ["--model", str(model_folder), "--device", "cpu", "-n", "2", "--seed", "5", "--guidance-scale", "2"]
    run("generate", "a red square", "a Disk!", "--out", tmp_path, *options)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    names = ["0000-a-red-square.png", "0001-a-red-square.png", "0002-a-disk.png", "0003-a-disk.png"]
    assert [row["file"] for row in rows] == names
    expected = pipeline.generate(["a red square", "a Disk!"], num_images=2, seed=5, guidance_scale=2.0, top_p=0.95)
    for row, image, codes in zip(rows, expected.images, expected.codes.tolist(), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), image)
        assert row["codes"] == codes and row["seed"] == 5 and row["guidance_scale"] == 2
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 512


def test_caption_prints_a_line_per_picture(model_folder: Path, pipeline: UM3Pipeline, picture: Path) -> None:
    output = run("caption", picture, picture, "--model", model_folder, "--max-new-tokens", "6")
    (text,) = pipeline.caption([Image.open(picture)], max_new_tokens=6)
    assert output.strip().splitlines() == [f"{picture}: {text}".strip()] * 2


def test_reconstruct_shows_original_codes_and_result(model_folder: Path, picture: Path, tmp_path: Path) -> None:
    output = run("reconstruct", picture, "--model", model_folder, "--out", tmp_path / "out")
    assert output.strip() == str(tmp_path / "out" / "0000-holiday-photo.png")
    width, height = Image.open(output.strip()).size
    assert width > 3 * 256 and height > 256


def test_complete_prints_the_text_with_its_continuation(model_folder: Path, pipeline: UM3Pipeline) -> None:
    output = run("complete", "a red", "--model", model_folder, "--max-new-tokens", "4", "--seed", "2")
    assert output == "a red" + pipeline.complete(["a red"], max_new_tokens=4, seed=2)[0] + "\n"


def test_info_counts_the_parameters(model_folder: Path, pipeline: UM3Pipeline) -> None:
    output = run("info", model_folder)
    assert f"{sum(parameter.numel() for parameter in pipeline.model.parameters()):,}" in output
    assert "Qwen3ForCausalLM" in output and pipeline.qlip.fingerprint() in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a disk", "--model", "nowhere"], "no UM3 model in nowhere; run make demo or pass --model"),
        (["generate", " "], "prompt 1 is empty"),
        (["generate", "a disk", "-n", "0"], "num images is 0"),
        (["generate", "a disk", "--temperature", "-1"], "temperature -1.0 is negative"),
        (["generate", "a disk", "--top-p", "0"], "top-p 0.0 is outside"),
        (["generate", "red " * 100], "leaves no room for 16 more"),
        (["generate", "a disk", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["caption", "absent.png"], "absent.png: cannot be read"),
        (["caption", "broken.png"], "broken.png: not an image"),
        (["reconstruct", "broken.png", "--out", "broken.png"], "cannot write to broken.png"),
        (["complete", "a", "--max-new-tokens", "0"], "max new tokens is 0"),
        (["info", "nowhere"], "no UM3 model in nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_text("no picture")
    if "--model" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--model", str(model_folder)]
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_console_script_leaves_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["um3", "info", "nowhere"])
    with pytest.raises(SystemExit) as leaving:
        cli.entry_point()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: no UM3 model in nowhere")


def test_help_is_quick_and_has_examples() -> None:
    began = time.monotonic()
    script = (
        "import sys; from um3.cli import app; app(['generate', '--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "--guidance-scale 3 --seed 7" in output and output.strip().endswith("False")
    assert time.monotonic() - began < 5
