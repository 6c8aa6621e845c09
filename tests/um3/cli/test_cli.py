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
from um3.model.language_model import count_parameters


def run(*arguments: str | Path, stdin: str | bytes = "") -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Holiday photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_generate_writes_pictures_sheet_and_samples(model_folder: Path, pipeline: UM3Pipeline, tmp_path: Path) -> None:
    options = ["--model", str(model_folder), "--device", "cpu", "-n", "2", "--seed", "5", "--guidance-scale", "4,1"]
    run("generate", "a red square", "a Disk!", "--out", tmp_path, *options)
    rows = rows_of((tmp_path / "samples.jsonl").read_text())
    names = ["0000-a-red-square.png", "0001-a-red-square.png", "0002-a-disk.png", "0003-a-disk.png"]
    assert [row["file"] for row in rows] == names
    expected = pipeline.generate(
        ["a red square", "a Disk!"], num_images=2, seed=5, temperature=0.5, top_p=0.9, guidance_scale=[4.0, 1.0]
    )
    for index, row in enumerate(rows):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), expected.images[index])
        assert row["codes"] == expected.codes[index].tolist() and row["seed"] == expected.seeds[index]
        written = read_metadata(tmp_path / row["file"])
        assert row == {"file": row["file"], **written, "tokenizer": pipeline.qlip.fingerprint()}
        assert (written["temperature"], written["top_p"], written["guidance_scale"]) == (0.5, 0.9, [4.0, 1.0])
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 512


def test_one_picture_is_drawn_again_from_its_seed(model_folder: Path, tmp_path: Path) -> None:
    model = ["--model", model_folder]
    first = rows_of(run("generate", "a disk", "-n", "3", "--out", tmp_path / "first", "--json", *model))
    seed = str(first[2]["seed"])
    again = rows_of(run("generate", "a disk", "-n", "1", "--image-seed", seed, "--out", tmp_path, "--json", *model))
    assert again[0]["codes"] == first[2]["codes"] and Path(again[0]["file"]).is_file()


def test_the_folder_of_a_model_may_say_how_to_sample(model_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "sampling.json").write_text('{"temperature": 0.25, "guidance_scale": 1}')
    (row,) = rows_of(run("generate", "a", "-n", "1", "--top-k", "5", "--out", tmp_path, "--json", "--model", model))
    used = (row["temperature"], row["guidance_scale"], row["top_p"], row["top_k"])
    assert used == (0.25, 1, 0.9, 5)
    assert "temperature 0.25" in run("info", model)
    (model / "sampling.json").write_text('{"warmth": 1}')
    with pytest.raises(UserError, match=r"sampling\.json: 'warmth' is no setting"):
        run("generate", "a", "--model", model)


def test_prompts_come_from_a_file_or_from_stdin(model_folder: Path, tmp_path: Path) -> None:
    lines = "a red disk\r\n\nثلاث نجوم 🦊\n"
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    options = ["-n", "1", "--json", "--out", tmp_path, "--model", model_folder]
    found = [
        rows_of(run("generate", *options, "--file", file)),
        rows_of(run("generate", *options, stdin=lines)),
        rows_of(run("generate", "-", *options, stdin=lines)),
    ]
    assert [row["prompt"] for row in found[0]] == ["a red disk", "ثلاث نجوم 🦊"]
    assert found[0] == found[1] == found[2]


def test_caption_prints_a_line_per_picture(model_folder: Path, pipeline: UM3Pipeline, picture: Path) -> None:
    arguments = ["caption", picture, picture, "--model", model_folder, "--max-new-tokens", "6"]
    found = pipeline.caption([Image.open(picture)], max_new_tokens=6)
    assert run(*arguments).strip().splitlines() == [f"{picture}: {found[0]}".strip()] * 2
    row = rows_of(run(*arguments, "--json"))[0]
    assert row["file"] == str(picture) and row["caption"] == found[0]
    assert row["logprob"] == pytest.approx(found.logprobs[0], abs=1e-4)


def test_reconstruct_shows_original_codes_and_result(model_folder: Path, picture: Path, tmp_path: Path) -> None:
    output = run("reconstruct", picture, "--model", model_folder, "--out", tmp_path / "out")
    assert output.strip() == str(tmp_path / "out" / "0000-holiday-photo.png")
    width, height = Image.open(output.strip()).size
    assert width > 3 * 256 and height > 256


