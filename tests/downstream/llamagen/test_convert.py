"""Released files become model folders, and folders become released files."""

import argparse

import pytest
import torch

from downstream.llamagen.configuration import LlamaGenConfig
from downstream.llamagen.convert import export_released, import_released, main
from downstream.llamagen.modeling import LlamaGen, load_llamagen
from um3.core.errors import UserError
from um3.core.hub import check_weights

SHAPE = {"num_patches": 16, "num_heads": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"caption_width": 8, "max_caption_tokens": 6, "num_patches": 16, "bits_per_subtoken": 5}
    return LlamaGen(LlamaGenConfig(**sizes, **rest, num_key_value_heads=2)).eval()


def write(path, content):
    torch.save(content, path)
    return path


def wrapped(weights, kind):
    """The content of a released file of each training script."""
    return {
        "bare": weights,
        "ddp": {"model": weights, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(gpt_model="XL")},
        "deepspeed": {"module": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}},
        "sampling": {
            "model": weights | {"freqs_cis": torch.zeros(2), "layers.0.attention.kv_cache.k_cache": torch.zeros(1)}
        },
    }[kind]


@pytest.mark.parametrize("kind", ["bare", "ddp", "deepspeed", "sampling"])
def test_a_released_file_becomes_a_folder_with_the_same_outputs(model, tmp_path, kind):
    file = write(tmp_path / "t2i.pt", wrapped(model.state_dict(), kind))
    config = import_released(file, tmp_path / "folder", **SHAPE)
    assert (tmp_path / "folder/SHA256SUMS").is_file()
    check_weights(tmp_path / "folder")
    assert (config.hidden_size, config.num_key_value_heads, config.bits_per_subtoken) == (32, 2, 5)
    loaded = load_llamagen(tmp_path / "folder")
    inputs = {"features_BTC": torch.randn(2, 6, 8), "caption_mask_BT": torch.ones(2, 6)}
    ids_BP = torch.randint(0, 32, (2, 16))
    assert torch.equal(loaded(**inputs, ids_BP=ids_BP), model(**inputs, ids_BP=ids_BP))


def test_the_commands(model, tmp_path, capsys):
    file = write(tmp_path / "t2i.pt", model.state_dict())
    main(["llamagen-import", str(file), str(tmp_path / "folder"), "--patches", "16", "--heads", "4"])
    main(["llamagen-export", str(tmp_path / "folder"), str(tmp_path / "out.pt")])
    assert "licence of its weights" in capsys.readouterr().out
    exported = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())


def test_what_stands_at_the_target_is_kept(model, tmp_path):
    file = write(tmp_path / "t2i.pt", model.state_dict())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="folder already exists; choose another folder"):
        import_released(file, tmp_path / "folder", **SHAPE)
    assert (tmp_path / "folder/thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match=r"t2i\.pt already exists; choose another file"):
        export_released(model, file)
    with pytest.raises(SystemExit):
        main(["llamagen-import", str(file), str(tmp_path / "new"), "--patches", "0"])


def change(weights, name, tensor):
    return {key: value for key, value in (weights | {name: tensor}).items() if value is not None}


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("layers.1.feed_forward.w2.weight", None, r"layers\.1\.feed_forward\.w2\.weight.*missing"),
        ("layers.1.extra.weight", torch.zeros(2), r"layers\.1\.extra\.weight.*unexpected"),
        ("layers.1.ffn_norm.weight", torch.zeros(3), r"ffn_norm.*\(3,\), not \(32,\)"),
        ("cls_embedding.uncond_embedding", None, "text-to-image"),
        ("tok_embeddings.weight", None, "embeddings"),
        ("tok_embeddings.weight", torch.zeros(33, 32), "33 ids"),
    ],
)
def test_wrong_tensors_are_one_line(model, tmp_path, name, tensor, named):
    file = write(tmp_path / "t2i.pt", change(model.state_dict(), name, tensor))
    with pytest.raises(UserError, match=named):
        import_released(file, tmp_path / "folder", **SHAPE)
    assert not (tmp_path / "folder").exists()


def test_a_class_conditional_file_a_pickled_object_and_wrong_sizes_are_refused(model, tmp_path):
    weights = change(model.state_dict(), "cls_embedding.uncond_embedding", None)
    file = write(tmp_path / "c2i.pt", weights | {"cls_embedding.embedding_table.weight": torch.zeros(11, 32)})
    with pytest.raises(UserError, match="class-conditional"):
        import_released(file, tmp_path / "folder", **SHAPE)
    file = write(tmp_path / "hostile.pt", {"model": model.state_dict(), "args": print})
    with pytest.raises(UserError, match="tensors only"):
        import_released(file, tmp_path / "folder", **SHAPE)
    file = write(tmp_path / "t2i.pt", model.state_dict())
    for sizes in ({"num_patches": 17}, {"num_heads": 5}, {"subtokens": 3}):
        with pytest.raises(UserError, match="correct"):
            import_released(file, tmp_path / "folder", **SHAPE | sizes)
