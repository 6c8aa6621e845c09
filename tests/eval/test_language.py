import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.benchmarks import TASKS, find_benchmarks, local_benchmarks
from eval.journal import Journal
from eval.language import language_scores, run_tasks
from eval.language_tasks import CLOZE, PROSE, cloze_items, split_sentences
from eval.run import main
from eval.scores import bootstrap, read_scores
from um3.core.errors import UserError
from um3.export import export_text_half
from um3.extend import extend_model, load_base, load_base_tokenizer
from um3.model import save_model
from um3.text_tokenizer import encode_texts, make_id_space

BENCH = Path(__file__).parents[3] / "shared/data/bench"
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason="no local benchmark files")
PAIRS = [("Anna walked slowly", " through the old harbour."), ("", "Bela wrote a letter."), ("Carl ", "left early.")]
# One item of each task, as the hub's copies have it; repeated where a test needs more.
ITEMS = {
    "arc_challenge": {
        "question": "Which is a planet?",
        "choices": {"text": ["Mars", "Sirius", "Halley"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    "hellaswag": {
        "activity_label": "Sewing",
        "ctx_a": "Dora threads a needle.",
        "ctx_b": "she",
        "endings": ["sews a button.", "paints [title] a wall.", "flies.", "eats it."],
        "label": "0",
    },
    "piqa": {"goal": "Open a jar", "sol1": "Turn its lid.", "sol2": "Turn its bottom inside out.", "label": 0},
    "social_iqa": {
        "context": "Emil gave Flora a book.",
        "question": "What will Flora do?",
        "answerA": "read it",
        "answerB": "boil it",
        "answerC": "drive it",
        "label": "1",
    },
    "winogrande": {
        "sentence": "Anna thanked Dora, since _ had helped.",
        "option1": "Anna",
        "option2": "Dora",
        "answer": "2",
    },
}
FILES = {name: f"{name}_{task.split}.jsonl" for name, task in TASKS.items()}


def requests(pairs, kind="loglikelihood"):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("task", index, 1))
        for index, pair in enumerate(pairs)
    ]


def of(pipeline, **options):
    from eval.lm import UM3LM

    return UM3LM.of(pipeline.model, tokenizer=pipeline.text_tokenizer, **{"batch_size": 2} | options)


@pytest.fixture(scope="module")
def um3_lm(pipeline):
    return of(pipeline)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with small local copies of all five tasks, twelve different items each."""
    folder = tmp_path_factory.mktemp("bench")
    for name, item in ITEMS.items():
        text = next(key for key, value in item.items() if isinstance(value, str))
        items = [item | {text: f"{number} {item[text]}"} for number in range(12)]
        (folder / FILES[name]).write_text("".join(json.dumps(each) + "\n" for each in items))
    return folder


@pytest.fixture(scope="module")
def exported(um3_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "plain"
    export_text_half(um3_folder, out=folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory, documents):
    """A plain Llama that was never a UM3, with a tokenizer that adds bos and knows no image marks, as Llama 3's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer=trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, bos_token_id=0, eos_token_id=1, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock(folder, **options):
    """lm-eval's own backend, as its command line makes it."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", batch_size=2, **options)


def pairs_of(bench):
    """Every context and continuation of the five tasks."""
    from eval.benchmarks import paper_tasks

    with local_benchmarks(bench) as found:
        tasks = paper_tasks().load(sorted(found))["tasks"]
    for task in tasks.values():
        task.build_all_requests()
    return [instance.args for task in tasks.values() for instance in task.instances]


def largest_difference(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    return max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True))


def test_a_um3_gets_what_lm_evals_hf_gives_its_export(um3_lm, exported, bench):
    pairs = [*pairs_of(bench), *PAIRS]
    assert len(pairs) > 150
    expected = stock(exported).loglikelihood(requests(pairs), disable_tqdm=True)
    assert largest_difference(um3_lm.loglikelihood(requests(pairs)), expected) < 2e-5


def test_the_five_tasks_give_the_same_accuracies_under_both(um3_lm, exported, bench):
    from lm_eval import simple_evaluate

    from eval.benchmarks import paper_tasks

    with local_benchmarks(bench):
        ours = run_tasks(um3_lm, tasks=list(TASKS))["results"]
        theirs = simple_evaluate(
            stock(exported), tasks=list(TASKS), task_manager=paper_tasks(), bootstrap_iters=0, log_samples=False
        )["results"]
    for name in TASKS:
        for metric in ("acc,none", "acc_norm,none"):
            assert ours[name].get(metric) == theirs[name].get(metric)


def test_any_other_model_gets_exactly_what_hf_gives_it(llama, bench):
    from eval.lm import UM3LM, load_language_model

    model, tokenizer = load_language_model(str(llama))
    pairs = [*pairs_of(bench), *PAIRS]
    expected = stock(llama).loglikelihood(requests(pairs), disable_tqdm=True)
    found = UM3LM.of(model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests(pairs))
    assert largest_difference(found, expected) < 1e-5
    by_name = UM3LM(str(llama), device="cpu", batch_size=2).loglikelihood(requests(pairs))
    assert largest_difference(by_name, expected) < 1e-5


def test_a_um3_made_from_a_llama_gets_what_hf_gives_that_llama(llama, qlip_folder, bench, tmp_path):
    """Neither the visual rows nor the image marks, whose rows are means of the words' here, take a share."""
    from eval.lm import UM3LM

    tokenizer, entries = load_base_tokenizer(str(llama))
    ids = make_id_space(tokenizer, slots=2, bits_per_slot=4, num_patches=16)
    assert ids.text_vocab_size > entries
    model = extend_model(load_base(str(llama)), ids=ids, qk_norm=False, base_entries=entries)
    save_model(tmp_path / "um3", model=model, text_tokenizer=tokenizer, ids=ids, qlip_folder=qlip_folder)
    export_text_half(tmp_path / "um3", out=tmp_path / "plain")
    pairs = [*pairs_of(bench), *PAIRS]
    found = UM3LM(str(tmp_path / "um3"), device="cpu", batch_size=2).loglikelihood(requests(pairs))
    for folder in (llama, tmp_path / "plain"):
        assert largest_difference(found, stock(folder).loglikelihood(requests(pairs), disable_tqdm=True)) < 2e-5


def test_hf_on_a_um3_itself_loses_the_visual_halfs_share(pipeline, um3_lm, um3_folder):
    """What hf gives is ours and the log of the text half's share of the softmax at every scored position."""
    ids, model = pipeline.ids, pipeline.model
    hf = stock(um3_folder, add_bos_token=True).loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (value, _), (ours, _), (context, continuation) in zip(
        hf, um3_lm.loglikelihood(requests(PAIRS)), PAIRS, strict=True
    ):
        whole = [ids.bos_id, *encode_texts([context + continuation], tokenizer=pipeline.text_tokenizer)[0]]
        start = 1 + len(encode_texts([context.rstrip()], tokenizer=pipeline.text_tokenizer)[0]) if context else 1
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, start - 1 : -1]
        share = logits[:, : ids.text_vocab_size].logsumexp(-1) - logits.logsumexp(-1)
        assert value == pytest.approx(ours + float(share.sum()), abs=1e-4) and float(share.sum()) < -0.1


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


