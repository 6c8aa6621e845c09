import json
import math
import shutil
from pathlib import Path

import pytest
from language_items import FILES

from eval import lm
from eval.journal import Journal
from eval.lm import UM3LM
from eval.run import main
from eval.scores import bootstrap, read_scores
from eval.tasks.language import language_scores
from eval.tasks.lm_eval_data import TASKS
from eval.tasks.prose_tasks import CLOZE, PROSE, cloze_items, split_sentences
from um3.core.errors import UserError


def test_cloze_items_are_deterministic_and_hide_no_answer(documents):
    items = cloze_items(documents, num_items=30, seed=0)
    assert items == cloze_items(documents, num_items=30, seed=0) != cloze_items(documents, num_items=30, seed=1)
    assert len(items) == 30 and {item.label for item in items} == {0, 1, 2, 3}
    for item in items:
        assert len(set(item.choices)) == 4
        home = [text for text in documents if f"{item.context} {item.choices[item.label]}" in text]
        assert home, "the answer does not follow its context anywhere"
        lengths = [abs(len(choice) - len(item.choices[item.label])) for choice in item.choices]
        assert max(lengths) < 20


def test_sentences_keep_every_character():
    text = 'He said "No." Then he left! "Why?" asked Anna. It was e.g. late.'
    parts = split_sentences(text)
    assert parts == ['He said "No."', "Then he left!", '"Why?" asked Anna.', "It was e.g. late."]
    assert " ".join(parts) == text


def test_too_little_text_is_a_one_line_error():
    with pytest.raises(UserError, match="too few or too short"):
        cloze_items(["Short. Text."], num_items=5, seed=0)


def test_all_rows_are_there_and_absent_tasks_say_how_to_get_them(um3_lm, documents, tmp_path):
    result = language_scores(um3_lm, documents=documents, folder=tmp_path, seed=0, num_items=20)
    by_key = {row.key: row for row in result.scores}
    assert by_key["um3_prose_cloze/acc"].n == 20
    assert 0 <= by_key["um3_prose_cloze/acc"].value <= 1
    bits = by_key["um3_prose/bits_per_byte"]
    assert 0 < bits.low < bits.value < bits.high
    absent = by_key["hellaswag/acc"]
    assert absent.value is None and "LM_EVAL_DATA" in absent.note and absent.paper == 0.4535
    assert {"arc_challenge/acc_norm", "piqa/acc", "social_iqa/acc", "winogrande/acc"} <= by_key.keys()
    assert len((tmp_path / f"{CLOZE}.jsonl").read_text().splitlines()) == 20
    right = sum(sample["right"] for sample in result.cloze)
    assert len(result.cloze) == 12 and 0 <= right <= 12


def test_every_item_is_kept_and_gives_the_scores_and_their_intervals(um3_lm, documents, bench, tmp_path):
    result = language_scores(um3_lm, documents=documents, folder=tmp_path, seed=0, num_items=20, benchmarks=bench)
    items = [json.loads(line) for line in (tmp_path / "language_items.jsonl").read_text().splitlines()]
    by_key = {row.key: row for row in result.scores}
    for name in (*TASKS, CLOZE):
        own = [item for item in items if item["task"] == name]
        row = by_key[f"{name}/acc"]
        chosen = [max(range(len(each)), key=each.__getitem__) for each in (item["log_likelihoods"] for item in own)]
        hits = [float(choice == item["answer"]) for choice, item in zip(chosen, own, strict=True)]
        if name != "winogrande":  # there lm-eval's answer is the continuation's number among the contexts
            assert hits == [item["acc"] for item in own]
        assert row.value == pytest.approx(sum(item["acc"] for item in own) / len(own)) and row.n == len(own)
        assert (row.low, row.high) == bootstrap([item["acc"] for item in own])
    prose = [item for item in items if item["task"] == PROSE]
    bits = -sum(item["log_likelihood"] for item in prose) / math.log(2) / sum(item["bytes"] for item in prose)
    assert by_key["um3_prose/bits_per_byte"].value == pytest.approx(bits)
    assert result.prompts["piqa"] == {"context": "Question: 0 Open a jar\nAnswer:", "continuation": " Turn its lid."}


def test_the_protocol_is_the_items_scored_not_the_files_name(um3_lm, bench, tmp_path):
    def piqa(folder, **options):
        rows = language_scores(um3_lm, documents=[], folder=tmp_path, seed=0, benchmarks=folder, **options).scores
        return next(row for row in rows if row.key == "piqa/acc")

    copy, text = tmp_path / "copy", (bench / FILES["piqa"]).read_text()
    bench = tmp_path / "bench"
    for folder in (copy, bench):
        folder.mkdir()
    (bench / FILES["piqa"]).write_text(text)
    (copy / "piqa.jsonl").write_text(text)
    assert piqa(copy).protocol_hash == piqa(bench).protocol_hash
    assert piqa(copy, limit=12).protocol_hash == piqa(bench).protocol_hash
    first = piqa(bench, limit=5)
    assert (first.n, first.skipped) == (5, 7) and first.protocol_hash != piqa(bench).protocol_hash
    (copy / "piqa.jsonl").write_text(text.replace('"label": 0', '"label": 1', 1))
    assert piqa(copy).protocol_hash != piqa(bench).protocol_hash


