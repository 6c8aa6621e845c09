"""The stock language model: extension of a base, query-key normalisation, parameter counts."""

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from tests.helpers.tiny_um3 import LLAMA_3_ROPE, make_base, make_ids, make_model
from um3.core.errors import UserError
from um3.model.configuration import IMAGE_SAMPLING, ModelConfig
from um3.model.extend import extend_model
from um3.model.language_model import count_parameters

TEXT_BT = torch.randint(5, 48, (4, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def text_logits(model):
    return model(TEXT_BT).logits[..., :48]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_extension_alone_changes_no_text_logit(kind, tied):
    options = {"rope_parameters": LLAMA_3_ROPE} if kind == "llama" else {}
    base = make_base(kind, tie_word_embeddings=tied, **options)
    before = text_logits(base)
    model = extend_model(base, ids=make_ids())
    assert type(model) is type(base) and torch.equal(text_logits(model), before)


def test_new_rows_are_the_mean_and_the_head_is_untied():
    base, ids = make_base("llama", tie_word_embeddings=True), make_ids()
    mean_D = base.model.embed_tokens.weight[:44].mean(0)
    # The base's tokenizer has 44 entries: its last four rows are padding.
    model = extend_model(base, ids=ids, base_entries=44)
    for table_VD in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert len(table_VD) == ids.vocab_size
        assert torch.equal(table_VD[:44], base.model.embed_tokens.weight[:44])
        torch.testing.assert_close(table_VD[44:], mean_D.expand(len(table_VD) - 44, -1))
    assert not model.config.tie_word_embeddings
    model.model.embed_tokens.weight.data.add_(1.0)
    torch.testing.assert_close(model.lm_head.weight[48], mean_D)


def test_padding_rows_of_a_base_are_dropped() -> None:
    model = extend_model(make_base("qwen3"), ids=make_ids(text_vocab_size=40))
    assert len(model.lm_head.weight) == 40 + 512


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_fresh_model_trains_and_has_the_requested_shape(qk_norm):
    ids = make_ids()
    model = make_model(ids, head_dim=16, qk_norm=qk_norm)
    assert isinstance(model, Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)
    assert model.config.to_dict()["rope_parameters"]["rope_theta"] == 10_000.0
    defaults = model.generation_config
    assert defaults.pad_token_id == ids.pad_id and defaults.image_sampling == IMAGE_SAMPLING
    model(TEXT_BT, labels=TEXT_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tied_head_counts_once() -> None:
    ids = make_ids()
    model = make_model(ids, tie_word_embeddings=True)
    counts = count_parameters(model, ids=ids)
    assert counts["text head"] == counts["visual head"] == 0
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="49 entries, but the base only 48 rows"):
        extend_model(make_base("llama"), ids=make_ids(), base_entries=49)
    with pytest.raises(ValueError, match="multiple"):
        ModelConfig(num_heads=6, num_kv_heads=4)
