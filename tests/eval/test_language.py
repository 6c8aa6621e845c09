import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors

from eval.language import language_scores, run_tasks
from eval.language_tasks import CLOZE, cloze_items, find_benchmarks, hub_task, split_sentences
from um3.core.errors import UserError
from um3.text_tokenizer import encode_texts

BENCH = Path(__file__).parents[3] / "shared/data/bench"
PAIRS = [("Anna walked slowly", " through the old harbour."), ("", "Bela wrote a letter."), ("Carl ", "left early.")]


def requests(pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.fixture(scope="module")
def um3_lm(pipeline):
    from eval.lm import UM3LM

    return UM3LM.of(pipeline, batch_size=2)


def test_equals_lm_evals_own_backend_without_a_visual_part(pipeline, um3_lm, tmp_path):
    """The same text rows in a stock Llama-like model, read by lm-eval's `hf` with a tokenizer that adds bos."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pipeline.model.save_pretrained(tmp_path)
    pipeline.text_tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    num_text = pipeline.ids.text_vocab_size
    model.resize_token_embeddings(num_text, mean_resizing=False)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    bos = plain.bos_token
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, plain.bos_token_id)]
    )
    reference = HFLM(model, tokenizer=plain, batch_size=2, softmax_dtype="float32")
    expected = reference.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = um3_lm.loglikelihood(requests(PAIRS))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_log_likelihood_by_hand_over_text_ids_only(pipeline, um3_lm):
    context, continuation = PAIRS[0]
    ids, model = pipeline.ids, pipeline.model
    whole = [ids.bos_id, *encode_texts([context + continuation], tokenizer=pipeline.text_tokenizer)[0]]
    start = 1 + len(encode_texts([context], tokenizer=pipeline.text_tokenizer)[0])
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0]
    targets = torch.tensor(whole[start:])[:, None]
    halves = logits[start - 1 : -1, : ids.text_vocab_size].log_softmax(-1).gather(1, targets).sum()
    joint = logits[start - 1 : -1].log_softmax(-1).gather(1, targets).sum()
    ((found, _),) = um3_lm.loglikelihood(requests([PAIRS[0]]))
    assert found == pytest.approx(float(halves), abs=1e-4)
    assert abs(float(joint - halves)) > 0.1, "this model gives visual ids no weight, so the test shows nothing"


def test_visual_rows_have_no_say(pipeline, um3_lm):
    before = um3_lm.loglikelihood(requests(PAIRS))
    head = pipeline.model.lm_head.weight.data
    kept = head.clone()
    try:
        head[pipeline.ids.text_vocab_size :] += 100
        assert um3_lm.loglikelihood(requests(PAIRS)) == before
    finally:
        head.copy_(kept)


def test_rolling_likelihood_of_a_document_counts_every_token_once(pipeline, um3_lm):
    text = "Anna walked slowly. " * 20
    tokens = encode_texts([text], tokenizer=pipeline.text_tokenizer)[0]
    assert len(tokens) < um3_lm.max_length
    (rolling,) = um3_lm.loglikelihood_rolling(requests([(text,)]))
    ((whole, _),) = um3_lm.loglikelihood(requests([("", text)]))
    assert rolling == pytest.approx(whole, rel=1e-5)


def test_a_continuation_longer_than_the_window_is_scored_piece_by_piece(pipeline):
    from eval.lm import UM3LM

    short, text = UM3LM.of(pipeline, batch_size=2, max_tokens=16), " ".join(["Anna had never seen the upper room."] * 6)
    tokens = encode_texts([text], tokenizer=pipeline.text_tokenizer)[0]
    assert len(tokens) > 2 * short.max_length
    ((found, _),) = short.loglikelihood(requests([("", text)]))
    whole, expected = [pipeline.ids.bos_id, *tokens], 0.0
    for start in range(1, len(whole), 8):  # half a window is scored with the other half, or less, before it
        end = min(start + 8, len(whole))
        window = whole[max(0, end - 17) : end - 1]
        with torch.no_grad():
            logits = pipeline.model(torch.tensor([window])).logits[0, start - end :, : pipeline.ids.text_vocab_size]
        expected += float(logits.log_softmax(-1).gather(1, torch.tensor(whole[start:end])[:, None]).sum())
    assert found == pytest.approx(expected, rel=1e-4)


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


def test_all_rows_are_there_and_absent_tasks_say_how_to_get_them(pipeline, documents, tmp_path):
    rows, samples = language_scores(pipeline, documents=documents, folder=tmp_path, seed=0, num_items=20)
    by_key = {row.key: row for row in rows}
    assert by_key["um3_prose_cloze/acc"].n == 20
    assert 0 <= by_key["um3_prose_cloze/acc"].value <= 1
    assert by_key["um3_prose/bits_per_byte"].value > 0
    absent = by_key["hellaswag/acc"]
    assert absent.value is None and "LM_EVAL_DATA" in absent.note and absent.paper == 0.4535
    assert {"arc_challenge/acc_norm", "piqa/acc", "social_iqa/acc", "winogrande/acc"} <= by_key.keys()
    assert len((tmp_path / f"{CLOZE}.jsonl").read_text().splitlines()) == 20
    right = sum(sample["right"] for sample in samples)
    assert len(samples) == 12 and 0 <= right <= 12


def test_a_model_that_knows_the_text_solves_the_cloze(pipeline, documents, tmp_path, monkeypatch):
    """The answer's log-probability is made the highest: the task must then count every item as right."""
    from eval.lm import UM3LM

    def knowing(self, requests, disable_tqdm=True):
        texts = [" ".join(text.split()) for text in documents]
        return [(float(any(c + t in text for text in texts)), False) for c, t in (r.args for r in requests)]

    monkeypatch.setattr(UM3LM, "loglikelihood", knowing)
    rows, samples = language_scores(pipeline, documents=documents, folder=tmp_path, seed=0, num_items=20)
    assert {row.key: row.value for row in rows}["um3_prose_cloze/acc"] == 1 and all(s["right"] for s in samples)


@pytest.mark.skipif(not BENCH.is_dir(), reason="no local benchmark files")
def test_the_papers_tasks_run_from_local_files(pipeline, tmp_path):
    found = find_benchmarks(BENCH)
    assert set(found) == {"arc_challenge", "hellaswag", "piqa", "winogrande"}
    assert found["arc_challenge"].name == "arc-challenge_test.jsonl"
    tasks = [hub_task(name, path=path, cache=tmp_path) for name, path in found.items()]
    results = run_tasks(pipeline, tasks=tasks, batch_size=16, limit=4)
    for name in found:
        assert 0 <= results["results"][name]["acc,none"] <= 1
        assert results["n-samples"][name]["effective"] == 4
    first = json.loads(found["piqa"].read_text().splitlines()[0])
    sample = next(s for s in results["samples"]["piqa"] if s["doc_id"] == 0)
    assert sample["arguments"][0][0] == f"Question: {first['goal']}\nAnswer:"


@pytest.mark.skipif(not BENCH.is_dir(), reason="no local benchmark files")
def test_a_hub_like_folder_is_found_and_read(pipeline, tmp_path):
    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    shutil.copy(BENCH / "piqa_valid.jsonl", folder / "validation.jsonl")
    found = find_benchmarks(tmp_path)
    assert found == {"piqa": folder}
    results = run_tasks(pipeline, tasks=[hub_task("piqa", path=folder, cache=tmp_path)], batch_size=8, limit=2)
    assert results["n-samples"]["piqa"]["effective"] == 2


def test_benchmark_folders_with_problems_are_one_line_errors(pipeline, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_benchmarks(tmp_path / "none")
    for name in ("piqa_a.jsonl", "piqa_b.jsonl"):
        (tmp_path / name).write_text('{"goal": "x"}\n')
    with pytest.raises(UserError, match="several files for piqa"):
        find_benchmarks(tmp_path)
    (tmp_path / "piqa_b.jsonl").unlink()
    with pytest.raises(UserError, match="the data of task piqa cannot be read"):
        run_tasks(pipeline, tasks=[hub_task("piqa", path=tmp_path / "piqa_a.jsonl", cache=tmp_path)], batch_size=2)