def test_a_model_that_knows_the_text_solves_the_cloze(um3_lm, documents, tmp_path, monkeypatch):
    """The answer's log-probability is made the highest: the task must then count every item as right."""

    def knowing(self, requests, disable_tqdm=True):
        texts = [" ".join(text.split()) for text in documents]
        return [(float(any(c + t in text for text in texts)), False) for c, t in (r.args for r in requests)]

    monkeypatch.setattr(UM3LM, "loglikelihood", knowing)
    result = language_scores(um3_lm, documents=documents, folder=tmp_path, seed=0, num_items=20)
    row = next(row for row in result.scores if row.key == "um3_prose_cloze/acc")
    assert row.value == 1 and row.low is None and all(s["right"] for s in result.cloze)


def evaluate(model, out, *more, bench):
    main([f"model={model}", f"output_dir={out}", "parts=[language]", f"language.benchmarks={bench}", *more])
    return {row.key: row for row in read_scores(Path(out) / "language.json")}


def test_any_model_folder_is_evaluated_without_a_run(um3_folder, exported, llama, bench, tmp_path, capsys):
    found = {
        name: evaluate(folder, tmp_path / name / "eval", bench=bench)
        for name, folder in (("um3", um3_folder), ("plain", exported), ("llama", llama))
    }
    for key in ("arc_challenge/acc_norm", "hellaswag/acc", "piqa/acc", "social_iqa/acc", "winogrande/acc"):
        um3, plain, other = (found[name][key] for name in ("um3", "plain", "llama"))
        assert um3.n == other.n == 12 and um3.value == plain.value and um3.protocol_hash == other.protocol_hash
    assert "no held-out text" in found["llama"]["um3_prose/bits_per_byte"].note
    capsys.readouterr()
    evaluate(llama, tmp_path / "llama" / "eval", bench=bench)
    assert "is up to date" in capsys.readouterr().out


def test_a_killed_evaluation_goes_on_where_it_was_to_the_same_bits(um3_folder, bench, tmp_path, monkeypatch, capfd):
    class Killed(BaseException):
        pass

    calls = []

    def scoring(self, requests, disable_tqdm=True, **options):
        calls.append(len(requests))
        if len(calls) == stop_at:
            raise Killed
        return original(self, requests, disable_tqdm, **options)

    original = lm.UM3LM._loglikelihood_tokens
    monkeypatch.setattr(lm, "CHUNK", 16)
    monkeypatch.setattr(lm.UM3LM, "_loglikelihood_tokens", scoring)
    stop_at = 0
    whole = evaluate(um3_folder, tmp_path / "whole", bench=bench)
    total, items = len(calls), (tmp_path / "whole" / "language_items.jsonl").read_text()
    calls.clear()
    stop_at = total // 2
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        evaluate(um3_folder, out, bench=bench)
    with (out / "language.journal").open("a") as file:
        file.write('{"key": "cut short by the ki')
    calls.clear()
    stop_at = 0
    capfd.readouterr()
    assert evaluate(um3_folder, out, bench=bench) == whole
    assert len(calls) == total - (total // 2 - 1) and "scoring" in capfd.readouterr().err
    assert (out / "language_items.jsonl").read_text() == items and not (out / "language.journal").exists()


def test_the_journal_of_another_request_is_begun_anew(tmp_path):
    journal = Journal(tmp_path / "a", request="one")
    key = journal.key("choices", [("a", "b")])
    assert key not in journal and key != journal.key("documents", [("a", "b")])
    journal.add(key, [[0.1 + 0.2, True]])
    assert Journal(tmp_path / "a", request="one")[key] == [[0.1 + 0.2, True]]
    assert key not in Journal(tmp_path / "a", request="two")
    assert key not in Journal(tmp_path / "a", request="one")
    (tmp_path / "a").write_bytes(b"\xff\n")
    assert key not in Journal(tmp_path / "a", request="one")


def test_models_that_are_none_are_one_line_errors(qlip_folder, um3_folder, bench, tmp_path, monkeypatch):
    def said(model):
        with pytest.raises(UserError) as caught:
            evaluate(model, tmp_path / "out", bench=bench)
        assert str(model) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in said(tmp_path / "empty")
    assert "no folder, and no hub id that can be reached" in said("nobody/nothing-of-the-kind")
    assert "is no folder" in said("no?such*name")
    assert "no language model can be loaded" in said(qlip_folder)
    cut = tmp_path / "cut"
    shutil.copytree(um3_folder, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "no language model can be loaded" in said(cut)
    config = json.loads((um3_folder / "config.json").read_text())
    (cut / "model.safetensors").write_bytes(weights)
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "no language model can be loaded" in said(cut)
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    assert "do not fit its config.json (model.layers.1." in said(cut)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cut / name).unlink()
    (cut / "config.json").write_text(json.dumps(config))
    assert "no text tokenizer" in said(cut)


def test_data_that_cannot_be_read_are_found_before_a_model_is_loaded(llama, bench, tmp_path, monkeypatch):
    folder = shutil.copytree(bench, tmp_path / "bench")
    with (folder / FILES["winogrande"]).open("a") as file:
        file.write("cut in ha")
    monkeypatch.setattr(lm, "load_language_model", lambda path: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="line 13, is not JSON"):
        evaluate(llama, tmp_path / "out", bench=folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("language.limit=0", "language.limit is 0; it must be at least 1"),
        ("language.limit=-3", "language.limit is -3"),
        ("language.batch_size=0", "1 or more in a batch"),
        ("language.benchmarks=nowhere", "the folder of language benchmarks, nowhere, does not exist"),
    ],
)
def test_settings_out_of_range_are_one_line_errors(override, message, um3_folder, bench, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(um3_folder, tmp_path, override, bench=bench)
    with pytest.raises(UserError, match="where are the results to go"):
        main([f"model={um3_folder}", "parts=[language]"])
