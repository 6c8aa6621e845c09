"""The forgetting guard: what it measures, that it disturbs nothing, and what it sets off."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_mix.batches.packing import micro_batches
from data_mix.batches.token_stream import scattered_rows
from data_mix.sources.text import TextSourceConfig, open_text_source
from tests.helpers.survive import outcome
from tests.train.conftest import arguments, run_apart, run_here
from tests.train.test_resume import Killed, kill_after
from um3.core.errors import UserError
from um3.core.metrics import read_metrics
from um3.model.language_model import load_model

EVERY_STEP = ["text_validation.every_steps=1", "text_validation.num_sequences=5"]
MIX = ["data.mix.start=[6, 1, 1]", "data.mix.end=[0, 1, 1]", "data.mix.calm_down_steps=4"]


def guarded(made: Path, folder: Path, *overrides: str) -> list[str]:
    return arguments("um3", made, f"loop.output_dir={folder}", *EVERY_STEP, *overrides)


def values(folder: Path, key: str) -> list[Any]:
    return [row.get(key) for row in read_metrics(folder / "metrics.jsonl")]


def text_loss(folder: Path) -> float:
    """What the finished model's text costs, by the stock model and torch's cross entropy alone."""
    loaded = load_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    documents = open_text_source(TextSourceConfig(val_fraction=0.05), split="val")
    rows = scattered_rows(
        documents, tokenizer=loaded.text_tokenizer, ids=loaded.ids, num_rows=5, seq_len=28, seed=0, cache=folder
    )
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits_TV = model(row.input_ids[None]).logits[0, :-1, : loaded.ids.text_vocab_size]
        total += torch.nn.functional.cross_entropy(logits_TV, row.input_ids[1:], reduction="sum").item()
        count += len(row.input_ids) - 1
    return total / count


@pytest.mark.parametrize(
    "override", ["loss.mode=split", "loss.mode=joint", "data.packing=documents", "loop.micro_batch_size=2"]
)
def test_it_measures_what_the_model_costs(
    override: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, guarded(made, tmp_path, override))
    losses, starts = values(tmp_path, "text_validation/text_loss"), values(tmp_path, "text_validation/start")
    assert losses[-1] == pytest.approx(text_loss(tmp_path), rel=1e-5)
    assert len(set(losses)) == 4 and len(set(starts)) == 1 and losses[-1] < starts[0]
    assert values(tmp_path, "text_validation/above_start") == pytest.approx([loss - starts[0] for loss in losses])


def test_the_start_is_the_model_before_the_first_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, guarded(made, tmp_path / "first", "loop.max_steps=2"))
    going_on = [f"model.base_model={tmp_path}/first/model", "loop.max_steps=1"]
    run_here(monkeypatch, guarded(made, tmp_path / "second", *going_on))
    start = values(tmp_path / "second", "text_validation/start")[0]
    assert start == pytest.approx(values(tmp_path / "first", "text_validation/text_loss")[-1], rel=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_it_changes_nothing(zero_stage: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = f"engine.zero_stage={zero_stage}"
    run_here(monkeypatch, guarded(made, tmp_path / "with", stage))
    run_here(monkeypatch, guarded(made, tmp_path / "without", stage, "text_validation.every_steps=0"))
    for key in ("train/loss", "optim/grad_norm", "data/samples/text"):
        assert values(tmp_path / "with", key) == values(tmp_path / "without", key)
    assert values(tmp_path / "without", "text_validation/text_loss") == [None] * 4
    run_here(monkeypatch, guarded(made, tmp_path / "plain", "engine.zero_stage=1"))
    assert values(tmp_path / "with", "text_validation/text_loss") == pytest.approx(
        values(tmp_path / "plain", "text_validation/text_loss"), rel=1e-4
    )


@pytest.mark.slow
def test_two_processes_share_its_rows(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, guarded(made, tmp_path / "one"))
    result = run_apart(guarded(made, tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    for key in ("text_validation/start", "text_validation/text_loss"):
        assert values(tmp_path / "two", key) == pytest.approx(values(tmp_path / "one", key), rel=1e-4)


def test_a_rank_with_fewer_rows_has_as_many_micro_batches() -> None:
    ids_BT = torch.ones(1, 4, dtype=torch.int64)
    pieces = list(micro_batches(ids_BT, ids_BT.bool(), parts=2, pad_id=7))
    assert [piece.tolist() for piece, _ in pieces] == [[[1] * 4], [[7] * 4]]
    assert [mask.any().item() for _, mask in pieces] == [True, False]


def test_above_its_limit_the_mix_returns_to_the_start(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = [*MIX, "text_validation.every_steps=3", "loop.max_steps=9", "text_validation.return_above=-100"]
    run_here(monkeypatch, guarded(made, tmp_path / "returns", *often))
    # Measured after 3, 6 and 9 steps; the fifth and the eighth step have the start's mix again.
    assert values(tmp_path / "returns", "text_validation/restart") == [
        None,
        None,
        4.0,
        None,
        None,
        7.0,
        None,
        None,
        None,
    ]
    scheduled, had = (values(tmp_path / "returns", f"data/{name}/text") for name in ("scheduled", "samples"))
    assert scheduled == pytest.approx(list(accumulate([6, 4.5, 3, 1.5, 6, 4.5, 3, 6, 4.5])))
    assert all(abs(due - given) < 1 for due, given in zip(scheduled, had, strict=True))
    assert had == list(accumulate(values(tmp_path / "returns", "data/rows_text")))
    run_here(monkeypatch, guarded(made, tmp_path / "stays", *often[:-1], "text_validation.return_above=100"))
    assert values(tmp_path / "stays", "data/rows_text")[4:] == [0] * 5
    assert values(tmp_path / "stays", "text_validation/restart") == [None] * 9


@pytest.mark.parametrize("step", [4, 7])
def test_a_resumed_run_returns_as_the_undisturbed_one(
    step: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *MIX,
        "text_validation.every_steps=3",
        "loop.max_steps=9",
        "text_validation.return_above=-100",
        "loop.save_every_steps=3",
    ]
    run_here(monkeypatch, guarded(made, tmp_path / "whole", *options))
    killed = guarded(made, tmp_path / "killed", *options)
    with monkeypatch.context() as patch:
        kill_after(patch, step)
        with pytest.raises(Killed):
            run_here(patch, killed)
    run_here(monkeypatch, killed)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_the_alarm_names_step_and_loss(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(
        monkeypatch,
        guarded(made, tmp_path / "run", "text_validation.every_steps=2", "text_validation.alarm_above=-100"),
    )
    said = capsys.readouterr().err
    assert said.count("held-out text costs") == 2 and "after step 2 " in said and "after step 4 " in said
    loss, start = (
        values(tmp_path / "run", "text_validation/text_loss")[-1],
        values(tmp_path / "run", "text_validation/start")[-1],
    )
    assert (
        f"costs {loss:.3f} nats per token, {loss - start:.3f} more than at the start (text_validation.alarm_above=-100)"
        in said
    )
    quiet = ["text_validation.every_steps=2", "text_validation.alarm_above=100"]
    run_here(monkeypatch, guarded(made, tmp_path / "run", *quiet))  # free to change: the run is up to date
    assert "up to date" in capsys.readouterr().out
    run_here(monkeypatch, guarded(made, tmp_path / "quiet", *quiet))
    assert "held-out text costs" not in capsys.readouterr().err


def test_it_measures_other_texts_also_where_none_is_trained(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(f"Passage {number} " + "word " * 700 for number in range(40)))
    none = ["data.mix.start=[0, 1, 1]", "data.mix.end=[0, 1, 1]"]
    other = ["text_validation.texts=[{name: other, path: '" + f"{tmp_path}/other.txt" + "', val_fraction: 0.3}]"]
    run_here(monkeypatch, guarded(made, tmp_path / "prose", *none))
    run_here(monkeypatch, guarded(made, tmp_path / "other", *none, *other))
    prose, found = (values(tmp_path / name, "text_validation/start")[0] for name in ("prose", "other"))
    assert found > 0 and found != pytest.approx(prose, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["text_validation.every_steps=15", "loop.log_every_steps=10"],
            r"every_steps=15 is no multiple of loop\.log_every",
        ),
        (["text_validation.every_steps=-1"], r"guard\.every_steps=-1 is no multiple"),
        (
            ["text_validation.return_above=0.1", "data.mix.calm_down_steps=0"],
            r"return_above=0\.1 goes back to data\.mix\.start",
        ),
        (
            ["text_validation.return_above=0.1", "data.mix.start=[1, 1, 1]", "data.mix.end=[1, 1, 1]"],
            "no more text than its end",
        ),
        (
            ["text_validation.texts=[]", "data.texts=[]", "data.mix.start=[0, 1, 1]", "data.mix.end=[0, 1, 1]"],
            "0 text sources",
        ),
        (["data.texts=[{name: prose, kind: python_docs, val_fraction: 0}]"], "nothing for the val split"),
    ],
)
def test_what_cannot_be_guarded_is_one_line(
    overrides: list[str], message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message):
        run_here(monkeypatch, guarded(made, tmp_path, *overrides))
