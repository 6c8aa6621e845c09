"""A frozen base: which parameters train, their gradients, and the plain model that they merge to."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers.tiny_um3 import make_base, make_ids, make_model
from um3.core.errors import UserError
from um3.model.configuration import LoRAConfig
from um3.model.extend import extend_model
from um3.model.lora import freeze_base, merge

ENTRIES = 48
IDS = make_ids(subtokens=2, bits_per_subtoken=4, num_patches=1, text_vocab_size=ENTRIES + 2)
IDS_BT = torch.arange(IDS.vocab_size).view(2, -1)


def start(kind: str) -> PreTrainedModel:
    """A base of ENTRIES rows with random new ones."""
    base = make_base(kind, vocab_size=ENTRIES)
    return extend_model(base, ids=IDS, base_entries=ENTRIES, new_token_init="random")


def logits(model: PreTrainedModel) -> Tensor:
    """As the training objective computes them."""
    embeddings_BTD = model.get_input_embeddings()(IDS_BT)
    hidden_BTD = model.model(inputs_embeds=embeddings_BTD).last_hidden_state
    return hidden_BTD @ torch.cat([model.lm_head.frozen_FD, model.lm_head.weight]).T


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_frozen_base_merges_to_a_plain_model(kind: str, rank: int) -> None:
    model, plain = start(kind), start(kind)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    lora = LoRAConfig(rank=rank, alpha=5, target_modules=["q_proj", "down_proj"])
    freeze_base(model, ids=IDS, lora=lora)
    torch.testing.assert_close(logits(model), plain(IDS_BT).logits)  # adapters begin at zero
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 + (2 * 2 * 2 if rank else 0)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.3)
    changed_BTV = logits(model)
    changed_BTV.square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained.keys()

    plain.load_state_dict(merge(model.state_dict(), lora=lora), strict=True)
    torch.testing.assert_close(plain(IDS_BT).logits, changed_BTV, rtol=1e-5, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor[:ENTRIES], before[name][:ENTRIES])
            assert not torch.equal(tensor[ENTRIES:], before[name][ENTRIES:])
        else:
            is_target = "q_proj.weight" in name or "down_proj" in name
            assert torch.equal(tensor, before[name]) == (rank == 0 or not is_target)


def test_dropout_follows_the_global_seed() -> None:
    model = start("llama").train()
    freeze_base(model, ids=IDS, lora=LoRAConfig(rank=3, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(logits(model))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_a_tied_head_is_refused() -> None:
    model = make_model(IDS, tie_word_embeddings=True)
    with pytest.raises(UserError, match="tied head"):
        freeze_base(model, ids=IDS, lora=LoRAConfig())
