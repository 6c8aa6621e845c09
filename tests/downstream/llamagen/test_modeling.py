"""LlamaGen's model and cached sampling, for every cut of a code, both prefix rotations and both predictions."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from downstream.llamagen.configuration import SIZES, LlamaGenConfig
from downstream.llamagen.decoding import Decoder
from downstream.llamagen.modeling import LlamaGen, load_llamagen, rotary_table
from um3.inference.sampling_params import Sampling

CUTS = [(1, 8, "flat"), (2, 4, "flat"), (4, 2, "flat"), (2, 4, "depth"), (4, 2, "depth")]
ROTATIONS = ["zero", "identity"]
DEPTH = {"subtokens": 2, "bits": 4, "prediction": "depth", "depth_layers": 2}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def tiny(*, subtokens=1, bits=8, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shapes = {"caption_width": 8, "max_caption_tokens": 6, "num_patches": 16}
    config = LlamaGenConfig(**sizes, **shapes, subtokens=subtokens, bits_per_subtoken=bits, **options)
    model = LlamaGen(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def captions(num_padding=0):
    features_BTC = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1)) * MASK[..., None]
    padding = (num_padding, 0)
    return {
        "features_BTC": torch.nn.functional.pad(features_BTC, (0, 0, *padding)),
        "caption_mask_BT": torch.nn.functional.pad(MASK, padding),
    }


def uniforms(model):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(3, model.config.image_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def logprobs(model, ids_BP, **inputs):
    logits_BPV = model.logits(model(ids_BP=ids_BP, **inputs))
    return logits_BPV.log_softmax(-1).gather(-1, ids_BP[..., None])[..., 0].sum(-1)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("subtokens", "bits", "prediction"), CUTS)
def test_cached_sampling_is_the_training_form(rotation, subtokens, bits, prediction):
    cut = {"subtokens": subtokens, "bits": bits, "prediction": prediction, "depth_layers": 2}
    model = tiny(**cut, prefix_rotation=rotation, num_key_value_heads=2)
    sampled = Decoder(model).images(**captions(), sampling=Sampling(), uniforms_BP=uniforms(model))
    assert sampled.visual_ids.unique().numel() > 2 and sampled.visual_ids.max() < 1 << bits
    torch.testing.assert_close(sampled.logprobs, logprobs(model, sampled.visual_ids, **captions()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_padding_and_neighbours_change_nothing(rotation):
    model = tiny(prefix_rotation=rotation)
    ids_BP = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(3))
    alone = {name: values[:1, 2:] for name, values in captions().items()}
    expected = logprobs(model, ids_BP, **captions())
    torch.testing.assert_close(logprobs(model, ids_BP, **captions(num_padding=5)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs(model, ids_BP[:1], **alone), expected[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, DEPTH])
def test_guidance_mixes_with_the_unconditional_features_under_the_captions_mask(options):
    model = tiny(**options)
    model.cls_embedding.uncond_embedding.normal_(generator=torch.Generator().manual_seed(4))
    sampling = Sampling(temperature=0, guidance_scale=3.0)
    ids_BP = Decoder(model).images(**captions(), sampling=sampling, uniforms_BP=uniforms(model)).visual_ids
    with torch.no_grad():
        conditional, unconditional = (
            model.logits(model(**captions(), ids_BP=ids_BP, dropped_B=torch.full((3,), dropped)))
            for dropped in (False, True)
        )
    assert torch.equal(ids_BP, (unconditional + 3 * (conditional - unconditional)).argmax(-1))


@pytest.mark.parametrize("options", [{}, DEPTH])
def test_a_new_model_begins_at_ln_v_and_checkpointing_changes_nothing(options):
    model = LlamaGen(tiny(**options).config).train()
    ids_BP = torch.randint(0, model.config.slot_size, (3, model.config.image_tokens))
    assert torch.allclose(logprobs(model, ids_BP, **captions()), torch.tensor(256.0).log() * -16)
    outputs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)  # of the dropout
        model.zero_grad()
        hidden_BPD = model(ids_BP=ids_BP, **captions())
        hidden_BPD.square().mean().backward()
        outputs.append([hidden_BPD.detach(), model.layers[0].attention.wqkv.weight.grad.clone()])
    assert all(map(torch.equal, *outputs))


def test_two_subtokens_are_a_grid_twice_as_wide():
    table = rotary_table(tiny(subtokens=2, bits=4).config, num_caption=3)
    angles = torch.atan2(table[..., 1], table[..., 0])[3:]
    rows, columns = angles[:, 0], angles[:, 2]  # the first band of each axis turns by one radian a step
    wrapped = torch.atan2(torch.arange(8.0).sin(), torch.arange(8.0).cos())
    torch.testing.assert_close(columns[:8], wrapped)
    torch.testing.assert_close(rows[::8], wrapped[:4])


def test_an_id_of_the_depth_form_sees_its_caption_earlier_patches_and_earlier_ids_of_its_patch():
    model = tiny(**DEPTH | {"subtokens": 4, "bits": 2})
    ids_BP = torch.randint(0, 4, (1, 64), generator=torch.Generator().manual_seed(6))
    inputs = {name: values[:1] for name, values in captions().items()}
    before = model(ids_BP=ids_BP, **inputs)
    for changed in (0, 5, 6, 39, 63):
        other_BP = ids_BP.clone()
        other_BP[:, changed] = (other_BP[:, changed] + 1) % 4
        differs_P = (model(ids_BP=other_BP, **inputs) - before).abs().amax((0, 2)) > 1e-5
        assert differs_P.tolist() == [position > changed for position in range(64)]


def test_a_depth_model_is_saved_and_loaded(tmp_path):
    model = tiny(**DEPTH)
    model.save_pretrained(tmp_path)
    loaded = load_llamagen(tmp_path)
    assert loaded.config.prediction == "depth" and len(loaded.depth) == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


TWO_OF_14 = {"subtokens": 2, "bits_per_subtoken": 14}


@pytest.mark.parametrize(
    ("size", "options", "count"),
    [
        ("B", {}, 112_282_368),
        ("L", {}, 345_031_680),
        ("XL", {}, 777_678_080),
        ("XL", TWO_OF_14, 819_621_120),
        ("XL", TWO_OF_14 | {"prediction": "depth"}, 839_939_840),
        ("XL", TWO_OF_14 | {"prediction": "depth", "depth_layers": 4}, 900_896_000),
    ],
)
def test_published_sizes(size, options, count):
    with torch.device("meta"):
        model = LlamaGen(LlamaGenConfig(**SIZES[size], **options))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert size != "XL" or options or len(model.state_dict()) == 258


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_patches": 250}, "250"),
        ({"num_attention_heads": 7}, "7"),
        ({"bits_per_subtoken": 28}, "28"),
        ({"prediction": "depth"}, "2 or more subtokens"),
        ({"prediction": "depth", "subtokens": 2, "depth_layers": 5}, "1 to 4 depth_layers"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, named):
    with pytest.raises(StrictDataclassClassValidationError, match=named):
        LlamaGenConfig(**options)


def test_a_decoder_notices_changed_weights():
    model = tiny()
    decoder = Decoder(model)
    assert decoder.is_current
    with torch.no_grad():
        model.output.weight.mul_(2)
    assert not decoder.is_current


def test_under_autocast_the_layers_add_in_float32():
    """As those of a stock Llama do."""
    model, seen = tiny(), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids_BP=torch.zeros(3, model.config.image_tokens, dtype=torch.long), **captions())
    assert seen == [torch.float32] * 2
