from eval.report.run_folder import load_run
from eval.scores import Measurement, write_scores


def test_benchmarks_stand_with_the_rows_of_their_part(tmp_path):
    of = Measurement("t", 0)
    write_scores(tmp_path / "eval" / "generation.json", [of.named("skills").score("mean", 0.5, n=2)])
    write_scores(tmp_path / "eval" / "geneval.json", [of.named("geneval").missing("mean", note="no detector")])
    write_scores(tmp_path / "eval" / "dpg.json", [of.named("dpg").score("overall", 0.5, n=2)])
    write_scores(tmp_path / "eval" / "coco_captions.json", [of.named("coco_captions").score("cider", 0.5, n=2)])
    run = load_run(tmp_path)
    assert [row.key for row in run.rows_by_part["generation"]] == ["skills/mean", "geneval/mean", "dpg/overall"]
    assert [row.key for row in run.rows_by_part["captions"]] == ["coco_captions/cider"]
    assert run.scores["geneval/mean"].note == "no detector" and set(run.parts) == {"generation"}


def test_a_run_of_benchmarks_alone_is_a_run(tmp_path):
    write_scores(tmp_path / "eval" / "dpg.json", [Measurement("dpg", 0).score("overall", 0.5, n=2)])
    assert set(load_run(tmp_path).scores) == {"dpg/overall"}
