import pytest

from eval.report.run_folder import load_run
from eval.scores import Measurement, write_scores
from um3.core.errors import UserError


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


def test_folders_without_results_and_damaged_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist; .*--run"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match="no training phase and no evaluation"):
        load_run(tmp_path)
    write_scores(tmp_path / "eval" / "captions.json", [Measurement("t", 0).score("m", 0.5, n=2)])
    (tmp_path / "eval" / "captions.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"captions\.npz is damaged"):
        load_run(tmp_path)
