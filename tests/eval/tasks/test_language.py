"""The language part: the cloze, the rows, resuming, and errors."""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from language_items import FILES

from eval import lm
from eval.config import LanguageConfig
from eval.lm import UM3LM
from eval.lm_eval_data import TASKS, open_benchmarks
from eval.run import main
from eval.scores import bootstrap, read_scores
from eval.tasks.language import language_scores
from eval.tasks.prose_tasks import CLOZE, PROSE, cloze_items, split_sentences
from um3.core.errors import UserError

SMALL = {"config": LanguageConfig(num_items=20), "seed": 0}


def test_cloze_items_are_deterministic_and_hide_no_answer(documents):
    items = cloze_items(documents, num_items=30, seed=0)
    assert items == cloze_items(documents, num_items=30, seed=0) != cloze_items(documents, num_items=30, seed=1)
    assert len(items) == 30 and {item.label for item in items} == {0, 1, 2, 3}
    for item in items:
        assert len(set(item.choices)) == 4
        sources = [text for text in documents if f"{item.context} {item.choices[item.label]}" in text]
        assert sources, "the answer does not follow its context anywhere"
        lengths = [abs(len(choice) - len(item.choices[item.label])) for choice in item.choices]
        assert max(lengths) < 20
    with pytest.raises(UserError, match="cloze"):
        cloze_items(["Short. Text."], num_items=5, seed=0)


def test_sentences_keep_every_character():
    text = 'He said "No." Then he left! "Why?" asked Anna. It was e.g. late.'
    parts = split_sentences(text)
    assert parts == ['He said "No."', "Then he left!", '"Why?" asked Anna.', "It was e.g. late."]
    assert " ".join(parts) == text


def test_missing_data_give_rows_that_name_the_remedy(um3_lm, documents, tmp_path):
    result = language_scores(um3_lm, documents=documents, benchmarks={}, folder=tmp_path, **SMALL)
    by_key = {row.key: row for row in result.scores}
    assert by_key["um3_prose_cloze/acc"].n == 20 and 0 <= by_key["um3_prose_cloze/acc"].value <= 1
    bits = by_key["um3_prose/bits_per_byte"]
    assert 0 < bits.low < bits.value < bits.high
    missing = by_key["hellaswag/acc"]
    assert missing.value is None and "LM_EVAL_DATA" in missing.note and missing.paper == 0.4535
    assert {"arc_challenge/acc_norm", "piqa/acc", "social_iqa/acc", "winogrande/acc"} <= by_key.keys()
    assert len((tmp_path / f"{CLOZE}.jsonl").read_text().splitlines()) == 20 and len(result.samples["cloze"]) == 12


def test_every_item_is_stored_and_gives_the_scores_and_intervals(um3_lm, documents, benchmarks, tmp_path):
    result = language_scores(um3_lm, documents=documents, benchmarks=benchmarks, folder=tmp_path, **SMALL)
    items = [json.loads(line) for line in (tmp_path / "language_items.jsonl").read_text().splitlines()]
    by_key = {row.key: row for row in result.scores}
    for name in (*TASKS, CLOZE):
        of_task = [item for item in items if item["task"] == name]
        row, accuracies = by_key[f"{name}/acc"], [item["acc"] for item in of_task]
        for item in of_task:
            choice = max(range(len(item["log_likelihoods"])), key=item["log_likelihoods"].__getitem__)
            # WinoGrande's answer is the context's number, which lm-eval does not return.
            assert name == "winogrande" or float(choice == item["answer"]) == item["acc"]
        assert row.value == pytest.approx(sum(accuracies) / len(accuracies)) and row.n == len(of_task)
        assert (row.low, row.high) == bootstrap(accuracies)
    prose = [item for item in items if item["task"] == PROSE]
    bits = -sum(item["log_likelihood"] for item in prose) / math.log(2) / sum(item["bytes"] for item in prose)
    assert by_key["um3_prose/bits_per_byte"].value == pytest.approx(bits)
    prompt = {"context": "Question: 0 Open a jar\nAnswer:", "continuation": " Turn its lid."}
    assert result.samples["prompts"]["piqa"] == prompt


def test_the_protocol_identifies_the_scored_items_not_the_file(um3_lm, bench, tmp_path):
    def piqa(text, *, file="piqa.jsonl", limit=None):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / file).write_text(text)
        with TemporaryDirectory() as cache:
            tasks = open_benchmarks(folder, folder=cache)
            options = {"config": LanguageConfig(limit=limit), "folder": tmp_path, "seed": 0}
            result = language_scores(um3_lm, documents=[], benchmarks=tasks, **options)
        return next(row for row in result.scores if row.key == "piqa/acc")

    text = (bench / FILES["piqa"]).read_text()
    whole, first = piqa(text), piqa(text, limit=5)
    assert whole.protocol_hash == piqa(text, file="piqa_val_2.jsonl", limit=12).protocol_hash
    assert (first.n, first.skipped) == (5, 7) and first.protocol_hash != whole.protocol_hash
    assert piqa(text.replace('"label": 0', '"label": 1', 1)).protocol_hash != whole.protocol_hash


