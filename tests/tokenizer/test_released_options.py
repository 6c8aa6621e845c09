"""Options in the configs of model folders: the released code's are accepted, unknown ones are one-line errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tokenizer.conftest import GOLDEN, change_json
from tokenizer import QLIPProcessor, load
from tokenizer.modeling import load_qlip
from um3.core.errors import UserError

RELEASED_QUANTIZER = {
    "embed_dim": 28, "group_size": 1, "soft_entropy": True, "beta": 0.25, "gamma_0": 1.0, "gamma_1": 0.5,
    "input_format": "bchw", "persample_entropy_compute": "analytical", "l2_norm": True, "inv_temperature": 100.0,
}  # fmt: skip
BSQ_VIT_QUANTIZER = {
    "embed_dim": 28, "beta": 0.0, "gamma0": 2.0, "gamma": 3.0, "zeta": 0.1, "group_size": 1, "soft_entropy": True,
    "persample_entropy_compute": "group", "cb_entropy_compute": "nce",
}  # fmt: skip
CLIP_CONFIG = {
    "dropout": 0.0, "attention_dropout": 0.1, "initializer_factor": 1.0, "num_beams": 4, "torchscript": False,
    "pruned_heads": {}, "tie_word_embeddings": True, "_name_or_path": "x", "torch_dtype": "float32", "unheard_of": None,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden folder, in the released layout."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "qlip"))


@pytest.mark.parametrize(
    ("options", "gammas"), [(RELEASED_QUANTIZER, (1.0, 0.5)), (BSQ_VIT_QUANTIZER, (2.0, 3.0))], ids=["qlip", "bsq_vit"]
)
def test_options_of_the_released_quantizers_change_no_output(options, gammas, folder):
    golden = load_file(GOLDEN / "golden.safetensors")
    change_json(
        folder / "config.json", vision_config={"quantizer_cfg": options, **CLIP_CONFIG}, text_config=CLIP_CONFIG
    )
    model = load_qlip(folder).eval()
    quantizer = model.vision_model.quantizer
    assert (quantizer.gamma0, quantizer.gamma1) == gammas
    assert quantizer.inv_temperature == options.get("inv_temperature", 1.0)
    with torch.no_grad():
        output = model(golden["pixel_values"], golden["input_ids"])
    for name in ("image_embeds", "text_embeds", "reconstructions", "quantized"):
        torch.testing.assert_close(output[name], golden[name], atol=1e-6, rtol=1e-5)
    model.save_pretrained(folder.parent / "again")
    assert load_qlip(folder.parent / "again").fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"vision_config": {"quantizer_cfg": {"embed_dim": 28, "mystery": 0}}}, ["quantizer_cfg", "mystery"]),
        ({"vision_config": {"quantizer_cfg": {"embed_dim": "28"}}}, ["quantizer_cfg.embed_dim", "'28'"]),
        ({"vision_config": {"quantizer_cfg": {"embed_dim": 28, "group_size": 0}}}, ["quantizer_cfg.group_size"]),
        ({"vision_config": {"quantizer_cfg": {"embed_dim": 28, "gamma": [1]}}}, ["quantizer_cfg.gamma"]),
        ({"vision_config": {"quantizer_cfg": {"embed_dim": 28, "l2_norm": False}}}, ["quantizer_cfg.l2_norm"]),
        ({"vision_config": {"quantizer_cfg": [1]}}, ["quantizer_cfg"]),
        ({"vision_config": {"quantizer": "fsq"}}, ["vision_config", "'fsq'"]),
        ({"vision_config": {"window_size": 7}}, ["vision_config", "window_size=7"]),
        ({"text_config": {"attention_window": 7}}, ["text_config", "attention_window=7"]),
        ({"decoder_config": {"post_norm": True}}, ["decoder_config", "post_norm=True"]),
        ({"decoder_config": {"patch_size": 7}}, ["image_size 32", "patch_size 7"]),
        ({"decoder_config": {"overlap": 9}}, ["overlap 9", "patch_size 8"]),
        ({"vision_config": {"image_size": 36}}, ["image_size 36", "patch_size 8"]),
        ({"text_config": {"num_attention_heads": 5}}, ["hidden_size 48", "num_attention_heads 5"]),
        ({"text_config": {"hidden_size": "wide"}}, ["hidden_size"]),
        ({"text_config": {"eos_token_id": [1, 2]}}, ["text_config.eos_token_id", "[1, 2]"]),
        ({"temporal_layers": 2}, ["config.json", "temporal_layers=2"]),
        ({"model_type": "bert", "architectures": ["Bert"]}, ["'bert' model"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_an_unknown_option_or_a_wrong_value_is_one_line(change, names, folder):
    change_json(folder / "config.json", **change)
    for loads in (load_qlip, load):
        with pytest.raises(UserError) as caught:
            loads(folder)
        assert all(name in str(caught.value) for name in [*names, str(folder)])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([], ["must hold an object"]),
        ({"image_mean": None}, ["image_mean", "three numbers"]),
        ({"image_std": [1, 2]}, ["image_std", "three numbers"]),
        ({"image_mean": "abc"}, ["image_mean", "three numbers"]),
        ({"do_normalize": False}, ["do_normalize"]),
        ({"do_pad_to_square": True}, ["do_pad_to_square"]),
    ],
)
def test_a_processor_file_with_other_options_is_one_line(values, names, folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        QLIPProcessor.from_pretrained(folder)
    assert all(name in str(caught.value) for name in [*names, str(path)])
