"""LoRA, and training of the new rows alone: the base keeps its bits, and the run has the guarantees of any other."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.train.conftest import arguments, losses, train_apart, train_here
from tests.train.recipes.test_bases import ENTRIES, save_base
from tests.train.test_resume import kill_and_resume
from train.phase import main
from train.run_folder import result_files
from um3.core.errors import UserError
from um3.model.language_model import load_model

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
LORA = ["lora.rank=2", "lora.dropout=0.2", "optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with a tied head and a tokenizer without image tokens."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def trained(start, made, tmp_path_factory):
    """A finished run with LoRA from `start`."""
    folder = tmp_path_factory.mktemp("trained")
    train_here("um3", made, folder, f"model.base_model={start}", *LORA)
    return folder


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_lora_changes_only_the_new_rows_and_the_target_modules(start, trained):
    before, after = weights(start), weights(trained / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in TABLES:
            assert torch.equal(after[name][:ENTRIES], tensor[:ENTRIES])
            assert not (after[name][ENTRIES:] == tensor[ENTRIES:]).all(-1).any()
        else:
            assert torch.equal(after[name], tensor) == ("_proj." not in name)
    stored = load_file(trained / "checkpoints/step-00000004/model-00000.safetensors")
    names = {name.rpartition("/")[0].removeprefix("model.") for name in stored}
    assert {name for name in names if ".lora_" not in name} == {*TABLES, "bits.input_LD", "bits.output_LD"}
    assert sum("q_proj.lora_A" in name for name in names) == 2


def test_new_rows_can_be_trained_alone(base, made, tmp_path):
    """On a base that is extended in place, too."""
    options = ["trainable=new_rows", "model.qk_norm=false", "vocabulary.bit_embeddings=false", "optimizer.lr=1e-2"]
    train_here("um3", made, tmp_path, f"model.base_model={base}", *options)
    before, after = weights(base), weights(tmp_path / "model")
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)
    for name in TABLES:
        assert after[name][ENTRIES:].std(0).min() > 0  # they all began as the mean
    assert not (tmp_path / "adapter").exists()


def test_the_adapter_folder_is_one_of_peft(start, trained):
    config = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(start), 2, 32)
    # In float64, so that only the rounding of the merged weights is left, not that of a processor's sums.
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, trained / "adapter").double().eval()
    merged = load_model(trained / "model").model.double()
    ids_BT = torch.randint(merged.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV, unadapted_BTV = merged(ids_BT).logits, load_model(start).model.double()(ids_BT).logits
        assert (logits_BTV - unadapted_BTV).abs().max() > 0.1
        torch.testing.assert_close(adapted(ids_BT).logits, logits_BTV, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(ids_BT).logits, logits_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_at_any_zero_stage(zero_stage, start, trained, made, tmp_path, monkeypatch):
    command = arguments("um3", made, f"loop.output_dir={tmp_path}", f"model.base_model={start}", *LORA)
    kill_and_resume(command, 2, monkeypatch, f"engine.zero_stage={zero_stage}")
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)
    if zero_stage == 1:  # as `trained`: the others clip by a norm that is summed in another order
        assert losses(tmp_path) == losses(trained) and result_files(tmp_path) == result_files(trained)
        (tmp_path / "adapter/adapter_model.safetensors").unlink()
        main(command)  # makes the result again
        assert result_files(tmp_path) == result_files(trained)


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(start, made, tmp_path):
    options = [f"model.base_model={start}", "lora.rank=2"]
    whole, before = train_here("um3", made, tmp_path / "one", *options), weights(start)
    for zero_stage in (0, 2, 3):
        folder = tmp_path / str(zero_stage)
        of_stage = [f"loop.output_dir={folder}", f"engine.zero_stage={zero_stage}"]
        train_apart(arguments("um3", made, *options, *of_stage), processes=2)
        assert losses(folder) == pytest.approx(whole, rel=1e-5)
        after = weights(folder / "model")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name][:ENTRIES], before[name][:ENTRIES]) for name in TABLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.target_modules=[q_proj,qproj]"], r"'qproj'; choose from q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (["model.base_model={base}"], r"lora\.rank=2: .*make um3-init.*BASE="),
        (["model.base_model=''"], r"set model\.base_model"),
    ],
)
def test_mistakes_are_one_line(options, message, base, start, made, tmp_path):
    overrides = [f"model.base_model={start}", *LORA, *(option.format(base=base) for option in options)]
    with pytest.raises(UserError, match=message):
        train_here("um3", made, tmp_path, *overrides)