def test_what_is_written_is_text_and_what_hf_writes_with_the_export(pipeline, exported):
    pairs = [(context, {"max_gen_toks": 12, "until": ["\n\n"]}) for context, _ in PAIRS if context]
    expected = stock(exported).generate_until(requests(pairs, "generate_until"), disable_tqdm=True)
    head = pipeline.model.lm_head.weight.data
    kept = head.clone()
    try:
        head[pipeline.ids.text_vocab_size :] += 100
        assert of(pipeline).generate_until(requests(pairs, "generate_until"), disable_tqdm=True) == expected
    finally:
        head.copy_(kept)
    assert all(expected)


def test_rolling_likelihood_of_a_document_counts_every_token_once(pipeline, um3_lm):
    text = "Anna walked slowly. " * 20
    tokens = encode_texts([text], tokenizer=pipeline.text_tokenizer)[0]
    assert len(tokens) < um3_lm.max_length
    (rolling,) = um3_lm.loglikelihood_rolling(requests([(text,)]))
    ((whole, _),) = um3_lm.loglikelihood(requests([("", text)]))
    assert rolling == pytest.approx(whole, rel=1e-5)


def test_a_continuation_longer_than_the_window_is_scored_piece_by_piece(pipeline):
    short, text = of(pipeline, max_tokens=16), " ".join(["Anna had never seen the upper room."] * 6)
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
    from eval.lm import UM3LM

    def knowing(self, requests, disable_tqdm=True):
        texts = [" ".join(text.split()) for text in documents]
        return [(float(any(c + t in text for text in texts)), False) for c, t in (r.args for r in requests)]

    monkeypatch.setattr(UM3LM, "loglikelihood", knowing)
    result = language_scores(um3_lm, documents=documents, folder=tmp_path, seed=0, num_items=20)
    row = next(row for row in result.scores if row.key == "um3_prose_cloze/acc")
    assert row.value == 1 and row.low is None and all(s["right"] for s in result.cloze)


