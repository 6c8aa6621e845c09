"""Towers from published layouts: generated files with EVA's names, and transformers' own CLIP."""

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tokenizer.conftest import tiny_config
from tokenizer.modeling import QLIPModel
from tokenizer.pretrained import load_encoder, load_text_tower
from um3.core.errors import UserError

EVA_NAMES = {
    "encoder.layers.": "blocks.", "self_attn.": "attn.", "layer_norm": "norm", "attn.q_proj.bias": "attn.q_bias",
    "attn.v_proj.bias": "attn.v_bias", "attn.out_proj": "attn.proj", "post_layernorm": "norm",
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
}  # fmt: skip


def eva_file(qlip, path, *, prefix=""):
    """Write the encoder of `qlip` as EVA publishes one: its names, separate q and v biases, a head and tables."""
    table = {name: torch.zeros(4, 16) for name in ("mask_token", "head.weight", "rope.freqs_cos")}
    for name, tensor in qlip.vision_model.named_parameters():
        for ours, published in EVA_NAMES.items():
            name = name.replace(ours, published)
        if not name.startswith("quant"):
            extra = {"cls_token": (None, None), "pos_embed": (None,)}.get(name, ())
            table[prefix + name] = tensor[extra].detach().clone()
    if prefix:
        table["text.positional_embedding"] = torch.zeros(3)
    if path.suffix == ".pt":
        torch.save({"module": table}, path)
    else:
        save_file(table, path)
    return path


def fresh(config=None):
    torch.manual_seed(1)
    return QLIPModel(config or tiny_config()).eval()


@pytest.mark.parametrize(("name", "prefix"), [("mim.pt", ""), ("clip.safetensors", "visual.")])
def test_an_eva_encoder_gives_the_same_features(name, prefix, tiny_qlip, tmp_path):
    qlip, pixels = fresh(), torch.randn(2, 3, 16, 16)
    assert not torch.allclose(qlip.vision_features(pixels), tiny_qlip.vision_features(pixels))
    report = load_encoder(qlip, eva_file(tiny_qlip, tmp_path / name, prefix=prefix))
    torch.testing.assert_close(qlip.vision_features(pixels), tiny_qlip.vision_features(pixels))
    assert report["fresh"] == [] and report["resampled"] == [] and len(report["loaded"]) > 15


def test_the_encoder_of_a_qlip_folder_is_loaded_too(tiny_qlip, tmp_path):
    tiny_qlip.save_pretrained(tmp_path)
    qlip, pixels = fresh(), torch.randn(2, 3, 16, 16)
    report = load_encoder(qlip, tmp_path)
    torch.testing.assert_close(qlip.vision_features(pixels), tiny_qlip.vision_features(pixels))
    assert report["fresh"] == [] and not torch.equal(qlip.encode(pixels), tiny_qlip.encode(pixels))
    finer = load_encoder(fresh(tiny_config(patch_size=4)), tmp_path)
    assert len(finer["resampled"]) == 2 and finer["fresh"] == []
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no QLIP encoder"):
        load_encoder(qlip, tmp_path)


def test_an_encoder_on_the_hub_is_read_from_the_cache(tiny_qlip, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "models--owner--eva", "0" * 40
    for folder in ("refs", f"snapshots/{commit}/files"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    eva_file(tiny_qlip, repo / f"snapshots/{commit}/files/eva.pt")
    assert load_encoder(fresh(), "owner/eva/files/eva.pt")["fresh"] == []
    for wrong in ("owner/eva/other.pt", "no one/eva/eva.pt"):
        with pytest.raises(UserError, match=f"{wrong} .*OWNER/NAME/FILE"):
            load_encoder(fresh(), wrong)


def test_finer_patches_keep_the_output_of_a_uniform_patch(tiny_qlip, tmp_path):
    qlip = fresh(tiny_config(patch_size=4))
    report = load_encoder(qlip, eva_file(tiny_qlip, tmp_path / "eva.pt"))
    resampled = {name.removeprefix("vision_model.embeddings.") for name in report["resampled"]}
    assert resampled == {"position_embedding.weight", "patch_embedding.weight"}
    old, new = tiny_qlip.vision_model.embeddings, qlip.vision_model.embeddings
    uniform = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(new.patch_embedding(uniform)[0, :, 0, 0], old.patch_embedding(uniform)[0, :, 0, 0])
    assert torch.equal(new.position_embedding.weight[0], old.position_embedding.weight[0])
    means = [embeddings.position_embedding.weight[1:].mean(0) for embeddings in (old, new)]
    torch.testing.assert_close(*means, atol=0.02, rtol=0)


def test_tensors_that_a_file_lacks_are_reported_and_fresh(tiny_qlip, tmp_path):
    path = eva_file(fresh(tiny_config(subln=False)), tmp_path / "eva.pt")
    report = load_encoder(tiny_qlip, path)
    names = {name.removeprefix("vision_model.encoder.layers.0.").rpartition(".")[0] for name in report["fresh"]}
    assert names == {"self_attn.inner_attn_ln", "mlp.ffn_ln"} and len(report["fresh"]) == 4


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, {"intermediate_size": 40}, r"mlp.ffn_ln.bias is \(48,\) in the file and \(40,\) in this QLIP"),
        (None, {"swiglu": False, "subln": True}, "lacks 6 of its tensors"),
        ({"layer.weight": torch.zeros(2)}, {}, r"no tensor for 'layer\.weight'"),
        ({"weights": [torch.zeros(2)]}, {}, "no table of tensors"),
        (b"no tensors", {}, "cannot be read as tensors only"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(content, changes, message, tiny_qlip, tmp_path):
    path = eva_file(tiny_qlip, tmp_path / "eva.pt")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_encoder(fresh(tiny_config(**changes)), path)
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        load_encoder(tiny_qlip, tmp_path / "nowhere.pt")


def test_the_text_tower_of_transformers_clip_gives_the_same_embeddings(tiny_qlip, tmp_path):
    options = tiny_qlip.config.text_tower.to_dict() | {"projection_dim": 24, "layer_norm_eps": 1e-5}
    torch.manual_seed(2)
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**options)).eval()
    clip.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9, 299], [1, 7, 299, 0]])
    report = load_text_tower(tiny_qlip, tmp_path)
    assert report["fresh"] == []
    with torch.inference_mode():
        expected = F.normalize(clip(input_ids=ids).text_embeds, dim=-1)
        torch.testing.assert_close(tiny_qlip.get_text_features(ids), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"CLIP .*nowhere"):
        load_text_tower(tiny_qlip, tmp_path / "nowhere")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        load_text_tower(tiny_qlip, tmp_path)
    torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_text_tower(tiny_qlip, tmp_path) == report
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no text tower"):
        load_text_tower(tiny_qlip, tmp_path)
