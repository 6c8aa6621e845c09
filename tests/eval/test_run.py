"""`python -m eval run`: all four parts, what is up to date, and one-line errors."""

import json
import shutil

import numpy as np
import pytest

from eval.config import PARTS
from eval.part_files import write_part
from eval.run import main
from eval.scores import PartResult, read_scores
from tests.eval.report.test_run_folder import change
from tests.helpers.processes import locked
from um3.core.errors import UserError

CONFIG = """
eval:
  images:
    - {name: scenes, kind: scenes, length: 2400}
    - {name: digits, kind: digits}
  texts: [{name: prose, kind: jsonl, path: %s, val_fraction: 0.9}]
  language: {num_items: 8, num_documents: 4, batch_size: 8}
  captions: {num_images: 6, max_new_tokens: 4}
  generation: {num_images: 6, per_skill: 2}
  tokenizer: {num_images: 8}
"""


@pytest.fixture(scope="module")
def run_folder(run_folder, tmp_path_factory):
    """A copy to evaluate."""
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


def test_every_part_writes_rows_samples_and_images(evaluated):
    rows = {row.key: row for part in PARTS for row in read_scores(evaluated / f"{part}.json")}
    expected = {
        "um3_prose_cloze/acc": 8, "um3_prose/bits_per_byte": 4, "scenes_captions/cider": 6,
        "digits_captions/exact_match": 6, "scenes_generation/frechet_distance[random-features]": 6,
        "scenes_generation/read_back": 6, "skills/mean": 12, "scenes_reconstruction_stage1/psnr": 8,
        "digits_reconstruction_stage2/ssim": 8, "scenes_bits/entropy": 8, "digits_classification/zero_shot": 359,
        "digits_classification/probe_cls_mean": 359,
    }  # fmt: skip
    for key, n in expected.items():
        assert rows[key].n == n and rows[key].value is not None, key
    missing = rows["digits_retrieval/image_to_text"]
    assert missing.value is None and "distinct" in missing.note
    with np.load(evaluated / "generation.npz") as arrays:
        assert arrays["skills"].shape == (12, 32, 32, 3) and arrays["scenes_drawn"].shape == (6, 32, 32, 3)
    with np.load(evaluated / "tokenizer.npz") as arrays:
        kinds = ("stage1", "stage2", "original", "flipped")
        assert set(arrays) == {f"{source}_{kind}" for source in ("scenes", "digits") for kind in kinds}
    skills = json.loads((evaluated / "generation.json").read_text())["samples"]["skills"]
    assert len(skills) == 12 and {"prompt", "skill", "passed", "demands_met", "seed"} <= skills[0].keys()


def test_up_to_date_parts_are_skipped(evaluated, run_folder, config_file, capsys):
    before = {path: path.stat().st_mtime_ns for path in evaluated.iterdir()}
    main(["--config", str(config_file), f"run={run_folder}", "num_threads=1"])
    assert capsys.readouterr().out.count("is up to date") == 4
    assert before == {path: path.stat().st_mtime_ns for path in evaluated.iterdir()}
    main(["--config", str(config_file), f"run={run_folder}", "captions.num_images=5"])
    output = capsys.readouterr().out
    assert output.count("is up to date") == 3 and "captions: " in output
    main(["--config", str(config_file), f"run={run_folder}"])


DAMAGE = {  # tests/eval/report/test_run_folder.py has every other kind of damage
    "no images": lambda part: part.with_suffix(".npz").unlink(),
    "cut images": lambda part: part.with_suffix(".npz").write_bytes(part.with_suffix(".npz").read_bytes()[:-50]),
    "other images": lambda part: np.savez(part.with_suffix(".npz"), scenes=np.ones((6, 9, 9, 3), np.uint8)),
    "cut scores": lambda part: part.write_text(part.read_text()[:-50]),
    "an odd row": lambda part: change(part, scores=[1]),
    "no digest": lambda part: change(part, files_sha256=None),
    "odd digests": lambda part: change(part, files_sha256=["captions.npz"]),
    "no file of items": lambda part: part.with_name("captions_items.jsonl").unlink(),
    "nothing": lambda part: part.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_part_whose_files_are_not_whole_is_measured_again(damage, evaluated, run_folder, tmp_path, monkeypatch):
    """The measurement itself is replaced by one that returns nothing."""
    part = tmp_path / "captions.json"
    for suffix in (".json", ".npz"):
        shutil.copy(evaluated / f"captions{suffix}", tmp_path)
    request = json.loads(part.read_text())["request"]
    (tmp_path / "captions_items.jsonl").write_text("{}")
    write_part(part, PartResult(read_scores(part), {}, {"scenes": np.zeros((6, 9, 9, 3), np.uint8)}), request=request)
    measured = []
    monkeypatch.setattr("eval.run.request_hash", lambda *_, **__: request)
    monkeypatch.setattr("eval.run._evaluate_part", lambda *_, **__: measured.append(1) or [])
    arguments = [f"run={run_folder}", f"output_dir={tmp_path}", "parts=[captions]"]
    main(arguments)
    assert not measured
    DAMAGE[damage](part)
    main(arguments)
    assert measured


def test_one_process_writes_to_a_results_folder_and_it_must_be_writable(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.run._evaluate_part", lambda *_, **__: pytest.fail("measured"))
    arguments = [f"run={run_folder}", f"output_dir={tmp_path / 'eval'}", "parts=[captions]"]
    with locked(tmp_path / "eval"), pytest.raises(UserError, match="another process is writing"):
        main(arguments)
    (tmp_path / "file").touch()
    with pytest.raises((UserError, OSError), match="file"):
        main([*arguments, f"output_dir={tmp_path / 'file'}"])


def test_the_same_request_gives_the_same_values(evaluated, run_folder, config_file, tmp_path):
    main(["--config", str(config_file), f"run={run_folder}", f"output_dir={tmp_path}", "parts=[generation,captions]"])
    for part in ("generation", "captions"):
        first, second = read_scores(evaluated / f"{part}.json"), read_scores(tmp_path / f"{part}.json")
        assert [(row.key, row.value) for row in first] == [(row.key, row.value) for row in second]
    assert not (tmp_path / "language.json").exists()


def test_the_runs_own_sources_are_the_default(evaluate):
    rows = evaluate("parts=[tokenizer]", "tokenizer.num_images=4", "tokenizer.digits=false")
    assert {"scenes_reconstruction_stage1/psnr", "digits_reconstruction_stage2/psnr"} <= rows.keys()
    with pytest.raises(UserError, match=r"no validation data.*'texts'"):
        evaluate("parts=[language]")


def test_a_tokenizer_without_text_files_is_measured_too(qlip_folder, evaluate, tmp_path):
    folder = shutil.copytree(qlip_folder, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    rows = evaluate("parts=[tokenizer]", "tokenizer.num_images=4", f"tokenizer.stages={{plain: {folder}}}")
    assert rows["scenes_reconstruction_plain/psnr"].value is not None
    assert rows["digits_classification/probe_cls"].value is not None
    assert "no text tokenizer" in rows["digits_classification/zero_shot"].note
