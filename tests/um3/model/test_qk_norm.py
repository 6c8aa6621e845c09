"""Inserting query-key normalisation: what the base computed is kept, also if its heads differ in scale."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3ForCausalLM

from data_mix.demo.python_docs import python_documents
from tests.helpers.processes import ROOT
from tests.helpers.tiny_um3 import make_base
from tests.helpers.trained_llama import periodic_ids, trained_llama
from um3.core.errors import UserError
from um3.model import qk_norm
from um3.model.extend import load_base
from um3.model.qk_norm import fit_qk_norm, insert_qk_norm, inserts_qk_norm

CALIBRATION = [periodic_ids(32, seed=1000), periodic_ids(32, seed=1001)]
IDS_BT = periodic_ids(64, seed=1002)
SMOLLM2 = ROOT / "models/smollm2"


@torch.no_grad()
def divergence(base: PreTrainedModel, model: PreTrainedModel) -> float:
    """Nats per token of KL(base || model)."""
    before, after = (part(IDS_BT).logits.log_softmax(-1) for part in (base, model))
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_trained_model_keeps_its_distribution(monkeypatch):
    """Gains alone, one vector for all heads, lose it: the best that is possible without a constant dimension."""
    base = trained_llama()
    model = insert_qk_norm(base, fit_qk_norm(base, calibration=CALIBRATION))
    assert isinstance(model, Qwen3ForCausalLM) and divergence(base, model) < 0.05
    new, old = (part.model.layers[0].mlp.up_proj.weight.data_ptr() for part in (model, base))
    assert new == old
    monkeypatch.setattr(qk_norm, "MAX_ERROR", -1.0)
    gains = fit_qk_norm(base, calibration=CALIBRATION)
    assert not [name for name in gains if "proj" in name]
    assert divergence(base, insert_qk_norm(base, gains)) > 0.3 and divergence(base, insert_qk_norm(base)) > 0.3


def test_the_normalised_queries_are_those_of_the_base_without_one_dimension():
    """Exactly so with biases, however the weights are distributed, as the margin grows."""
    base = make_base("qwen2")
    fitted = fit_qk_norm(base, calibration=CALIBRATION)
    model = insert_qk_norm(base, fitted)
    inputs = torch.randn(10, 32)
    for old, new in zip(base.model.layers, model.model.layers, strict=True):
        for part in "qk":
            projection, norm = (getattr(new.self_attn, f"{part}_{kind}") for kind in ("proj", "norm"))
            before = getattr(old.self_attn, f"{part}_proj")(inputs).unflatten(-1, (-1, 8))
            after = norm(projection(inputs).unflatten(-1, (-1, 8)))
            kept = norm.weight != 0
            assert kept.sum() == 7
            # The constant is 4 times as large as the rest, so the norm varies by less than a tenth.
            torch.testing.assert_close(after[..., kept], before[..., kept], rtol=0.15, atol=0.02)
    assert new.self_attn.o_proj.bias.count_nonzero() == 0


def test_without_a_constant_direction_the_mean_square_is_kept():
    """Random weights: the inputs of a layer have none, and the base has no biases."""
    base = make_base("llama")
    for layer in base.model.layers:
        layer.input_layernorm.weight.data.fill_(1.0)
    calibration = [torch.randint(5, 48, (32, 20), generator=torch.Generator().manual_seed(0))]
    fitted = fit_qk_norm(base, calibration=calibration)
    assert not [name for name in fitted if "proj" in name]
    outputs: list[torch.Tensor] = []
    base.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    base(calibration[0])
    expected = outputs[0].pow(2).mean().sqrt()
    torch.testing.assert_close(fitted["model.layers.1.self_attn.k_norm.weight"], expected.expand(8), rtol=1e-4, atol=0)


def test_an_inserted_normalisation_survives_saving(tmp_path):
    model = insert_qk_norm(trained_llama(), fit_qk_norm(trained_llama(), calibration=CALIBRATION))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS_BT).logits, model(IDS_BT).logits)


@pytest.mark.parametrize(
    ("kind", "options", "remedy"),
    [
        ("llama", {"mlp_bias": True}, "set qk_norm=false"),
        ("qwen2", {"use_sliding_window": True}, "choose another base"),
    ],
)
def test_a_base_that_qwen3_cannot_express_is_one_line(kind, options, remedy):
    with pytest.raises(UserError, match=remedy):
        insert_qk_norm(make_base(kind, **options))
    with pytest.raises(UserError, match="set qk_norm=true"):
        inserts_qk_norm(make_base("qwen3").config, qk_norm=False)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="make smollm2 writes it")
@torch.no_grad()
def test_inserted_normalisation_costs_a_real_model_little():
    """In the language model that `make smollm2` writes, less than 0.05 nats a token."""
    base, tokenizer = load_base(str(SMOLLM2)), AutoTokenizer.from_pretrained(SMOLLM2)
    prose = "\n".join(text for _, text in python_documents()[::20])
    ids_XT = torch.tensor(tokenizer(prose)["input_ids"][: 14 * 512]).view(14, 512)

    def loss(model):
        logits_XV = torch.cat([model(ids_T[None]).logits[0, :-1] for ids_T in ids_XT[10:]])
        return torch.nn.functional.cross_entropy(logits_XV, ids_XT[10:, 1:].flatten())

    before = loss(base)
    assert 2 < before < 4
    model = insert_qk_norm(base, fit_qk_norm(base, calibration=ids_XT[:10, None]))
    assert loss(model) - before < 0.05
    assert loss(insert_qk_norm(base)) - before > 1  # gains of 1