def test_codes_go_through_a_pipe_and_come_back_as_the_reconstruction(
    model_folder: Path, pipeline: UM3Pipeline, picture: Path, tmp_path: Path
) -> None:
    lines = run("encode", picture, "--model", model_folder)
    expected = pipeline.reconstruct([Image.open(picture)])
    assert rows_of(lines)[0]["codes"] == expected.codes[0].tolist()
    assert lines == run("encode", "-", "--model", model_folder, stdin=picture.read_bytes()).replace(
        '"-"', f'"{picture}"'
    )
    output = run("decode", "-", "--out", tmp_path / "decoded", "--model", model_folder, stdin=lines)
    assert np.array_equal(np.asarray(Image.open(output.strip())), expected.images[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of stdin is no JSON"),
        ("", "stdin has no lines"),
        ("[1, 2]", "line 1 of stdin is no object with codes"),
        ('{"codes": [1, 2]}', "row 1 is no picture of 4 codes"),
        ('{"codes": [1, 2, 3, true]}', "row 1 is no picture of 4 codes"),
        ('{"codes": [1, 2, 3, -1]}', "row 1 holds a code outside 0 .. 2**28 - 1"),
        ('{"codes": [1, 2, 3, 4], "tokenizer": "other"}', "the codes of row 1 are those of tokenizer other"),
    ],
)
def test_codes_of_something_else_are_refused(line: str, message: str, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run("decode", "-", "--out", tmp_path, "--model", model_folder, stdin=line)
    assert message in str(caught.value)


def test_score_ranks_texts_and_drawings(
    model_folder: Path, pipeline: UM3Pipeline, picture: Path, tmp_path: Path
) -> None:
    found = rows_of(run("score", picture, "a red disk", "a blue square", "--json", "--model", model_folder))
    expected = pipeline.score([Image.open(picture)] * 2, ["a red disk", "a blue square"])
    assert [row["text_logprob"] for row in found] == pytest.approx(expected.text_logprobs, abs=1e-4)
    assert [row["image_logprob"] for row in found] == pytest.approx(expected.image_logprobs, abs=1e-4)
    run("generate", "a red disk", "-n", "2", "--out", tmp_path / "drawn", "--model", model_folder)
    table = run("score", "--pairs", tmp_path / "drawn" / "samples.jsonl", "--model", model_folder).splitlines()
    assert len(table) == 3 and table[1].endswith("0000-a-red-disk.png: a red disk")


def test_complete_prints_the_text_with_its_continuation(model_folder: Path, pipeline: UM3Pipeline) -> None:
    output = run("complete", "a red", "--model", model_folder, "--max-new-tokens", "4", "--seed", "2")
    expected = pipeline.complete(["a red"], max_new_tokens=4, seed=2)[0]
    assert output == "a red" + expected + "\n"
    (row,) = rows_of(
        run("complete", "--model", model_folder, "--max-new-tokens", "4", "--seed", "2", "--json", stdin="a red")
    )
    assert row["continuation"] == expected


def test_info_tells_sizes_fingerprint_steps_and_licences(
    model_folder: Path, pipeline: UM3Pipeline, tmp_path: Path
) -> None:
    output = run("info", model_folder)
    assert f"{sum(parameter.numel() for parameter in pipeline.model.parameters()):,}" in output
    assert "Qwen3ForCausalLM" in output and pipeline.qlip.fingerprint() in output
    assert "not recorded beside this folder" in output
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "done.json").write_text('{"steps": 2000, "commit": "abc"}')
    about = json.loads(run("info", tmp_path / "model", "--json"))
    counts = count_parameters(pipeline.model, ids=pipeline.ids)
    assert about["parameters"] == counts.total and about["body"] == counts.body
    assert about["visual rows"] == counts.visual_rows_in + counts.visual_rows_out
    assert about["its parameters"] == sum(parameter.numel() for parameter in pipeline.qlip.parameters())
    assert about["training steps"] == 2000 and about["commit"] == "abc"
    assert about["base"].startswith("none") and "no restriction" in about["licence of the visual tokenizer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a disk", "--model", "nowhere"], "no UM3 model in nowhere; run make demo or pass --model"),
        (["generate", " "], "prompt 1 is empty"),
        (["generate"], "no prompt in stdin; write one a line"),
        (["generate", "a", "--file", "b.txt"], "prompts both as arguments and by --file"),
        (["generate", "--file", "absent.txt"], "cannot read absent.txt (No such file or directory)"),
        (["generate", "--file", "broken.png"], "broken.png is no UTF-8 text"),
        (["generate", "a disk", "-n", "0"], "num images is 0"),
        (["generate", "a disk", "--temperature", "-1"], "temperature -1 is outside"),
        (["generate", "a disk", "--temperature", "nan"], "temperature nan is outside"),
        (["generate", "a disk", "--top-p", "0"], "top-p 0.0 is outside"),
        (["generate", "a disk", "--guidance-scale", "much"], "guidance scale 'much' is no number"),
        (["generate", "a disk", "--guidance-scale", "1e9"], "outside [0, 1000]"),
        (["generate", "a disk", "-n", "2", "--image-seed", "3"], "1 seeds for 2 results"),
        (["generate", "a disk", "-n", "2", "--out", "-"], "--out - writes one picture and nothing else"),
        (["generate", "a disk", "-n", "9999999"], "images in one call; at most"),
        (["generate", "red " * 10_000], "leaves no room for 16 more"),
        (["generate", "a disk", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["caption", "absent.png"], "absent.png: no such file"),
        (["caption", "broken.png"], "broken.png: not an image"),
        (["reconstruct", "good.png", "--out", "broken.png"], "cannot write to broken.png"),
        (["score", "good.png"], "no text in stdin"),
        (["score"], "give a picture and texts, or --pairs"),
        (["complete", "a", "--max-new-tokens", "0"], "max new tokens is 0"),
        (["info", "nowhere"], "no UM3 model in nowhere"),
        (["info", "empty"], "empty holds no UM3"),
        (["info", "half"], "a config.json in half lacks what a UM3's says ('text_vocab_size')"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture \xff")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "half" / "qlip").mkdir(parents=True)
    (tmp_path / "half" / "config.json").write_text('{"um3": {"subtokens": 1}}')
    (tmp_path / "half" / "qlip" / "config.json").write_text("{}")
    (tmp_path / "half" / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    if "--model" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--model", str(model_folder)]
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", ["tokenizer.json", "qlip", "model.safetensors", "config.json"])
def test_a_model_without_one_of_its_parts_is_one_line(absent: str, model_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / absent).rename(tmp_path / "taken away")
    with pytest.raises(UserError) as caught:
        run("complete", "a", "--model", model)
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)


def test_the_console_script_leaves_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["um3", "info", "nowhere"])
    with pytest.raises(SystemExit) as leaving:
        cli.entry_point()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: no UM3 model in nowhere")


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--help"], ["info", "MODEL"], ["caption", "absent.png"], ["serve", "--host", "203.0.113.9"]],
)
def test_what_needs_no_model_is_answered_without_torch(arguments: list[str], model_folder: Path) -> None:
    words = [str(model_folder) if each == "MODEL" else each for each in arguments]
    script = "import sys; from um3.cli import app\ntry: app(sys.argv[1:], standalone_mode=False)\n"
    script += "finally: print('torch' in sys.modules or 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert found.stdout.strip().endswith("False")
    if "--help" in arguments:
        assert "--guidance-scale 3 --seed 7" in found.stdout


