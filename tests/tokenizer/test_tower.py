"""QLIP's encoder as a vision tower of transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.tokenizer.conftest import tiny_config
from tokenizer import QLIPVisionTower
from tokenizer.modeling import QLIPModel


@pytest.fixture(scope="module")
def qlip() -> QLIPModel:
    torch.manual_seed(0)
    return QLIPModel(tiny_config(num_hidden_layers=3)).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_hidden_states_are_those_of_qlip_to_the_bit(qlip, pixels):
    states = [qlip.vision_model.embeddings(pixels)]
    for layer in qlip.vision_model.encoder.layers:
        states.append(layer(states[-1]))
    output = QLIPVisionTower.from_qlip(qlip)(pixels, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert all(torch.equal(ours, own) for ours, own in zip(output.hidden_states, states, strict=True))
    assert torch.equal(output.last_hidden_state, qlip.vision_features(pixels))
    one = QLIPVisionTower.from_qlip(qlip)(pixels, output_hidden_states=-2).hidden_states
    assert [state is not None for state in one] == [False, False, True, False] and torch.equal(one[-2], states[-2])


@torch.no_grad()
def test_the_last_hidden_state_after_the_quantizer(qlip, pixels):
    quantized_BNL = qlip.vision_model.quantizer.codes_to_quantized(qlip.encode(pixels))
    output = QLIPVisionTower.from_qlip(qlip, quantized=True)(pixels, output_hidden_states=-1)
    assert torch.equal(output.hidden_states[-1][:, 1:], qlip.vision_model.quant_embed_post(quantized_BNL))
    assert torch.equal(output.hidden_states[-1][:, 0], qlip.vision_features(pixels)[:, 0])


def test_a_quantizer_of_another_width_is_refused():
    config = tiny_config(hidden_size_post_q=48).vision_tower
    config.tie_last_hidden_states = True
    with pytest.raises(ValueError, match=r"48 wide.*32.*tie_last_hidden_states"):
        QLIPVisionTower(config)


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_a_saved_tower_loads_with_the_auto_classes(qlip, pixels, quantized, tmp_path):
    tower = QLIPVisionTower.from_qlip(qlip, quantized=quantized)
    tower.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_last_hidden_states == quantized
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, QLIPVisionTower) and not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_activation_checkpointing_gives_the_same_gradient(qlip, pixels):
    gradients = []
    for checkpointing in (False, True):
        tower = QLIPVisionTower.from_qlip(qlip).train()
        if checkpointing:
            tower.gradient_checkpointing_enable()
        tower(pixels, output_hidden_states=-2).hidden_states[-2].square().sum().backward()
        gradients.append(tower.vision_model.embeddings.class_embedding.grad)
    assert torch.equal(*gradients)
