"""Evaluation while UM3 trains: the numbers of `make eval`, and a training that is not disturbed."""

import json
from pathlib import Path

import pytest

from eval.run import main as evaluate
from tests.train.conftest import arguments, losses, run_apart, run_here
from um3.core.errors import UserError
from um3.core.metrics import read_metrics

EVAL = """
num_threads: 2
images: [{name: scenes, kind: scenes, length: 200}]
language: {num_items: 2, num_documents: 2, max_tokens: 28}
captions: {num_images: 6, max_new_tokens: 4}
generation: {num_images: 4, per_skill: 2}
"""
EVERY_TWO = ["evaluate.every_steps=2", "evaluate.parts=[language, captions, generation]"]


def with_evaluation(made: Path, folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "eval.yaml").write_text(EVAL)
    config = f"evaluate.config={folder}/eval.yaml"
    return arguments("um3", made, f"loop.output_dir={folder}/um3", config, *EVERY_TWO, *overrides)


def measured(folder: Path) -> list[dict[str, float]]:
    """The evaluation's metrics of every step."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows]


def test_it_gives_what_make_eval_gives_and_changes_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, with_evaluation(made, tmp_path))
    steps = measured(tmp_path / "um3")
    assert [bool(step) for step in steps] == [False, True, False, True] and steps[1] != steps[3]
    assert {"eval/um3_prose/bits_per_byte", "eval/scenes_captions/cider", "eval/skills/mean"} <= steps[3].keys()
    evaluate([
        "--config", str(tmp_path / "eval.yaml"), f"run={tmp_path}", "parts=[language, captions, generation]",
        "num_threads=1",
    ])  # fmt: skip
    for part in ("language", "captions", "generation"):
        for score in json.loads((tmp_path / f"eval/{part}.json").read_text())["scores"]:
            if score["value"] is not None:
                assert steps[3][f"eval/{score['task']}/{score['metric']}"] == score["value"]
    kept = sorted(path.name for path in (tmp_path / "um3/eval/step-00000004").iterdir())
    assert "captions.json" in kept and "captions.npz" in kept and "model" not in kept
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/plain"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "um3")


@pytest.mark.slow
def test_the_other_ranks_wait(made: Path, tmp_path: Path) -> None:
    command = with_evaluation(made, tmp_path, "engine.zero_stage=3", "evaluate.parts=[captions]")
    result = run_apart(command, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [len(step) > 3 for step in measured(tmp_path / "um3")] == [False, True, False, True]


def test_what_cannot_be_measured_does_not_end_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = with_evaluation(made, tmp_path, "evaluate.parts=[generation]")
    (tmp_path / "eval.yaml").write_text(EVAL + "features: inception-2015\ninception_weights: nowhere.pth\n")
    run_here(monkeypatch, command)
    said = capsys.readouterr().err
    assert "after step 2 nothing was measured: " in said and "nowhere.pth" in said
    assert measured(tmp_path / "um3") == [{}] * 4 and (tmp_path / "um3/model").is_dir()


def test_what_is_wrong_is_told_before_the_first_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overrides, message in (
        (["evaluate.config=none.yaml"], r"config file none\.yaml does not exist"),
        (["evaluate.every_steps=15", "loop.log_every_steps=10"], r"evaluate\.every_steps=15 is no multiple"),
    ):
        with pytest.raises(UserError, match=message):
            run_here(monkeypatch, with_evaluation(made, tmp_path, *overrides))
    command = with_evaluation(made, tmp_path)
    (tmp_path / "eval.yaml").write_text("captions: {num_images: 2}\n")
    with pytest.raises(UserError, match="list the sources under 'images'"):
        run_here(monkeypatch, command)