def test_a_model_that_knows_the_text_solves_the_cloze(um3_lm, documents, tmp_path, monkeypatch):
    """With the highest log-probability for every answer, every item counts as right."""

    def knowing(self, requests, disable_tqdm=True):
        texts = [" ".join(text.split()) for text in documents]
        return [(float(any(c + t in text for text in texts)), False) for c, t in (r.args for r in requests)]

    monkeypatch.setattr(UM3LM, "loglikelihood", knowing)
    result = language_scores(um3_lm, documents=documents, benchmarks={}, folder=tmp_path, **SMALL)
    row = next(row for row in result.scores if row.key == "um3_prose_cloze/acc")
    assert row.value == 1 and row.low is None and all(s["right"] for s in result.samples["cloze"])


def evaluate(model, out, *more, bench):
    main([f"model={model}", f"output_dir={out}", "parts=[language]", f"language.benchmarks={bench}", *more])
    return {row.key: row for row in read_scores(Path(out) / "language.json")}


def test_any_model_folder_is_evaluated_without_a_run(um3_folder, exported, llama, bench, tmp_path, capsys):
    rows = {
        name: evaluate(folder, tmp_path / name / "eval", bench=bench)
        for name, folder in (("um3", um3_folder), ("plain", exported), ("llama", llama))
    }
    for key in ("arc_challenge/acc_norm", "hellaswag/acc", "piqa/acc", "social_iqa/acc", "winogrande/acc"):
        um3, plain, other = (rows[name][key] for name in ("um3", "plain", "llama"))
        assert um3.n == other.n == 12 and um3.value == plain.value and um3.protocol_hash == other.protocol_hash
    assert "TEXT" in rows["llama"]["um3_prose/bits_per_byte"].note
    capsys.readouterr()
    evaluate(llama, tmp_path / "llama" / "eval", bench=bench)
    assert "is up to date" in capsys.readouterr().out


def test_a_killed_evaluation_resumes_to_the_same_bits(um3_folder, bench, tmp_path, monkeypatch, capfd):
    original, calls = lm.UM3LM._loglikelihood_tokens, []

    def scoring(self, requests, disable_tqdm=True, **options):
        calls.append(len(requests))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(self, requests, disable_tqdm, **options)

    monkeypatch.setattr(lm, "CHUNK", 16)
    monkeypatch.setattr(lm.UM3LM, "_loglikelihood_tokens", scoring)
    stop_at = 0
    whole = evaluate(um3_folder, tmp_path / "whole", bench=bench)
    total, items = len(calls), (tmp_path / "whole" / "language_items.jsonl").read_text()
    calls.clear()
    stop_at = total // 2
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(um3_folder, out, bench=bench)
    with (out / "language.cache.jsonl").open("a") as file:
        file.write('\n{"protocol": "cut short by the ki')
    calls.clear()
    stop_at = 0
    capfd.readouterr()
    assert evaluate(um3_folder, out, bench=bench) == whole
    assert len(calls) == total - (total // 2 - 1) and "scoring" in capfd.readouterr().err
    assert (out / "language_items.jsonl").read_text() == items and not (out / "language.cache.jsonl").exists()


@pytest.mark.slow
def test_broken_models_are_one_line_errors(qlip_folder, um3_folder, bench, tmp_path, monkeypatch):
    def error_of(model):
        with pytest.raises(UserError) as caught:
            evaluate(model, tmp_path / "out", bench=bench)
        assert str(model) in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for model in (tmp_path / "empty", "nobody/nothing-of-the-kind", "no?such*name", qlip_folder):
        assert "language model" in error_of(model)
    cut = shutil.copytree(um3_folder, tmp_path / "cut")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cut / name).unlink()
    assert "no text tokenizer" in error_of(cut)


def test_broken_data_of_a_task_are_reported_by_every_run_after_the_other_tasks(llama, bench, tmp_path):
    folder = shutil.copytree(bench, tmp_path / "bench")
    with (folder / FILES["winogrande"]).open("a") as file:
        file.write("cut in ha")
    for _ in range(2):
        with pytest.raises(UserError, match=r"winogrande.*:13 is not a JSON object"):
            evaluate(llama, tmp_path / "out", bench=folder)
    rows = json.loads((tmp_path / "out/language.json").read_text())["scores"]
    values = {f"{row['task']}/{row['metric']}": row["value"] for row in rows}
    assert values["winogrande/acc"] is None and values["piqa/acc"] is not None
