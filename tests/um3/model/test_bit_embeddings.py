"""Shared bits: nothing at first, one vector per bit of a code, and plain rows in the end."""

from collections.abc import Callable

import pytest
import torch

from um3.core.errors import UserError
from um3.model.bit_embeddings import SharedBits
from um3.model.language_model import ModelConfig, build_model
from um3.model.vocabulary import UnifiedVocabulary

SIZES = dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=24)


@pytest.fixture
def ids(make_ids: Callable[..., UnifiedVocabulary]) -> UnifiedVocabulary:
    return make_ids(subtokens=3, bits_per_subtoken=4, num_patches=1)


def make_bits(ids: UnifiedVocabulary, *, random: bool = True) -> SharedBits:
    torch.manual_seed(0)
    bits = SharedBits(ids, model_config=build_model(ModelConfig(**SIZES), ids=ids).config)
    for parameter in bits.parameters():
        assert not parameter.any()
        if random:
            torch.nn.init.normal_(parameter)
    return bits


def test_a_code_gets_the_signed_sum_of_its_own_bits(ids: UnifiedVocabulary) -> None:
    bits = make_bits(ids)
    code = 0b1010_0111_0001
    ids_BT = torch.cat([torch.tensor([7]), ids.codes_to_ids(torch.tensor([code]))])[None]
    added_BTD = bits.add_to_inputs(torch.zeros(1, 4, 16), ids_BT=ids_BT)
    assert not added_BTD[0, 0].any()  # a text entry
    signs_L = torch.tensor([1.0 if digit == "1" else -1.0 for digit in f"{code:012b}"])
    for subtoken in range(3):
        own = slice(4 * subtoken, 4 * subtoken + 4)
        torch.testing.assert_close(added_BTD[0, subtoken + 1], signs_L[own] @ bits.input_LD[own])
    head_VD = bits.add_to_head(torch.zeros(ids.vocab_size, 16))
    torch.testing.assert_close(head_VD[ids_BT[0, 2]], signs_L[4:8] @ bits.output_LD[4:8])
    assert not head_VD[: ids.text_vocab_size].any()


def test_bits_at_zero_change_nothing(ids: UnifiedVocabulary) -> None:
    bits = make_bits(ids, random=False)
    weight_VD = torch.randn(ids.vocab_size, 16)
    assert torch.equal(bits.add_to_head(weight_VD), weight_VD)
    ids_BT = torch.arange(ids.vocab_size)[None]
    assert torch.equal(bits.add_to_inputs(weight_VD[ids_BT], ids_BT=ids_BT), weight_VD[ids_BT])


def test_folded_rows_are_what_was_trained(ids: UnifiedVocabulary) -> None:
    model, bits = build_model(ModelConfig(**SIZES), ids=ids), make_bits(ids)
    ids_BT = torch.randint(ids.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeddings_BTD = bits.add_to_inputs(model.get_input_embeddings()(ids_BT), ids_BT=ids_BT)
        hidden_BTD = model.model(inputs_embeds=embeddings_BTD).last_hidden_state
        trained_BTV = hidden_BTD @ bits.add_to_head(model.lm_head.weight).T
        weights = dict(model.state_dict()) | {f"bits.{name}": value for name, value in bits.state_dict().items()}
        bits.fold(weights)
        model.load_state_dict(weights, strict=True)
        torch.testing.assert_close(model(ids_BT).logits, trained_BTV, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_refused(ids: UnifiedVocabulary) -> None:
    config = build_model(ModelConfig(**SIZES, tie_word_embeddings=True), ids=ids).config
    with pytest.raises(UserError, match="tie_word_embeddings=false"):
        SharedBits(ids, model_config=config)
