"""The VQA command: a tiny model answers every set once, and answer files are scored without a model."""

import json

import pytest

from eval.benchmarks.vqa import main
from eval.scores import read_scores
from eval.vqa.sets import SETS
from tests.eval.vqa.files import WRITERS
from tests.eval.vqa.test_models import save_chat
from um3.core.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("model") / "tiny-llava")


def scored(name, folder, *options):
    output = folder / "out" / f"vqa_{name}.json"
    main([f"set={name}", f"data={folder / 'data'}", f"output={output}", *options])
    return {row.metric: row for row in read_scores(output)}


@pytest.mark.parametrize("name", list(SETS))
def test_a_model_answers_every_set_once(name, model, tmp_path, capfd):
    perfect = WRITERS[name](tmp_path / "data")
    rows = scored(name, tmp_path, f"model={model}", "batch_size=2", "max_new_tokens=2")
    assert f"answer questions {len(perfect)}/{len(perfect)}" in capfd.readouterr().err
    out = tmp_path / "out"
    answers = [json.loads(line) for line in (out / f"vqa_{name}.answers.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (out / f"vqa_{name}.questions.jsonl").read_text().splitlines()]
    assert len(answers) == len(questions) == len(perfect) and answers[0]["model_id"] == "tiny-llava"
    assert answers[0]["prompt"] == questions[0]["text"] and len({row["answer_id"] for row in answers}) == len(answers)
    assert list((out / f"vqa_{name}.upload").iterdir())
    content = json.loads((out / f"vqa_{name}.json").read_text())
    assert content["pins"]["model_sha256"] and len(content["samples"]) == len(perfect)
    again = scored(name, tmp_path, f"model={model}", "max_new_tokens=2")
    assert {key: row.value for key, row in again.items()} == {key: row.value for key, row in rows.items()}
    assert "answer questions" not in capfd.readouterr().err, "a second run asks nothing"
    supplied = scored(name, tmp_path, f"answers={out / f'vqa_{name}.answers.jsonl'}")
    assert {key: row.value for key, row in supplied.items()} == {key: row.value for key, row in rows.items()}
    first = next(iter(rows.values()))
    assert (first.value is None) == (SETS[name].score is None or name == "mme")
    assert first.protocol["rule"] == SETS[name].rule and first.paper == SETS[name].paper.get(first.metric)
    assert name != "mm_vet" or "GPT-4" in first.note
    if first.value is not None:
        assert first.protocol_hash != next(iter(supplied.values())).protocol_hash


def test_missing_images_are_named_and_a_limit_is_another_protocol(model, tmp_path):
    WRITERS["gqa"](tmp_path / "data")
    whole = scored("gqa", tmp_path, f"model={model}", "max_new_tokens=1")["accuracy"]
    one = scored("gqa", tmp_path, f"model={model}", "max_new_tokens=1", "limit=1")["accuracy"]
    assert one.n == 1 and one.protocol_hash != whole.protocol_hash
    (tmp_path / "data" / "images" / "n2.png").unlink()
    row = scored("gqa", tmp_path, f"model={model}", "max_new_tokens=1")["accuracy"]
    assert (row.n, row.skipped) == (1, 1) and "missing image (1, such as 202" in row.note
    (tmp_path / "data" / "images" / "n1.jpg").unlink()
    row = scored("gqa", tmp_path, f"model={model}", "max_new_tokens=1")["accuracy"]
    assert row.value is None and "2 skipped" in row.note


@pytest.mark.parametrize("prompt", ["How much?\n{}\nAnswer.", "{}\nHow much?\nAnswer."])
def test_answers_with_ocr_are_scored_without_the_tokens(prompt, model, tmp_path):
    WRITERS["textvqa_ocr"](tmp_path / "data")
    (tmp_path / "data" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    row = {"question_id": "ab", "prompt": prompt.format("Reference OCR token: $5"), "text": "$5"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    row = scored("textvqa_ocr", tmp_path, f"answers={tmp_path / 'a.jsonl'}")["accuracy"]
    assert (row.value, row.n, row.skipped) == (1, 1, 2)
    with pytest.raises(UserError, match="Rosetta"):
        scored("textvqa_ocr", tmp_path, f"model={model}")