def test_the_first_word_comes_before_the_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "um3.inference.pipeline", None)  # importing it fails
    result = CliRunner().invoke(cli.app, ["complete", "a", "--model", str(model_folder)])
    assert isinstance(result.exception, ImportError) and result.stderr == f"loading {model_folder}\n"


def test_pictures_go_from_command_to_command(model_folder: Path, pipeline: UM3Pipeline) -> None:
    arguments = ["generate", "a red disk", "-n", "1", "--out", "-", "--seed", "4", "--model", str(model_folder)]
    drawn = CliRunner().invoke(cli.app, arguments)
    expected = pipeline.generate(["a red disk"], seed=4, temperature=0.5, top_p=0.9, guidance_scale=2)
    picture = Image.open(io.BytesIO(drawn.stdout_bytes))
    assert np.array_equal(np.asarray(picture), expected.images[0])
    assert "draw 16/16 " in drawn.stderr and "pictures 1 to 1 of 1" in drawn.stderr
    (row,) = rows_of(run("caption", "-", "--json", "--model", model_folder, stdin=drawn.stdout_bytes))
    assert row["file"] == "-" and row["caption"] == pipeline.caption([picture])[0]


def test_a_reader_may_leave(model_folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from um3.cli import entry_point; entry_point()", "info", str(model_folder)]
    left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert left.stderr == ""
