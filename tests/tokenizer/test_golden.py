"""The released layout, tensor by tensor: a small checkpoint with the outputs of the released code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tokenizer.modeling import QLIPModel, QLIPOutput, load_qlip

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    return load_qlip(FOLDER).eval()


@pytest.fixture(scope="module")
def output(model: QLIPModel, golden: dict[str, torch.Tensor]) -> QLIPOutput:
    with torch.no_grad():
        return model(golden["pixel_values"], golden["input_ids"])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())


@pytest.mark.parametrize("name", ["image_embeds", "text_embeds", "logits_per_image", "reconstructions", "quantized"])
def test_forward_reproduces_released_outputs(name: str, output: QLIPOutput, golden: dict[str, torch.Tensor]) -> None:
    assert relative_error(output[name], golden[name]) < TOLERANCE


def test_quantizer_terms(output: QLIPOutput, golden: dict[str, torch.Tensor]) -> None:
    assert relative_error(output["quantizer_loss"], golden["quantizer_loss"]) < TOLERANCE
    assert relative_error(output["codebook_entropy"], golden["codebook_entropy"]) < TOLERANCE


def test_codes_are_exact(model: QLIPModel, output: QLIPOutput, golden: dict[str, torch.Tensor]) -> None:
    groups = model.vision_model.quantizer.group_indices(output["codes"])
    assert torch.equal(groups, golden["group_indices"])
    assert torch.equal(model.encode(golden["pixel_values"]), output["codes"])
    # The released code sums the 28 bits in float32: its indices are ours, rounded to 24 bits of mantissa.
    assert torch.equal(output["codes"].float().long(), golden["indices"])
    assert not torch.equal(output["codes"], golden["indices"])


def test_clip_loss_and_pixel_gradient(model: QLIPModel, golden: dict[str, torch.Tensor]) -> None:
    pixels = golden["pixel_values"].clone().requires_grad_()
    output = model(pixels, golden["input_ids"])
    target = torch.arange(len(pixels))
    clip_loss = (
        F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_image.T, target)
    ) / 2
    assert relative_error(clip_loss.detach(), golden["clip_loss"][0]) < TOLERANCE
    (clip_loss + 0.1 * output.quantizer_loss + output.reconstructions.square().mean()).backward()
    assert pixels.grad is not None
    assert relative_error(pixels.grad, golden["grad_pixel_values"]) < TOLERANCE


def test_decode_of_encode_is_the_reconstruction(
    model: QLIPModel, output: QLIPOutput, golden: dict[str, torch.Tensor]
) -> None:
    decoded = model.decode(model.encode(golden["pixel_values"]))
    assert relative_error(decoded, output["reconstructions"]) < 1e-6


def test_state_dict_names_are_the_released_ones(model: QLIPModel) -> None:
    assert model.state_dict().keys() == load_file(FOLDER / "model.safetensors").keys()


def test_round_trip_after_a_change(model: QLIPModel, golden: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = load_qlip(FOLDER).eval()
    with torch.no_grad():
        changed.visual_projection.weight.mul_(1.5)
        changed.vision_decoder.rope.freqs_cos.add_(0.0)
    changed.save_pretrained(tmp_path)
    again = QLIPModel.from_pretrained(tmp_path).eval()
    assert again.fingerprint() == changed.fingerprint() != model.fingerprint()
    with torch.no_grad():
        first = changed(golden["pixel_values"], golden["input_ids"])
        second = again(golden["pixel_values"], golden["input_ids"])
    assert torch.equal(first.reconstructions, second.reconstructions)
    assert torch.equal(first.image_embeds, second.image_embeds)


def test_a_released_folder_says_what_its_licence_forbids_and_so_does_what_is_saved_from_it(
    model: QLIPModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    again = load_qlip(tmp_path)
    assert "non-commercial" in caplog.text and str(tmp_path) in caplog.text
    assert again.fingerprint() == model.fingerprint()
    caplog.clear()
    again.config.weights_license = ""
    again.save_pretrained(tmp_path)
    load_qlip(tmp_path)
    assert caplog.text == ""
