"""The um3 command on a tiny saved model, and its one-line errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.processes import locked
from tests.tokenizer.conftest import change_json
from um3 import cli
from um3.cli.inputs import read_images, read_texts
from um3.core.errors import UserError
from um3.inference.image_io import read_metadata


def run(*arguments, stdin=""):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def rows_of(output):
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def model(model_folder):
    """The option that names the tiny model."""
    return ["--model", str(model_folder)]


def test_generate_writes_images_sheet_and_samples(model, pipeline, tmp_path):
    options = [*model, "--device", "cpu", "-n", "2", "--seed", "5", "--guidance-scale", "4,1"]
    run("generate", "a red square", "a Disk!", "--out", tmp_path, *options)
    rows = rows_of((tmp_path / "samples.jsonl").read_text())
    names = ["0000-a-red-square.png", "0001-a-red-square.png", "0002-a-disk.png", "0003-a-disk.png"]
    assert [row["file"] for row in rows] == names
    sampling = {"temperature": 0.5, "top_p": 0.9, "guidance_scale": [4.0, 1.0]}
    expected = pipeline.generate(["a red square", "a Disk!"], num_images=2, seed=5, **sampling)
    for index, row in enumerate(rows):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), expected.arrays[index])
        assert row["codes"] == expected.codes[index].tolist() and row["seed"] == expected.seeds[index]
        metadata = read_metadata(tmp_path / row["file"])
        assert row == {"file": row["file"], **metadata, "tokenizer": pipeline.qlip.fingerprint()}
        assert sampling.items() <= metadata.items()
    assert min(Image.open(tmp_path / "contact_sheet.png").size) > 512
    again = ["-n", "1", "--image-seed", rows[3]["seed"], "--guidance-scale", "4,1", "--out", tmp_path, "--json", *model]
    (row,) = rows_of(run("generate", "a Disk!", *again))
    assert row["codes"] == rows[3]["codes"] and Path(row["file"]).is_file()


def test_a_folder_keeps_the_samples_of_earlier_runs(model, tmp_path):
    run("generate", "a disk", "-n", "2", "--out", tmp_path, *model)
    earlier = {file.name: file.read_bytes() for file in tmp_path.glob("*.png")}
    (tmp_path / "0001-a-disk.png").unlink()  # its number stays taken: samples.jsonl names it
    run("generate", "a disk", "-n", "2", "--seed", "1", "--out", tmp_path, *model)
    rows = rows_of((tmp_path / "samples.jsonl").read_text())
    assert [row["file"] for row in rows] == [f"{number:04d}-a-disk.png" for number in range(4)]
    assert len({row["seed"] for row in rows}) == 4
    for row in (rows[0], rows[2], rows[3]):
        assert {"file": row["file"], **read_metadata(tmp_path / row["file"]), "tokenizer": row["tokenizer"]} == row
    assert {file.name for file in tmp_path.glob("c*.png")} == {"contact_sheet.png", "contact_sheet-0002.png"}
    assert all((tmp_path / name).read_bytes() == earlier[name] for name in ("0000-a-disk.png", "contact_sheet.png"))
    (tmp_path / "samples.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"line 1 of .*samples\.jsonl"):
        run("generate", "a disk", "--out", tmp_path, *model)


def test_the_model_folder_sets_the_defaults_of_sampling(folder, tmp_path):
    change_json(folder / "generation_config.json", image_sampling={"temperature": 0.25, "guidance_scale": 1})
    (row,) = rows_of(run("generate", "a", "-n", "1", "--top-k", "5", "--out", tmp_path, "--json", "--model", folder))
    assert (row["temperature"], row["guidance_scale"], row["top_p"], row["top_k"]) == (0.25, 1, 0.9, 5)
    assert "temperature 0.25" in run("info", folder)


def test_prompts_come_from_a_file_or_from_stdin(model, tmp_path, monkeypatch):
    lines = "a red disk\r\n\nثلاث نجوم 🦊\u2028\x85\x0cx\ry\n"
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    options = ["-n", "1", "--json", "--out", "samples", *model]
    outputs = []
    for number, (source, stdin) in enumerate(((["--file", file], ""), ([], lines), (["-"], lines))):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        outputs.append(run("generate", *source, *options, stdin=stdin))
    assert [row["prompt"] for row in rows_of(outputs[0])] == ["a red disk", "ثلاث نجوم 🦊\u2028\x85\x0cx", "y"]
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_type_of_the_weights_is_chosen(model, photo):
    captions = {dtype: run("caption", photo, *model, "--dtype", dtype) for dtype in ("auto", "float32", "bfloat16")}
    assert captions["auto"] == captions["float32"] and captions["bfloat16"].startswith(f"{photo}: ")
    rows = {dtype: rows_of(run("caption", photo, "--json", *model, "--dtype", dtype))[0] for dtype in captions}
    assert rows["auto"]["logprob"] == rows["float32"]["logprob"] != rows["bfloat16"]["logprob"]


def test_caption_prints_a_line_per_image(model, pipeline, photo):
    arguments = ["caption", photo, photo, *model, "--max-new-tokens", "6"]
    captions = pipeline.caption([Image.open(photo)], max_new_tokens=6)
    assert run(*arguments).strip().splitlines() == [f"{photo}: {captions[0]}".strip()] * 2
    row = rows_of(run(*arguments, "--json"))[0]
    assert row["file"] == str(photo) and row["caption"] == captions[0]
    assert row["logprob"] == pytest.approx(captions.logprobs[0], abs=1e-4)


def test_reconstruct_shows_original_codes_and_reconstruction(model, photo, tmp_path):
    output = run("reconstruct", photo, *model, "--out", tmp_path / "out")
    assert output.strip() == str(tmp_path / "out" / "0000-holiday-photo.png")
    width, height = Image.open(output.strip()).size
    assert width > 3 * 256 and height > 256


def test_decode_turns_the_lines_of_encode_into_reconstructions(model, pipeline, photo, tmp_path):
    lines = run("encode", photo, *model)
    expected = pipeline.reconstruct([Image.open(photo)])
    assert rows_of(lines)[0]["codes"] == expected.codes[0].tolist()
    assert lines == run("encode", "-", *model, stdin=photo.read_bytes()).replace('"-"', f'"{photo}"')
    lines = json.dumps(json.loads(lines) | {"file": "../../a\\/../b"})
    output = run("decode", "-", "--out", tmp_path / "decoded", *model, stdin=lines)
    assert Path(output.strip()) == tmp_path / "decoded" / "0000-b.png"
    assert np.array_equal(np.asarray(Image.open(output.strip())), expected.arrays[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of stdin is not valid JSON"),
        ("null", "line 1 of stdin holds a JSON NoneType"),
        ("", "stdin is empty"),
        ("{}", "line 1 of stdin has no 'codes'"),
        ('{"codes": null}', "line 1 of stdin: 'codes' is null"),
        ('{"codes": [1, 2, 3, 4]}\r\n\n{"codes": [1, 2]}', "line 3: .* 4 codes .* integers"),
        ('{"codes": [1, 2, 3, true]}', "line 1: .* 4 codes .* integers"),
        ('{"codes": [1, 2, 3, NaN]}', "line 1: .* 4 codes .* integers"),
        ('{"codes": [1, 2, 3, -1]}', r"line 1: .*2\*\*28"),
        ('{"codes": [1, 2, 3, 4], "tokenizer": "other"}', "line 1: .*tokenizer other"),
    ],
)
def test_decode_refuses_other_codes(line, message, model, tmp_path):
    with pytest.raises(UserError, match=message):
        run("decode", "-", "--out", tmp_path, *model, stdin=line)


def test_score_prints_log_probabilities(model, pipeline, photo, tmp_path):
    rows = rows_of(run("score", photo, "a red disk", "a blue square", "--json", *model))
    expected = pipeline.score([Image.open(photo)] * 2, ["a red disk", "a blue square"])
    assert [row["text_logprob"] for row in rows] == pytest.approx(expected.text_logprobs, abs=1e-4)
    assert [row["image_logprob"] for row in rows] == pytest.approx(expected.image_logprobs, abs=1e-4)
    run("generate", "a red disk", "-n", "2", "--out", tmp_path / "samples", *model)
    samples = tmp_path / "samples" / "samples.jsonl"
    table = run("score", "--pairs", samples, *model).splitlines()
    assert len(table) == 3 and table[1].endswith("0000-a-red-disk.png: a red disk")
    # Our own images count with the codes they were made from, and not with those that encoding them gives.
    scored, written = rows_of(run("score", "--pairs", samples, "--json", *model)), rows_of(samples.read_text())
    logprobs = [row["logprob"] for row in written]
    assert [row["image_logprob"] for row in scored] == pytest.approx(logprobs, abs=1e-3)
    png = (tmp_path / "samples" / written[0]["file"]).read_bytes()
    (row,) = rows_of(run("score", "-", "a red disk", "--json", *model, stdin=png))
    assert row["image_logprob"] == pytest.approx(logprobs[0], abs=1e-3)


def test_complete_prints_the_text_with_its_continuation(model, pipeline):
    options = [*model, "--max-new-tokens", "4", "--seed", "2"]
    expected = pipeline.complete(["a red"], max_new_tokens=4, seed=2)[0]
    assert run("complete", "a red", *options) == "a red" + expected + "\n"
    assert rows_of(run("complete", "--json", *options, stdin="a red"))[0]["continuation"] == expected


def test_info_reports_sizes_fingerprint_steps_and_licences(folder, pipeline, tmp_path):
    assert "not recorded beside this folder" in run("info", folder)
    (tmp_path / "done.json").write_text('{"steps": 2000, "commit": "abc"}')
    facts = json.loads(run("info", folder, "--json"))
    sizes = {name: parameter.numel() for name, parameter in pipeline.model.named_parameters()}
    tables = pipeline.ids.vocab_size * 2 * pipeline.model.config.hidden_size
    assert facts["parameters"] == sum(sizes.values()) and facts["of the layers"] == sum(sizes.values()) - tables
    assert facts["of the text entries"] + facts["of the visual entries"] == tables
    assert facts["visual tokenizer parameters"] == sum(parameter.numel() for parameter in pipeline.qlip.parameters())
    assert facts["architecture"] == "Qwen3ForCausalLM" and facts["visual tokenizer"] == pipeline.qlip.fingerprint()
    assert facts["training steps"] == 2000 and facts["commit"] == "abc"
    assert facts["base model"].startswith("none") and "no restriction" in facts["visual tokenizer licence"]
    change_json(folder / "qlip" / "config.json", weights_license="\x1b]0;owned\x07evil\nline")
    output = run("info", folder)
    assert "\x1b" not in output and r"\x1b]0;owned\x07evil\nline" in output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("../done.json", "[]", "done.json holds a JSON list"),
        ("generation_config.json", "[]", "generation_config.json holds a JSON list"),
        ("config.json", "[]", "config.json holds a JSON list"),
        ("qlip/config.json", "{}", "a config.json lacks 'vision_config'"),
        ("config.json", {"um3": []}, "not a UM3 model"),
        ("config.json", {"um3": {"base": "a"}}, "a config.json has a wrong entry"),
        ("config.json", {"um3": {"conversations": 3}}, "a config.json"),
        ("config.json", {"um3": {"bits_per_subtoken": 10**15}}, "bits_per_subtoken = 1000000000000000"),
        ("config.json", {"hidden_size": "wide"}, "a config.json has a wrong entry"),
        ("qlip/config.json", {"vision_config": 3}, "a config.json has a wrong entry"),
    ],
)
def test_files_of_another_shape_are_one_line(name, value, message, folder):
    change_json(folder / name, **value) if isinstance(value, dict) else (folder / name).write_text(value)
    with pytest.raises(UserError, match=message):
        run("info", folder)


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
        (["decode", "codes.npy"], "codes.npy is not UTF-8"),
        (["generate", "a disk", "--guidance-scale", "much"], "guidance scale 'much'"),
        (["generate", "a disk", "-n", "2", "--out", "-"], "--out -"),
        (["generate", "a disk", "--device", "abacus"], "device 'abacus'"),
        (["caption", "absent.png"], "absent.png"),
        (["caption", "broken.png"], "broken.png: not an image"),
        (["caption", "empty"], "'empty' is neither a file nor a folder with images"),
        (["score", "--pairs", "pairs.jsonl"], "line 2 of pairs.jsonl: 'prompt' is null"),
        (["score", "good.png"], "no text in stdin"),
        (["score"], "--pairs"),
        (["info", "empty"], "empty is not a UM3 model"),
        (["chat", ".", "a?"], ". holds 2 images; a conversation has one"),
        (["chat", "good.png"], "no question in stdin"),
        (["chat", "good.png", " "], "message 1 has no text; ask a question"),
        (["chat", "good.png", "b " * 300], "leaves no room"),
        (["chat", "good.png", "a", "--temperature", "-1"], "temperature -1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image \xff")
    np.save("codes.npy", np.zeros(4))
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "pairs.jsonl").write_text('{"file": "good.png", "prompt": "a"}\n{"file": "good.png", "prompt": null}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    if "--model" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--model", str(model_folder)]
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert message in str(caught.value)


def test_a_closed_stdin_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="no prompt; give it as an argument"):
        read_texts([], file=None, kind="prompt")
    with pytest.raises(UserError, match="stdin is closed; pass a file"):
        read_images(["-"], size=8)


def test_weights_behind_a_broken_link_are_one_line(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/model.safetensors").symlink_to("gone")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        run("info", str(tmp_path / "model"))


def test_the_console_script_exits_with_one_line_and_code_2(monkeypatch, capsys):
    for arguments, message in (
        (["info", "nowhere"], "'nowhere'"),
        (["generate", "--bogus"], "um3 generate --help"),
        (["generate", "a", "--dtype", "int8"], "'--dtype': 'int8' is not one of"),
        (["generate", "a", "--image-seed", str(2**53)], "'--image-seed'"),
    ):
        monkeypatch.setattr(sys, "argv", ["um3", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.entry_point()
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize("command", ["generate", "reconstruct", "decode", "export"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    command, model, photo, tmp_path, monkeypatch
):
    for module in ("um3.inference.pipeline", "um3.model.export"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    (tmp_path / "codes.jsonl").write_text('{"codes": []}')
    options = [] if command == "export" else model
    last = {"export": model[1], "decode": tmp_path / "codes.jsonl"}.get(command, photo)
    with pytest.raises(UserError, match=r"cannot write to .*Holiday photo\.png/out: "):
        run(command, *options, "--out", photo / "out", last)
    with locked(tmp_path / "taken"), pytest.raises(UserError, match=r"another process is writing to .*taken"):
        run(command, *options, "--out", tmp_path / "taken", last)


def test_text_and_names_that_utf_8_cannot_hold(model_folder, photo, tmp_path):
    """They become U+FFFD in results and files; control characters are escaped where a terminal would obey them."""
    controls = "\n\x1b[31m\x9b"
    folder = tmp_path / f"model {controls}"
    folder.symlink_to(model_folder)
    model, out = ["--model", str(folder)], tmp_path / f"out \udcff{controls}"
    assert run("generate", "a", "--out", out, *model).count("\n") == 1
    output = run("generate", f"half \udcff{controls}", "-n", "1", "--out", out, "--json", *model)
    (row,) = rows_of(output)
    assert row["prompt"] == f"half \ufffd{controls}" and row["model"] == str(folder) and "\x9b" not in output
    assert row["file"].startswith(f"{tmp_path}/out \ufffd{controls}/0004-half")
    metadata = read_metadata(next(out.glob("0004-half*")))
    assert {**metadata, "file": row["file"], "tokenizer": row["tokenizer"]} == row
    image = photo.rename(tmp_path / f"\udcff{controls}.png")
    for command in (["caption", image], ["encode", image], ["reconstruct", image, "--out", out]):
        output = run(*command, *model)
        assert output.count("\n") == 1 and "\x1b" not in output and "\x9b" not in output
    assert rows_of(run("caption", image, "--json", *model))[0]["file"] == f"{tmp_path}/\ufffd{controls}.png"
    assert run("complete", "a\n\tb \udcff\x1b", "--max-new-tokens", "1", *model).startswith("a\n\tb \ufffd\\x1b")


def test_a_folder_stands_for_the_images_in_it(model, photo, tmp_path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    (folder / ".hidden").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "b.PNG", folder / "._b.PNG", folder / ".hidden" / "c.png", elsewhere / "d.png"):
        shutil.copy(photo, path)
    (folder / "notes.txt").write_text("no image")
    (folder / "a").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    rows = rows_of(run("encode", folder, photo, *model))
    assert [row["file"] for row in rows] == [f"{folder}/a/d.png", f"{folder}/b.PNG", str(photo)]


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--help"], ["info", "MODEL"], ["caption", "absent.png"], ["serve", "--host", "203.0.113.9"]],
)
def test_what_needs_no_model_is_answered_without_torch(arguments, model_folder):
    script = "import sys; from um3.cli import app\ntry: app(sys.argv[1:], standalone_mode=False)\n"
    script += "finally: print('torch' in sys.modules or 'transformers' in sys.modules)"
    command = [sys.executable, "-c", script, *(word.replace("MODEL", str(model_folder)) for word in arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert output.strip().endswith("False")
    assert "--help" not in arguments or ("0 is greedy" in output and "--guidance-scale 3 --seed 7" in output)


def test_the_first_message_comes_before_the_model(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "um3.inference.pipeline", None)  # importing it fails
    result = CliRunner().invoke(cli.app, ["complete", "a", "--model", str(model_folder)])
    assert isinstance(result.exception, ImportError) and result.stderr == f"loading {model_folder}\n"


def test_images_go_from_command_to_command(model, pipeline):
    arguments = ["generate", "a red disk", "-n", "1", "--out", "-", "--seed", "4", *model]
    result = CliRunner().invoke(cli.app, arguments)
    expected = pipeline.generate(["a red disk"], seed=4, temperature=0.5, top_p=0.9, guidance_scale=2)
    image = Image.open(io.BytesIO(result.stdout_bytes))
    assert np.array_equal(np.asarray(image), expected.arrays[0])
    assert "generate 16/16 " in result.stderr and "images 1 to 1 of 1" in result.stderr
    (row,) = rows_of(run("caption", "-", "--json", *model, stdin=result.stdout_bytes))
    assert row["file"] == "-" and row["caption"] == pipeline.caption([image])[0]


def test_a_closed_pipe_is_not_an_error(model_folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "um3", "info", str(model_folder)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.stderr == ""


def test_gguf_writes_one_file(model_folder: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "um3.gguf"
    lines = run("gguf", "--weights", "q8_0", "--out", out, model_folder).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{out}: Qwen3ForCausalLM, ") and ", q8_0, " in lines[0]
    assert out.read_bytes()[:4] == b"GGUF"
    for target, message in ((out, "already exists"), (photo / "um3.gguf", "cannot write to")):
        with pytest.raises(UserError, match=message):
            run("gguf", "--out", target, model_folder)
