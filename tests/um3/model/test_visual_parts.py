"""Bit embeddings: zero at first, one vector per bit of a code, folded into plain rows at the end."""

import pytest
import torch

from tests.helpers.tiny_um3 import make_ids, make_model
from um3.core.errors import UserError
from um3.model.extend import EMBEDDING, HEAD
from um3.model.visual_parts import BitEmbeddings

IDS = make_ids(subtokens=3, bits_per_subtoken=4, num_patches=1)


def make_bits(*, random=True):
    bits = BitEmbeddings(IDS, model_config=make_model(IDS, hidden_size=16).config)
    for parameter in bits.parameters():
        assert not parameter.any()
        if random:
            torch.nn.init.normal_(parameter)
    return bits


def test_a_code_gets_the_signed_sum_of_its_own_bits():
    bits, code = make_bits(), 0b1010_0111_0001
    ids_BT = torch.cat([torch.tensor([7]), IDS.codes_to_ids(torch.tensor([code]))])[None]
    added_BTD = bits.add_to_inputs(torch.zeros(1, 4, 16), ids_BT=ids_BT)
    assert not added_BTD[0, 0].any()  # a text entry
    signs_L = torch.tensor([1.0 if digit == "1" else -1.0 for digit in f"{code:012b}"])
    expected_SD = (signs_L[:, None] * bits.input_LD).unflatten(0, (3, 4)).sum(1)
    torch.testing.assert_close(added_BTD[0, 1:], expected_SD)
    head_VD = bits.add_to_head(torch.zeros(IDS.vocab_size, 16))
    torch.testing.assert_close(head_VD[ids_BT[0, 2]], signs_L[4:8] @ bits.output_LD[4:8])
    assert not head_VD[: IDS.text_vocab_size].any()


def test_bits_at_zero_change_nothing():
    bits, weight_VD = make_bits(random=False), torch.randn(IDS.vocab_size, 16)
    assert torch.equal(bits.add_to_head(weight_VD), weight_VD)
    ids_BT = torch.arange(IDS.vocab_size)[None]
    assert torch.equal(bits.add_to_inputs(weight_VD[ids_BT], ids_BT=ids_BT), weight_VD[ids_BT])


def test_folded_rows_give_the_trained_logits():
    model, bits = make_model(IDS, hidden_size=16), make_bits()
    ids_BT = torch.randint(IDS.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeddings_BTD = bits.add_to_inputs(model.get_input_embeddings()(ids_BT), ids_BT=ids_BT)
        hidden_BTD = model.model(inputs_embeds=embeddings_BTD).last_hidden_state
        trained_BTV = hidden_BTD @ bits.add_to_head(model.lm_head.weight).T
        weights = dict(model.state_dict()) | {f"bits.{name}": value for name, value in bits.state_dict().items()}
        bits.fold(weights)
        model.load_state_dict(weights, strict=True)
        torch.testing.assert_close(model(ids_BT).logits, trained_BTV, rtol=1e-4, atol=1e-4)


def test_the_last_rows_alone_get_the_same_vectors() -> None:
    bits, first = make_bits(), IDS.text_vocab_size - 2
    weights = {name: torch.randn(IDS.vocab_size, 16) for name in (EMBEDDING, HEAD)}
    vectors = {f"bits.{name}": value for name, value in bits.state_dict().items()}
    assert torch.equal(bits.add_to_head(weights[HEAD][first:]), bits.add_to_head(weights[HEAD])[first:])
    whole, last = weights | vectors, {name: table[first:] for name, table in weights.items()} | vectors
    bits.fold(whole)
    bits.fold(last)
    assert all(torch.equal(last[name], whole[name][first:]) for name in weights)


def test_a_tied_head_is_refused() -> None:
    config = make_model(IDS, tie_word_embeddings=True).config
    with pytest.raises(UserError, match="tie_word_embeddings=false"):
        BitEmbeddings(IDS, model_config=config)
