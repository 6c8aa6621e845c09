"""The released layout, tensor by tensor: a tiny checkpoint with the outputs of the released code."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.tokenizer.conftest import GOLDEN
from tokenizer.bits import codes_to_bits
from tokenizer.modeling import QLIPModel, load_qlip

TOLERANCE = 1e-6
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_qlip(GOLDEN).eval()


@pytest.fixture(scope="module")
def output(model, golden):
    with torch.no_grad():
        return model(golden["pixel_values"], golden["input_ids"])


def relative_error(actual, expected):
    return float((actual - expected).detach().norm() / expected.norm())


def test_forward_reproduces_released_outputs(output, golden):
    names = ("image_embeds", "text_embeds", "logits_per_image", "reconstructions", "quantized", "quantizer_loss")
    errors = {name: relative_error(output[name], golden[name]) for name in (*names, "codebook_entropy")}
    assert max(errors.values()) < TOLERANCE, errors


def test_codes_are_exact_and_decode_to_the_reconstruction(model, output, golden):
    codes = model.encode(golden["pixel_values"])
    assert torch.equal(codes, output["codes"])
    assert torch.equal(codes_to_bits(codes, num_bits=28), golden["group_indices"])
    # The released code sums the 28 bits in float32: its indices are ours with 24 bits of mantissa.
    assert torch.equal(codes.float().long(), golden["indices"]) and not torch.equal(codes, golden["indices"])
    assert relative_error(model.decode(codes), output["reconstructions"]) < TOLERANCE


def test_clip_loss_and_pixel_gradient(model, golden):
    pixels = golden["pixel_values"].clone().requires_grad_()
    output = model(pixels, golden["input_ids"])
    logits, target = output.logits_per_image, torch.arange(len(pixels))
    clip_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert relative_error(clip_loss.detach(), golden["clip_loss"][0]) < TOLERANCE
    (clip_loss + 0.1 * output.quantizer_loss + output.reconstructions.square().mean()).backward()
    # Both gradients are sums in float32, in an order that depends on the processor: AVX2 gives 1.3e-6, AVX-512 less.
    assert pixels.grad is not None and relative_error(pixels.grad, golden["grad_pixel_values"]) < 3 * TOLERANCE


def test_a_changed_model_is_saved_in_the_released_layout(golden, tmp_path):
    changed = load_qlip(GOLDEN).eval()
    names, before = changed.state_dict().keys(), changed.fingerprint()
    assert names == load_file(GOLDEN / "model.safetensors").keys()
    with torch.no_grad():
        changed.visual_projection.weight.mul_(1.5)
    changed.save_pretrained(tmp_path)
    again = QLIPModel.from_pretrained(tmp_path).eval()
    assert again.fingerprint() == changed.fingerprint() != before
    with torch.no_grad():
        first, second = (model(golden["pixel_values"], golden["input_ids"]) for model in (changed, again))
    assert torch.equal(first.reconstructions, second.reconstructions)
    assert torch.equal(first.image_embeds, second.image_embeds)


def test_the_fingerprint_never_changes(model):
    """Code shards and UM3 models on disk carry it."""
    assert model.fingerprint().startswith("102fc90d4f16")


def test_the_licence_of_released_weights_is_logged_and_saved_with_them(model, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    again = load_qlip(tmp_path)
    assert "non-commercial" in caplog.text and str(tmp_path) in caplog.text
    caplog.clear()
    again.config.weights_license = ""
    again.save_pretrained(tmp_path)
    load_qlip(tmp_path)
    assert caplog.text == ""