@needs_bench
def test_the_papers_tasks_run_from_local_files(um3_lm):
    with local_benchmarks(BENCH) as found:
        assert set(found) == {"arc_challenge", "hellaswag", "piqa", "winogrande"}
        assert found["arc_challenge"].name == "arc-challenge_test.jsonl"
        results = run_tasks(um3_lm, tasks=list(found), limit=4)
    for name in found:
        assert 0 <= results["results"][name]["acc,none"] <= 1
        assert results["n-samples"][name]["effective"] == 4
    first = json.loads(found["piqa"].read_text().splitlines()[0])
    sample = next(s for s in results["samples"]["piqa"] if s["doc_id"] == 0)
    assert sample["arguments"][0][0] == f"Question: {first['goal']}\nAnswer:"


def test_the_tasks_are_lm_evals_own_to_the_last_setting(bench):
    """Only the data come from elsewhere: the configuration that lm-eval reports is that of its YAML."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    from eval.benchmarks import paper_tasks

    with local_benchmarks(bench):
        tasks = paper_tasks().load(list(TASKS))["tasks"]
    files = {path.stem: path for path in (Path(lm_eval.tasks.__file__).parent / "arc").glob("*.yaml")}
    assert load_yaml(files["arc_challenge"])["dataset_path"] == "allenai/ai2_arc"
    for name, task in tasks.items():
        config = task.config
        assert (config.dataset_path, config.dataset_name) == (TASKS[name].hub_name, TASKS[name].hub_config)
        assert config.dataset_kwargs is None and config.custom_dataset is None and config.training_split == "train"


def test_a_hub_like_folder_serves_any_task_and_load_dataset_is_put_back(bench, tmp_path):
    import datasets

    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    shutil.copy(bench / FILES["piqa"], folder / "validation.jsonl")
    (tmp_path / "some" / "other").mkdir(parents=True)
    (tmp_path / "some" / "other" / "test.jsonl").write_text('{"a": 1}\n')
    original = datasets.load_dataset
    with local_benchmarks(tmp_path) as found:
        assert found == {"piqa": folder}
        assert len(datasets.load_dataset("baber/piqa")["validation"]) == 12
        assert datasets.load_dataset("some/other")["test"][0] == {"a": 1}
    assert datasets.load_dataset is original


def test_training_items_beside_them_are_for_few_shots(um3_lm, bench, tmp_path):
    from lm_eval import simple_evaluate

    from eval.benchmarks import paper_tasks

    shutil.copy(bench / FILES["piqa"], tmp_path / "piqa_valid.jsonl")
    (tmp_path / "piqa_train.jsonl").write_text(2 * changed("piqa", goal="Close a jar"))
    with local_benchmarks(tmp_path) as found:
        assert found == {"piqa": tmp_path / "piqa_valid.jsonl"}
        results = simple_evaluate(
            um3_lm, tasks=["piqa"], task_manager=paper_tasks(), num_fewshot=1, bootstrap_iters=0, limit=2
        )
    context = results["samples"]["piqa"][0]["arguments"][0][0]
    assert context.startswith("Question: Close a jar\nAnswer: Turn its lid.\n\nQuestion: ")


def changed(name, **changes):
    return json.dumps(ITEMS[name] | changes) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa", '{"goal": "x"}\n', "item 1, has no 'sol1': it is not the data of piqa"),
        ("piqa", changed("winogrande"), "has no 'goal': it is not the data of piqa"),
        ("winogrande", changed("piqa"), "has no 'sentence': it is not the data of winogrande"),
        ("piqa", changed("piqa") + "{half\n", "line 2, is not JSON"),
        ("piqa", changed("piqa") + changed("piqa", label=-1), "item 2: 'label' is '-1', not one of 0, 1"),
        ("hellaswag", changed("hellaswag", label=""), "'label' is '', not one of 0, 1, 2, 3"),
        ("arc_challenge", changed("arc_challenge", answerKey="E"), "'answerKey' is 'E', not one of A, B, C"),
        ("arc_challenge", changed("arc_challenge", choices="A or B"), "'answerKey' is 'A', not one of"),
        ("piqa", changed("piqa") + changed("piqa", goal=[1]), "are not alike"),
        ("piqa", "3\n", "has no 'goal'"),
        ("piqa", "\n", "holds no items of piqa"),
        ("piqa", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_benchmark_files_with_problems_are_one_line_errors(name, content, message, um3_lm, tmp_path):
    (tmp_path / FILES[name]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        language_scores(um3_lm, documents=[], folder=tmp_path / "out", seed=0, benchmarks=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_benchmark_folders_with_problems_are_one_line_errors(um3_lm, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_benchmarks(tmp_path / "none")
    with pytest.raises(UserError, match="holds none of the language benchmarks"):
        language_scores(um3_lm, documents=[], folder=tmp_path, seed=0, benchmarks=tmp_path)
    with pytest.raises(UserError, match="set LM_EVAL_DATA to a folder"):
        language_scores(um3_lm, documents=[], folder=tmp_path, seed=0)
    for name in ("piqa_a.jsonl", "piqa_b.jsonl"):
        (tmp_path / name).write_text(changed("piqa"))
    with pytest.raises(UserError, match="several files for piqa's validation split"):
        find_benchmarks(tmp_path)
    hub = tmp_path / "hub" / "baber" / "piqa"
    hub.mkdir(parents=True)
    (hub / "validation.parquet").write_bytes(b"PAR1 no more")
    with (
        pytest.raises(UserError, match="cannot be read as the hub's baber/piqa"),
        local_benchmarks(tmp_path / "hub"),
    ):
        run_tasks(um3_lm, tasks=["piqa"])


def evaluate(model, out, *more, bench):
    main([f"model={model}", f"out={out}", "parts=[language]", f"language.benchmarks={bench}", *more])
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
    from eval import lm

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


@pytest.fixture
def lm_eval_says(monkeypatch, bench, tmp_path, capsys):
    """lm-eval's command line as `python -m eval.lm` runs it: what it prints."""
    import lm_eval.tasks

    from eval import lm

    def said(*arguments):
        monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
        lm.main()
        return capsys.readouterr().out

    monkeypatch.setenv("LM_EVAL_DATA", str(bench))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager)  # put back afterwards
    return said


def test_lm_evals_own_command_line_reads_the_local_copies(um3_folder, exported, lm_eval_says):
    tables = []
    for model, folder in (("um3", um3_folder), ("hf", exported)):
        said = lm_eval_says("--model", model, "--model_args", f"pretrained={folder}", "--tasks", "piqa,social_iqa")
        tables.append([line for line in said.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1] and any("social_iqa" in line for line in tables[0])


def test_on_lm_evals_command_line_a_missing_folder_is_one_line(lm_eval_says, um3_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no language model can be loaded from"):
        lm_eval_says("--model", "um3", "--model_args", f"pretrained={tmp_path}/none", "--tasks", "piqa")
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match="the folder of language benchmarks"):
        lm_eval_says("--model", "um3", "--model_args", f"pretrained={um3_folder}", "--tasks", "piqa")


def test_as_a_program_a_missing_model_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "eval.lm", "--model", "um3", "--model_args", "pretrained=none", "--tasks", "piqa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no language model can be loaded from 'none'")


def test_lm_eval_finds_the_model_by_its_entry_point_when_it_has_plugins():
    import tomllib
    from importlib import import_module

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"]["um3"].split(":")
    from lm_eval.api.registry import get_model

    assert getattr(import_module(module), name) is get_model("um3")
