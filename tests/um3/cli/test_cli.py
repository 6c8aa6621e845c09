"""The um3 command on a tiny saved model, and its one-line errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from um3 import cli
from um3.core.errors import UserError
from um3.inference.image_io import read_metadata
from um3.inference.pipeline import UM3Pipeline


def run(*arguments: str | Path, stdin: str | bytes = "") -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def model(model_folder: Path) -> list[str]:
    """The option that names the tiny model."""
    return ["--model", str(model_folder)]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "Holiday photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_generate_writes_images_sheet_and_samples(model: list[str], pipeline: UM3Pipeline, tmp_path: Path) -> None:
    options = [*model, "--device", "cpu", "-n", "2", "--seed", "5", "--guidance-scale", "4,1"]
    run("generate", "a red square", "a Disk!", "--out", tmp_path, *options)
    rows = rows_of((tmp_path / "samples.jsonl").read_text())
    names = ["0000-a-red-square.png", "0001-a-red-square.png", "0002-a-disk.png", "0003-a-disk.png"]
    assert [row["file"] for row in rows] == names
    sampling: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "guidance_scale": [4.0, 1.0]}
    expected = pipeline.generate(["a red square", "a Disk!"], num_images=2, seed=5, **sampling)
    for index, row in enumerate(rows):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), expected.images[index])
        assert row["codes"] == expected.codes[index].tolist() and row["seed"] == expected.seeds[index]
        metadata = read_metadata(tmp_path / row["file"])
        assert row == {"file": row["file"], **metadata, "tokenizer": pipeline.qlip.fingerprint()}
        assert sampling.items() <= metadata.items()
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 512


def test_one_image_is_generated_again_from_its_seed(model: list[str], tmp_path: Path) -> None:
    first = rows_of(run("generate", "a disk", "-n", "3", "--out", tmp_path / "first", "--json", *model))
    seed = str(first[2]["seed"])
    again = rows_of(run("generate", "a disk", "-n", "1", "--image-seed", seed, "--out", tmp_path, "--json", *model))
    assert again[0]["codes"] == first[2]["codes"] and Path(again[0]["file"]).is_file()


def test_the_model_folder_sets_the_defaults_of_sampling(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"image_sampling": {"temperature": 0.25, "guidance_scale": 1}}))
    (row,) = rows_of(run("generate", "a", "-n", "1", "--top-k", "5", "--out", tmp_path, "--json", "--model", folder))
    assert (row["temperature"], row["guidance_scale"], row["top_p"], row["top_k"]) == (0.25, 1, 0.9, 5)
    assert "temperature 0.25" in run("info", folder)
    path.write_text(json.dumps(values | {"image_sampling": {"warmth": 1}}))
    with pytest.raises(UserError, match=r"generation_config\.json.*'warmth'"):
        run("generate", "a", "--model", folder)


def test_prompts_come_from_a_file_or_from_stdin(model: list[str], tmp_path: Path) -> None:
    lines = "a red disk\r\n\nثلاث نجوم 🦊\n"
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    options = ["-n", "1", "--json", "--out", str(tmp_path), *model]
    outputs = [
        run("generate", *options, "--file", file),
        run("generate", *options, stdin=lines),
        run("generate", "-", *options, stdin=lines),
    ]
    assert [row["prompt"] for row in rows_of(outputs[0])] == ["a red disk", "ثلاث نجوم 🦊"]
    assert outputs[0] == outputs[1] == outputs[2]


def test_caption_prints_a_line_per_image(model: list[str], pipeline: UM3Pipeline, photo: Path) -> None:
    arguments = ["caption", photo, photo, *model, "--max-new-tokens", "6"]
    captions = pipeline.caption([Image.open(photo)], max_new_tokens=6)
    assert run(*arguments).strip().splitlines() == [f"{photo}: {captions[0]}".strip()] * 2
    row = rows_of(run(*arguments, "--json"))[0]
    assert row["file"] == str(photo) and row["caption"] == captions[0]
    assert row["logprob"] == pytest.approx(captions.logprobs[0], abs=1e-4)


def test_reconstruct_shows_original_codes_and_reconstruction(model: list[str], photo: Path, tmp_path: Path) -> None:
    output = run("reconstruct", photo, *model, "--out", tmp_path / "out")
    assert output.strip() == str(tmp_path / "out" / "0000-holiday-photo.png")
    width, height = Image.open(output.strip()).size
    assert width > 3 * 256 and height > 256


def test_decode_turns_the_lines_of_encode_into_reconstructions(
    model: list[str], pipeline: UM3Pipeline, photo: Path, tmp_path: Path
) -> None:
    lines = run("encode", photo, *model)
    expected = pipeline.reconstruct([Image.open(photo)])
    assert rows_of(lines)[0]["codes"] == expected.codes[0].tolist()
    assert lines == run("encode", "-", *model, stdin=photo.read_bytes()).replace('"-"', f'"{photo}"')
    output = run("decode", "-", "--out", tmp_path / "decoded", *model, stdin=lines)
    assert np.array_equal(np.asarray(Image.open(output.strip())), expected.images[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of stdin is not JSON"),
        ("", "stdin is empty"),
        ('{"codes": [1, 2]}', "row 1: .* 4 integers"),
        ('{"codes": [1, 2, 3, true]}', "row 1: .* 4 integers"),
        ('{"codes": [1, 2, 3, -1]}', r"row 1: .*2\*\*28"),
        ('{"codes": [1, 2, 3, 4], "tokenizer": "other"}', "row 1: .*tokenizer other"),
    ],
)
def test_decode_refuses_other_codes(line: str, message: str, model: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run("decode", "-", "--out", tmp_path, *model, stdin=line)


def test_score_prints_log_probabilities(model: list[str], pipeline: UM3Pipeline, photo: Path, tmp_path: Path) -> None:
    rows = rows_of(run("score", photo, "a red disk", "a blue square", "--json", *model))
    expected = pipeline.score([Image.open(photo)] * 2, ["a red disk", "a blue square"])
    assert [row["text_logprob"] for row in rows] == pytest.approx(expected.text_logprobs, abs=1e-4)
    assert [row["image_logprob"] for row in rows] == pytest.approx(expected.image_logprobs, abs=1e-4)
    run("generate", "a red disk", "-n", "2", "--out", tmp_path / "samples", *model)
    table = run("score", "--pairs", tmp_path / "samples" / "samples.jsonl", *model).splitlines()
    assert len(table) == 3 and table[1].endswith("0000-a-red-disk.png: a red disk")


def test_complete_prints_the_text_with_its_continuation(model: list[str], pipeline: UM3Pipeline) -> None:
    options = [*model, "--max-new-tokens", "4", "--seed", "2"]
    expected = pipeline.complete(["a red"], max_new_tokens=4, seed=2)[0]
    assert run("complete", "a red", *options) == "a red" + expected + "\n"
    assert rows_of(run("complete", "--json", *options, stdin="a red"))[0]["continuation"] == expected


def test_info_reports_sizes_fingerprint_steps_and_licences(
    model_folder: Path, pipeline: UM3Pipeline, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    assert "not recorded beside this folder" in run("info", tmp_path / "model")
    (tmp_path / "done.json").write_text('{"steps": 2000, "commit": "abc"}')
    facts = json.loads(run("info", tmp_path / "model", "--json"))
    sizes = {name: parameter.numel() for name, parameter in pipeline.model.named_parameters()}
    tables = pipeline.ids.vocab_size * 2 * pipeline.model.config.hidden_size
    assert facts["parameters"] == sum(sizes.values()) and facts["of the layers"] == sum(sizes.values()) - tables
    assert facts["of the text entries"] + facts["of the visual entries"] == tables
    assert facts["visual tokenizer parameters"] == sum(parameter.numel() for parameter in pipeline.qlip.parameters())
    assert facts["architecture"] == "Qwen3ForCausalLM" and facts["visual tokenizer"] == pipeline.qlip.fingerprint()
    assert facts["training steps"] == 2000 and facts["commit"] == "abc"
    assert facts["base model"].startswith("none") and "no restriction" in facts["visual tokenizer licence"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a disk", "--model", "nowhere"], "'nowhere' is neither a local folder nor"),
        (["generate", "a disk", "--model", "."], "--model"),
        (["generate", " "], "prompt 1 is empty"),
        (["generate"], "no prompt in stdin"),
        (["generate", "a", "--file", "b.txt"], "--file"),
        (["generate", "--file", "absent.txt"], "cannot read absent.txt"),
        (["generate", "--file", "broken.png"], "broken.png is not UTF-8"),
        (["generate", "a disk", "--guidance-scale", "much"], "guidance scale 'much'"),
        (["generate", "a disk", "-n", "2", "--out", "-"], "--out -"),
        (["generate", "a disk", "--device", "abacus"], "device 'abacus'"),
        (["caption", "absent.png"], "absent.png"),
        (["caption", "broken.png"], "broken.png: not an image"),
        (["reconstruct", "good.png", "--out", "broken.png"], "cannot write to broken.png"),
        (["score", "good.png"], "no text in stdin"),
        (["score"], "--pairs"),
        (["info", "nowhere"], "'nowhere'"),
        (["info", "empty"], "empty is not a UM3 model"),
        (["info", "half"], "half: a config.json lacks an entry ('text_vocab_size')"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image \xff")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "qlip").mkdir(parents=True)
    for path, text in {"empty": "{}", "half": '{"um3": {"subtokens": 1}}', "half/qlip": "{}"}.items():
        (tmp_path / path / "config.json").write_text(text)
    shutil.copy(model_folder / "model.safetensors", tmp_path / "half")
    if "--model" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--model", str(model_folder)]
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer.json", "qlip", "model.safetensors", "config.json"])
def test_an_incomplete_model_is_a_one_line_error(part: str, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / part).rename(tmp_path / "removed")
    with pytest.raises(UserError) as caught:
        run("complete", "a", "--model", tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


def test_the_console_script_exits_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in ((["info", "nowhere"], "'nowhere'"), (["generate", "--bogus"], "um3 generate --help")):
        monkeypatch.setattr(sys, "argv", ["um3", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.entry_point()
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--help"], ["info", "MODEL"], ["caption", "absent.png"], ["serve", "--host", "203.0.113.9"]],
)
def test_what_needs_no_model_is_answered_without_torch(arguments: list[str], model_folder: Path) -> None:
    script = "import sys; from um3.cli import app\ntry: app(sys.argv[1:], standalone_mode=False)\n"
    script += "finally: print('torch' in sys.modules or 'transformers' in sys.modules)"
    command = [sys.executable, "-c", script, *(word.replace("MODEL", str(model_folder)) for word in arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert output.strip().endswith("False")
    assert "--help" not in arguments or ("0 is greedy" in output and "--guidance-scale 3 --seed 7" in output)


def test_the_first_message_comes_before_the_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "um3.inference.pipeline", None)  # importing it fails
    result = CliRunner().invoke(cli.app, ["complete", "a", "--model", str(model_folder)])
    assert isinstance(result.exception, ImportError) and result.stderr == f"loading {model_folder}\n"


def test_images_go_from_command_to_command(model: list[str], pipeline: UM3Pipeline) -> None:
    arguments = ["generate", "a red disk", "-n", "1", "--out", "-", "--seed", "4", *model]
    result = CliRunner().invoke(cli.app, arguments)
    expected = pipeline.generate(["a red disk"], seed=4, temperature=0.5, top_p=0.9, guidance_scale=2)
    image = Image.open(io.BytesIO(result.stdout_bytes))
    assert np.array_equal(np.asarray(image), expected.images[0])
    assert "generate 16/16 " in result.stderr and "images 1 to 1 of 1" in result.stderr
    (row,) = rows_of(run("caption", "-", "--json", *model, stdin=result.stdout_bytes))
    assert row["file"] == "-" and row["caption"] == pipeline.caption([image])[0]


def test_a_closed_pipe_is_not_an_error(model_folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "um3", "info", str(model_folder)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.stderr == ""
