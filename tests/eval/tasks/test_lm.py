"""UM3 as an lm-eval model against lm-eval's own, and lm-eval's command line."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from language_items import PAIRS, requests
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from eval import lm
from eval.lm import UM3LM, load_language_model
from um3.core.errors import UserError
from um3.model.export import export_text_half
from um3.model.extend import extend_model, load_base, load_base_tokenizer
from um3.model.language_model import save_model
from um3.model.text_tokenizer import encode_texts, make_vocabulary


def of(pipeline, **options):
    return UM3LM(pipeline.model, tokenizer=pipeline.text_tokenizer, **{"batch_size": 2} | options)


def stock(folder, **options):
    """lm-eval's own backend, as on its command line."""
    return HFLM(str(folder), device="cpu", batch_size=2, **options)


@pytest.fixture(scope="session")
def pairs(benchmarks):
    """Every context and continuation of the five tasks, and some more."""
    tasks = [task for loaded in benchmarks.values() for task in loaded["tasks"].values()]
    for task in tasks:
        task.build_all_requests()
    return [instance.args for task in tasks for instance in task.instances] + PAIRS


def largest_difference(scored, expected):
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    return max(abs(a - b) for (a, _), (b, _) in zip(scored, expected, strict=True))


def test_a_um3_gets_what_lm_evals_hf_gives_its_export(um3_lm, exported, pairs):
    assert len(pairs) > 150
    expected = stock(exported).loglikelihood(requests(pairs), disable_tqdm=True)
    assert largest_difference(um3_lm.loglikelihood(requests(pairs)), expected) < 2e-5


def test_any_other_model_gets_what_hf_gives_it(llama, pairs):
    model, tokenizer = load_language_model(str(llama))
    expected = stock(llama).loglikelihood(requests(pairs), disable_tqdm=True)
    loaded = UM3LM(model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests(pairs))
    assert largest_difference(loaded, expected) < 1e-5
    by_name = UM3LM(str(llama), device="cpu", batch_size=2).loglikelihood(requests(pairs))
    assert largest_difference(by_name, expected) < 1e-5


def test_a_um3_made_from_a_llama_gets_what_hf_gives_that_llama(llama, qlip_folder, pairs, tmp_path):
    """Neither visual ids nor the image tokens, whose embeddings are means of the words' here, take a share."""
    tokenizer, entries = load_base_tokenizer(str(llama))
    ids = make_vocabulary(tokenizer, subtokens=2, bits_per_subtoken=4, num_patches=16)
    assert ids.text_vocab_size > entries
    model = extend_model(load_base(str(llama)), ids=ids, base_entries=entries)
    save_model(tmp_path / "um3", model=model, text_tokenizer=tokenizer, ids=ids, visual_tokenizer=qlip_folder)
    export_text_half(tmp_path / "um3", out=tmp_path / "plain")
    scored = UM3LM(str(tmp_path / "um3"), device="cpu", batch_size=2).loglikelihood(requests(pairs))
    for folder in (llama, tmp_path / "plain"):
        assert largest_difference(scored, stock(folder).loglikelihood(requests(pairs), disable_tqdm=True)) < 2e-5


def test_visual_ids_influence_neither_scores_nor_generations(pipeline, um3_lm, exported):
    contexts = [(context, {"max_gen_toks": 12, "until": ["\n\n"]}) for context, _ in PAIRS if context]
    expected = stock(exported).generate_until(requests(contexts, "generate_until"), disable_tqdm=True)
    before, head = um3_lm.loglikelihood(requests(PAIRS)), pipeline.model.lm_head.weight.data
    original = head.clone()
    try:
        head[pipeline.ids.text_vocab_size :] += 100
        assert um3_lm.loglikelihood(requests(PAIRS)) == before
        assert of(pipeline).generate_until(requests(contexts, "generate_until"), disable_tqdm=True) == expected
    finally:
        head.copy_(original)
    assert all(expected)


def test_rolling_likelihood_counts_every_token_once(pipeline, um3_lm):
    text = "Anna walked slowly. " * 10
    tokens = encode_texts([text], tokenizer=pipeline.text_tokenizer)[0]
    assert len(tokens) < um3_lm.max_length
    (rolling,) = um3_lm.loglikelihood_rolling(requests([(text,)]))
    ((whole, _),) = um3_lm.loglikelihood(requests([("", text)]))
    assert rolling == pytest.approx(whole, rel=1e-5)


def test_a_continuation_longer_than_the_window_is_scored_in_pieces(pipeline):
    short, text = of(pipeline, max_length=16), " ".join(["Anna had never seen the upper room."] * 6)
    tokens = encode_texts([text], tokenizer=pipeline.text_tokenizer)[0]
    assert len(tokens) > 2 * short.max_length
    ((scored, _),) = short.loglikelihood(requests([("", text)]))
    whole, expected = [pipeline.ids.bos_id, *tokens], 0.0
    for start in range(1, len(whole), 8):  # half a window is scored after the other half, or less
        end = min(start + 8, len(whole))
        window = whole[max(0, end - 17) : end - 1]
        with torch.no_grad():
            logits = pipeline.model(torch.tensor([window])).logits[0, start - end :, : pipeline.ids.text_vocab_size]
        expected += float(logits.log_softmax(-1).gather(1, torch.tensor(whole[start:end])[:, None]).sum())
    assert scored == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def run_lm_eval(monkeypatch, bench, capsys):
    """Runs lm-eval's command line as `python -m eval lm` does; returns what it prints."""

    def run(*arguments):
        lm.main(arguments)
        return capsys.readouterr().out

    monkeypatch.setenv("LM_EVAL_DATA", str(bench))
    monkeypatch.setattr("sys.argv", sys.argv)  # restored afterwards
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager)
    return run


@pytest.mark.slow
def test_lm_evals_command_line_reads_the_local_copies(um3_folder, exported, run_lm_eval):
    tables = []
    for model, folder in (("um3", um3_folder), ("hf", exported)):
        output = run_lm_eval("--model", model, "--model_args", f"pretrained={folder}", "--tasks", "piqa,social_iqa")
        tables.append([line for line in output.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1] and any("social_iqa" in line for line in tables[0])


def test_on_its_command_line_a_missing_folder_is_one_line(run_lm_eval, um3_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="language model"):
        run_lm_eval("--model", "um3", "--model_args", f"pretrained={tmp_path}/none", "--tasks", "piqa")
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match="LM_EVAL_DATA"):
        run_lm_eval("--model", "um3", "--model_args", f"pretrained={um3_folder}", "--tasks", "piqa")


def test_lm_eval_finds_the_model_by_its_entry_point_when_it_has_plugins():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"]["um3"].split(":")

    assert getattr(import_module(module), name) is get_model("um3")
