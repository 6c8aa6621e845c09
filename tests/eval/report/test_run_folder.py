import json

import numpy as np
import pytest

from eval.part_files import write_part
from eval.report.figures import write_figures
from eval.report.report import main
from eval.report.results import result_tables
from eval.report.run_folder import load_run
from eval.scores import Measurement, PartResult, write_scores
from um3.core.errors import UserError
from um3.core.files import write_json


def test_benchmarks_join_the_rows_of_their_part(tmp_path):
    of = Measurement("t", 0)
    write_scores(tmp_path / "eval" / "generation.json", [of.named("skills").score("mean", 0.5, n=2)])
    write_scores(tmp_path / "eval" / "geneval.json", [of.named("geneval").missing("mean", note="no detector")])
    write_scores(tmp_path / "eval" / "dpg.json", [of.named("dpg").score("overall", 0.5, n=2)])
    write_scores(tmp_path / "eval" / "coco_captions.json", [of.named("coco_captions").score("cider", 0.5, n=2)])
    run = load_run(tmp_path)
    assert [row.key for row in run.rows_by_part["generation"]] == ["skills/mean", "geneval/mean", "dpg/overall"]
    assert [row.key for row in run.rows_by_part["captions"]] == ["coco_captions/cider"]
    assert run.scores["geneval/mean"].note == "no detector" and set(run.parts) == {"generation"}
    assert "Questions about images" not in [table.title for table in result_tables([run])]
    write_scores(tmp_path / "eval" / "vqa_pope.json", [of.named("pope").score("f1", 0.5, n=2, paper=0.861)])
    table = result_tables([load_run(tmp_path)])[-1]
    assert table.title == "Questions about images" and [row.key for row in table.rows] == ["", "pope/f1"]


def test_folders_without_results_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist; .*--run"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match="no training phase and no evaluation"):
        load_run(tmp_path)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xe9"}'),
    "a list": lambda path: path.write_text("[1]"),
    "a number": lambda path: path.write_text("1"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "seconds": lambda path: change(path, seconds="long"),
    "nan seconds": lambda path: change(path, seconds=float("nan")),
}
PART_DAMAGE = {
    "no scores": lambda path: change(path, scores=None),
    "odd row": lambda path: change(path, scores=[{"task": 1}]),
    "text as value": lambda path: change(path, scores=[{**SCORE, "value": "0.5"}]),
    "task is none": lambda path: change(path, scores=[{**SCORE, "task": None}]),
    "another protocol": lambda path: change(path, scores=[{**SCORE, "protocol": {"a": 1}}]),
    "samples are a list": lambda path: change(path, samples=[1]),
    "samples of another source": lambda path: change(path, samples={"digits": []}),
    "samples without caption": lambda path: change(path, samples={"scenes": [{}, {}]}),
    "a sample too few": lambda path: change(path, samples={"scenes": [SAMPLE]}),
    "images gone": lambda path: path.with_suffix(".npz").unlink(),
    "images cut": lambda path: path.with_suffix(".npz").write_bytes(b"PK\x03\x04 cut"),
    "images of floats": lambda path: np.savez(path.with_suffix(".npz"), scenes=np.zeros((2, 8, 8, 3))),
    "pickled images": lambda path: np.savez(path.with_suffix(".npz"), scenes=np.array([{}, {}])),
}
SCORE = Measurement("scenes_captions", 0).score("cider", 0.5, n=2).to_dict()
SAMPLE = {"caption": "a", "right": True, "references": ["a"]}


@pytest.fixture
def run(tmp_path):
    """A run with one score and two images of a part, a score of another part, and a phase."""
    scores = [Measurement("scenes_captions", 0).score("cider", 0.5, n=2)]
    images = {"scenes": np.zeros((2, 8, 8, 3), np.uint8)}
    write_part(tmp_path / "eval" / "captions.json", PartResult(scores, {"scenes": [SAMPLE] * 2}, images), seconds=1)
    write_scores(tmp_path / "eval" / "geneval.json", [Measurement("geneval", 0).score("mean", 0.5, n=2)])
    for name in ("stage1/done.json", "codes/summary.json"):
        write_json(tmp_path / name, {"seconds": 2.5, "note": "half a pair: \N{SNOWMAN}"})
    (tmp_path / "stage1" / "metrics.jsonl").write_text('{"step": 1, "train/mse": 0.5}\n')
    return tmp_path


def test_a_whole_run_has_no_problems(run):
    loaded = load_run(run)
    assert loaded.problems == [] and len(loaded.shown["captions"][0].tiles) == 2


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, d) for name in ("stage1/done.json", "codes/summary.json", "eval/captions.json") for d in DAMAGE),
        *(("eval/captions.json", damage) for damage in PART_DAMAGE),
        ("stage1/metrics.jsonl", "a folder"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_and_the_rest_read(name, damage, run):
    (DAMAGE | PART_DAMAGE)[damage](run / name)
    loaded = load_run(run)
    (problem,) = loaded.problems
    assert str((run / name).with_suffix("")) in problem and "\n" not in problem
    assert "geneval/mean" in loaded.scores


def test_every_form_of_the_report_names_what_it_leaves_out(run, capsys):
    names = ("stage1/done.json", "codes/summary.json", "eval/captions.json")
    for name in names:
        DAMAGE["cut"](run / name)
    main(["--run", str(run)])
    for text in (capsys.readouterr().out, *((run / f"report.{kind}").read_text() for kind in ("md", "html", "json"))):
        assert "geneval/mean" in text or "mean of the six" in text
        assert all(str(run / name) in text.replace("\\_", "_") for name in names)


def test_values_from_outside_reach_no_format(run):
    """Half a surrogate pair, a control character and values that cannot be drawn."""
    done = run / "stage1" / "done.json"
    done.write_text('{"seconds": 1, "commit": "\\ud800\\u001b[31m", "config": {"lr": NaN, "big": 1e999}}')
    rows = ["1e999", "NaN", "1" * 400, '"nan"', "true", "[]"]
    (run / "stage1" / "metrics.jsonl").write_text("".join(f'{{"step": 1, "train/mse": {row}}}\n' for row in rows))
    main(["--run", str(run)])
    assert json.loads((run / "report.json").read_text())["config"]["stage1"] == {"lr": "NaN", "big": "Infinity"}
    assert "\ufffd" in (run / "report.html").read_text() and load_run(run).problems == []


def test_a_figure_of_odd_metrics_is_told(run):
    (run / "um3").mkdir()
    (run / "um3" / "metrics.jsonl").write_text('{"step": 1, "text_validation/text_loss": 0.5}\n')
    loaded = load_run(run)
    assert "forgetting" not in write_figures(loaded)
    (problem,) = loaded.problems
    assert "forgetting" in problem and str(run) in problem
