import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from eval.config import PARTS
from eval.run import main
from eval.scores import read_scores
from um3.core.errors import UserError

CONFIG = """
images:
  - {name: scenes, kind: scenes, length: 2400}
  - {name: digits, kind: digits}
texts: [{name: prose, kind: jsonl, path: %s, val_fraction: 0.9}]
fid_features: random-features
language: {num_items: 8, num_documents: 4, batch_size: 8}
captions: {num_images: 6, max_new_tokens: 4}
generation: {num_images: 6, per_skill: 2}
tokenizer: {num_images: 8}
"""


@pytest.fixture(scope="module")
def run_folder(run_folder, tmp_path_factory):
    """A copy, whose every part is evaluated here."""
    return shutil.copytree(run_folder, tmp_path_factory.mktemp("whole") / run_folder.name)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("config")
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "eval.yaml").write_text(CONFIG % (folder / "prose.jsonl"))
    return folder / "eval.yaml"


@pytest.fixture(scope="module")
def evaluated(run_folder, config_file):
    main(["--config", str(config_file), f"run={run_folder}"])
    return run_folder / "eval"


def test_every_part_leaves_rows_samples_and_images(evaluated):
    rows = {row.key: row for part in PARTS for row in read_scores(evaluated / f"{part}.json")}
    expected = {
        "um3_prose_cloze/acc": 8,
        "um3_prose/bits_per_byte": 4,
        "scenes_captions/cider": 6,
        "digits_captions/exact_match": 6,
        "scenes_generation/frechet_distance[random-features]": 6,
        "scenes_generation/read_back": 6,
        "skills/mean": 12,
        "scenes_reconstruction_stage1/psnr": 8,
        "digits_reconstruction_stage2/ssim": 8,
        "scenes_bits/entropy": 8,
        "digits_classification/zero_shot": 359,
        "digits_classification/probe_cls_mean": 359,
    }
    for key, n in expected.items():
        assert rows[key].n == n and rows[key].value is not None, key
    without = rows["digits_retrieval/image_to_text"]
    assert without.value is None and "distinct" in without.note
    with np.load(evaluated / "generation.npz") as arrays:
        assert arrays["skills"].shape == (12, 32, 32, 3) and arrays["scenes_drawn"].shape == (6, 32, 32, 3)
    with np.load(evaluated / "tokenizer.npz") as arrays:
        kinds = ("stage1", "stage2", "original", "flipped")
        assert set(arrays) == {f"{source}_{kind}" for source in ("scenes", "digits") for kind in kinds}
    skills = json.loads((evaluated / "generation.json").read_text())["samples"]["skills"]
    assert len(skills) == 12 and {"prompt", "skill", "passed", "demands_met", "seed"} <= skills[0].keys()


def test_what_is_up_to_date_is_left_alone(evaluated, run_folder, config_file, capsys):
    before = {path: path.stat().st_mtime_ns for path in evaluated.iterdir()}
    main(["--config", str(config_file), f"run={run_folder}", "num_threads=1"])
    assert capsys.readouterr().out.count("is up to date") == 4
    assert before == {path: path.stat().st_mtime_ns for path in evaluated.iterdir()}
    main(["--config", str(config_file), f"run={run_folder}", "captions.num_images=5"])
    said = capsys.readouterr().out
    assert said.count("is up to date") == 3 and "captions: " in said
    main(["--config", str(config_file), f"run={run_folder}"])


def test_the_same_request_gives_the_same_values(evaluated, run_folder, config_file, tmp_path):
    main(["--config", str(config_file), f"run={run_folder}", f"out={tmp_path}", "parts=[generation,captions]"])
    for part in ("generation", "captions"):
        first, second = read_scores(evaluated / f"{part}.json"), read_scores(tmp_path / f"{part}.json")
        assert [(row.key, row.value) for row in first] == [(row.key, row.value) for row in second]
    assert not (tmp_path / "language.json").exists()


def test_a_run_says_itself_what_it_held_out(run_folder, tmp_path):
    (tmp_path / "eval.yaml").write_text("tokenizer: {num_images: 4}\nparts: [tokenizer]\n")
    main(["--config", str(tmp_path / "eval.yaml"), f"run={run_folder}", f"out={tmp_path}"])
    tasks = {row.task for row in read_scores(tmp_path / "tokenizer.json")}
    assert {"scenes_reconstruction_stage1", "digits_reconstruction_stage2"} <= tasks
    with pytest.raises(UserError, match=r"which data is held out.*list the sources under 'texts'"):
        main(["--config", str(tmp_path / "eval.yaml"), f"run={run_folder}", "parts=[language]"])


def test_a_tokenizer_without_text_files_is_measured_all_the_same(qlip_folder, run_folder, tmp_path):
    shutil.copytree(qlip_folder, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    (tmp_path / "eval.yaml").write_text(
        f"tokenizer: {{num_images: 4, stages: {{mute: {tmp_path / 'mute'}}}}}\nparts: [tokenizer]\n"
    )
    main(["--config", str(tmp_path / "eval.yaml"), f"run={run_folder}", f"out={tmp_path}"])
    rows = {row.key: row for row in read_scores(tmp_path / "tokenizer.json")}
    assert rows["scenes_reconstruction_mute/psnr"].value is not None
    assert rows["digits_classification/probe_cls"].value is not None
    assert "no text tokenizer" in rows["digits_classification/zero_shot"].note


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set run=FOLDER"),
        (["run=nowhere"], "no UM3 model in nowhere/um3/model; run make um3 first"),
        (["run=nowhere", "parts=[tokenizer]"], "no visual tokenizer in nowhere/stage1 or stage2; run make stage1"),
        (["run=nowhere", "parts=[tokenizer]", "tokenizer.stages={a: x}"], "no visual tokenizer in x; correct"),
    ],
)
def test_missing_models_are_one_line_errors(config_file, overrides, message):
    with pytest.raises(UserError, match=message):
        main(["--config", str(config_file), *overrides])


def test_mistakes_in_the_config_are_one_line_errors(config_file, run_folder):
    with pytest.raises(UserError, match="did you mean 'captions'"):
        main(["--config", str(config_file), f"run={run_folder}", "caption.num_images=3"])
    with pytest.raises(UserError, match="num_images is 1; it must be at least 2"):
        main(["--config", str(config_file), f"run={run_folder}", "captions.num_images=1"])
    inception = ["fid_features=inception-2015", "inception_weights=none", "parts=[tokenizer]"]
    with pytest.raises(UserError, match="no Inception weights at none"):
        main(["--config", str(config_file), f"run={run_folder}", *inception])


def test_as_a_program_a_missing_model_is_one_line_and_exit_code_2(config_file, tmp_path):
    command = [sys.executable, "-m", "eval.run", "--config", str(config_file), f"run={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no UM3 model in") and len(done.stderr.splitlines()) == 1
