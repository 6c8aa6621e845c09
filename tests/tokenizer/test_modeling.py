"""QLIP beyond the golden checkpoint: other layouts, bad input, the paper's sizes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tokenizer.conftest import tiny_config
from tokenizer.configuration import QLIPConfig, QLIPDecoderConfig
from tokenizer.layers import Linear
from tokenizer.modeling import QLIPModel, VisionDecoder, load_qlip
from um3.core.errors import UserError


@pytest.mark.parametrize(
    "changes",
    [
        {"swiglu": False},
        {"rope": False},
        {"subln": False},
        {"k_bias": True},
        {"swiglu": False, "subln": False, "hidden_act": "quick_gelu"},
        {"quantizer_cfg": {"embed_dim": 12, "group_size": 3}},
    ],
)
def test_every_layout_encodes_decodes_and_reloads(changes, tmp_path):
    torch.manual_seed(0)
    model = QLIPModel(tiny_config(**changes)).eval()
    codes = model.encode(torch.randn(2, 3, 16, 16))
    assert codes.shape == (2, 4) and codes.dtype == torch.int64
    assert model.decode(codes).shape == (2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    assert load_qlip(tmp_path).fingerprint() == model.fingerprint()


def test_text_pooling_conventions(tiny_qlip):
    """eos_token_id == 2 pools at the largest id, any other value at its first occurrence."""
    ids = torch.tensor([[1, 5, 2, 0], [1, 9, 7, 2]])
    old = tiny_qlip.get_text_features(ids)
    config = tiny_config()
    config.text_tower.eos_token_id = 7
    new = QLIPModel(config).eval()
    new.load_state_dict(tiny_qlip.state_dict())
    largest = tiny_qlip.text_model.encoder(tiny_qlip.text_model.embeddings(ids))[1, 1]
    pooled = tiny_qlip.text_model.final_layer_norm(largest)
    torch.testing.assert_close(old[1], F.normalize(tiny_qlip.text_projection(pooled), dim=-1))
    assert not torch.allclose(new.get_text_features(ids)[1], old[1])


def test_padding_after_the_end_changes_nothing(tiny_qlip):
    short, padded = (tiny_qlip.get_text_features(torch.tensor([[1, 5, 299, *pads]])) for pads in ((), (0, 0)))
    torch.testing.assert_close(short, padded)


def test_images_of_another_size_and_long_texts_are_refused(tiny_qlip):
    with pytest.raises(ValueError, match="16x16"):
        tiny_qlip.encode(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"17 text tokens .* 16 positions"):
        tiny_qlip.get_text_features(torch.ones(1, 17, dtype=torch.long))


def test_training_reaches_every_parameter(tiny_qlip):
    output = tiny_qlip.train()(torch.randn(3, 3, 16, 16), torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2]]))
    total = output.reconstructions.square().mean() + output.logits_per_image.diag().sum() + output.quantizer_loss
    total.backward()
    assert [name for name, parameter in tiny_qlip.named_parameters() if parameter.grad is None] == []


def test_activation_checkpointing_changes_no_gradient(tiny_qlip):
    pixels, weight = torch.randn(2, 3, 16, 16), tiny_qlip.vision_model.embeddings.patch_embedding.weight
    (plain,) = torch.autograd.grad(tiny_qlip.train()(pixels).reconstructions.square().mean(), weight)
    tiny_qlip.gradient_checkpointing_enable()
    (checkpointed,) = torch.autograd.grad(tiny_qlip(pixels).reconstructions.square().mean(), weight)
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("overlap", [1, 2, 5, 8])
def test_overlapping_windows_are_blended_and_reload(overlap, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = QLIPDecoderConfig(**sizes, image_size=32, patch_size=8, overlap=overlap)
    decoder, side = VisionDecoder(config), 8 + 2 * overlap
    # Equal windows give an equal image, at its border too; a single window ends where it says.
    nn.init.zeros_(decoder.conv_out.weight)
    nn.init.ones_(decoder.conv_out.bias)
    torch.testing.assert_close(decoder(torch.randn(2, 16, 32)), torch.ones(2, 3, 32, 32))
    windows = torch.zeros(1, 16, 3 * side**2)
    windows[:, 5] = 1
    seen = decoder._blend(windows)[0, 0]
    assert seen[8 - overlap : 16 + overlap, 12].all() and not seen[: 8 - overlap].any()
    assert seen[12, 8 - overlap] < seen[12, 9 - overlap] and (seen <= 1).all()
    model_config = tiny_config()
    model_config.decoder_tower.overlap = overlap
    model = QLIPModel(model_config).eval()
    model.save_pretrained(tmp_path)
    codes = model.encode(torch.randn(2, 3, 16, 16))
    assert torch.equal(load_qlip(tmp_path).decode(codes), model.decode(codes))


def test_qlip_b_16_has_the_released_size():
    with torch.device("meta"):
        model = QLIPModel(QLIPConfig(vision_config={"quantizer_cfg": {"embed_dim": 28}}))
    assert sum(parameter.numel() for parameter in model.parameters()) == 239_434_013


def test_missing_and_damaged_folders_are_named(tiny_qlip, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(UserError, match=name):
            load_qlip(tmp_path / name)
    tiny_qlip.save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_qlip(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual_projection.weight"), "lack 1 .*'visual_projection.weight'"),
        (lambda tensors: tensors.update(stranger=torch.zeros(1)), "1 tensors .*config.json.*'stranger'"),
        (lambda tensors: tensors.update({"logit_scale": torch.zeros(3)}), "logit_scale is"),
    ],
    ids=("missing", "extra", "shape"),
)
def test_weights_of_another_model_are_one_line(tiny_qlip, tmp_path, caplog, change, message):
    tiny_qlip.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_qlip(tmp_path)
    assert caplog.text == ""


def test_a_linear_layer_gives_the_same_with_and_without_gradient():
    torch.manual_seed(0)
    for bias in (True, False):
        linear, x = Linear(48, 32, bias=bias), torch.randn(2, 5, 48)
        expected = F.linear(x, linear.weight, linear.bias)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), expected)
            torch.testing.assert_close(linear(x[:, ::2]), expected[:, ::2])
            assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        linear.float()
        linear(x).sum().backward()
        assert linear.weight.grad is not None
