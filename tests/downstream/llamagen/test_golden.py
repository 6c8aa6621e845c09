"""A tiny checkpoint in the released layout, with the outputs of the released code."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from downstream.llamagen.configuration import LlamaGenConfig
from downstream.llamagen.decoding import Decoder
from downstream.llamagen.modeling import LlamaGen, attention_mask, rotary_table
from tests.helpers.processes import SHARED
from um3.inference.generate import choose
from um3.inference.sampling_params import Sampling

GOLDEN = SHARED / "golden" / "llamagen_tiny"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/llamagen_tiny")
LOGITS, GUIDED, GRADIENTS = 5e-5, 2e-4, 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    shapes = {"caption_width": 32, "max_caption_tokens": 12, "num_patches": 64, "bits_per_subtoken": 7}
    model = LlamaGen(LlamaGenConfig(**sizes, **shapes)).eval()
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    return model


def logits(model, golden, *, dropped=False):
    captions = {"features_BTC": golden["caption_features"], "caption_mask_BT": golden["caption_mask"]}
    return model.logits(model(**captions, ids_BP=golden["image_ids"], dropped_B=torch.full((3,), dropped)))


def test_rotary_table_and_mask_are_equal(model, golden):
    assert torch.equal(rotary_table(model.config, num_caption=12), golden["rotary_table"])
    assert torch.equal(attention_mask(golden["caption_mask"], num_positions=75)[:, 0], golden["attention_mask"])


@torch.no_grad()
def test_logits_with_and_without_captions_and_guided(model, golden):
    conditional, unconditional = logits(model, golden), logits(model, golden, dropped=True)
    torch.testing.assert_close(conditional, golden["train_logits"], atol=LOGITS, rtol=0)
    torch.testing.assert_close(unconditional, golden["uncond_logits"], atol=LOGITS, rtol=0)
    guided = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guided, golden["cfg_logits"], atol=GUIDED, rtol=0)


def test_loss_and_gradients(model, golden):
    valid = golden["valid"].bool()
    losses = F.cross_entropy(logits(model, golden).transpose(1, 2), golden["image_ids"], reduction="none").mean(1)
    torch.testing.assert_close(losses.mean(), golden["train_loss_all"])
    torch.testing.assert_close(losses[valid].mean(), golden["train_loss"])
    losses[valid].mean().backward()
    names = [name for name in golden if name.startswith("grad.")]
    for name in names:
        gradient = model.get_parameter(name.removeprefix("grad.")).grad
        torch.testing.assert_close(gradient, golden[name], atol=GRADIENTS, rtol=0)
    assert len(names) == 4


INTERVAL = [2.5] * 22 + [1.0] * 42


@pytest.mark.parametrize(
    ("name", "scale"), [("greedy_ids", 1.0), ("greedy_ids_cfg", 2.5), ("greedy_ids_cfg_interval", INTERVAL)]
)
def test_every_greedy_id(model, golden, name, scale):
    captions = {"features_BTC": golden["caption_features"], "caption_mask_BT": golden["caption_mask"]}
    sampling = Sampling(temperature=0, guidance_scale=scale)
    sampled = Decoder(model).images(**captions, sampling=sampling, uniforms_BP=torch.zeros(3, 64).double())
    assert torch.equal(sampled.visual_ids, golden[name])


def test_the_distribution_that_is_sampled_from(golden):
    """At evenly spaced levels, each id is drawn as often as its probability says."""
    levels = (torch.arange(20_000).double() + 0.5) / 20_000
    for logits_V, expected_V in zip(golden["choice_logits"], golden["choice_probabilities"], strict=True):
        sampling = Sampling(temperature=0.9, top_k=40, top_p=0.8)
        drawn = choose(logits_V.expand(len(levels), -1), sampling=sampling, uniforms_B=levels)
        shares_V = torch.bincount(drawn, minlength=len(expected_V)) / len(levels)
        torch.testing.assert_close(shares_V, expected_V, atol=1e-4, rtol=0)
