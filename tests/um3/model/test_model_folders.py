"""Model folders are input: no code of theirs runs, odd files are one line, sizes are checked before memory is used."""

import ast
import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_um3 import make_base
from tests.test_imports import PRODUCT, ROOT
from tests.tokenizer.conftest import GOLDEN
from tokenizer import load
from tokenizer.modeling import load_qlip
from tokenizer.pretrained import load_encoder
from tokenizer.text_tokenizer import train_caption_tokenizer
from train.run_folder import model_digest
from um3.core.errors import UserError
from um3.core.hub import WEIGHTS, save_tokenizer, weights_digest, write_checksums
from um3.inference.pipeline import UM3Pipeline
from um3.model.extend import load_base
from um3.model.language_model import load_model
from um3.model.text_tokenizer import encode_texts, train_text_tokenizer

CHECKED = {"LlamaGenPipeline", "UM3Pipeline", "QLIPProcessor", "super()"}
"""Classes of ours whose `from_pretrained` loads through `um3.core.hub`."""
MAX_LENGTH = 60


def change(path, keys, value):
    values = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(values))


def rewrite(path, **tensors):
    """Replace tensors of a weights file."""
    kept = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def shard(folder):
    """Split the weights of a folder into two files with an index, as large models are saved."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_every_load_of_the_product_passes_the_checked_door():
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            is_load = name == "load_file" or ast.unparse(node.func) == "torch.load"
            if is_load or (name == "from_pretrained" and owner not in CHECKED):
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}")
    assert {line.split(":")[0] for line in found} == {"um3/core/hub.py"}


@pytest.mark.parametrize("part", [".", "qlip"])
def test_the_python_of_a_folder_does_not_run(part, folder, tmp_path):
    save_tokenizer(train_caption_tokenizer(["a disk"], vocab_size=280), folder / "qlip")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as T\n"
    (folder / part / "evil.py").write_text(code)
    for key, value in (("auto_map", {"AutoTokenizer": ["evil.T", "evil.T"]}), ("tokenizer_class", "T")):
        change(folder / part / "tokenizer_config.json", (key,), value)
    with pytest.raises(UserError, match="text tokenizer"):
        UM3Pipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [".", "qlip"])
def test_pickled_weights_are_not_read(part, folder):
    torch.save(load_file(folder / part / WEIGHTS), folder / part / "pytorch_model.bin")
    (folder / part / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        UM3Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "keys", "value", "names"),
    [
        ("config.json", ("hidden_size",), "32", ["config.json", "hidden_size", "'32'"]),
        ("config.json", ("hidden_size",), 10**30, ["config.json"]),
        ("config.json", ("intermediate_size",), 10**9, ["config.json", "mlp", "1000000000"]),
        ("config.json", ("num_hidden_layers",), 10**9, ["config.json", "num_hidden_layers", "1,000,000,000"]),
        ("config.json", ("num_hidden_layers",), 1, ["num_hidden_layers"]),
        ("config.json", ("num_hidden_layers",), 3, ["num_hidden_layers"]),
        ("config.json", ("head_dim",), {}, ["config.json", "head_dim"]),
        ("config.json", ("hidden_act",), "../etc", ["config.json", "../etc"]),
        ("config.json", ("rms_norm_eps",), math.nan, ["config.json", "rms_norm_eps is NaN"]),
        ("config.json", ("rms_norm_eps",), -1e9, ["config.json", "NaN"]),
        ("config.json", ("attn_implementation",), "kernels-community/fa", ["attn_implementation", "kernels-community"]),
        ("config.json", ("attn_implementation",), {"": "a/fa"}, ["attn_implementation", "a/fa"]),
        ("config.json", ("dtype",), "__class__", ["config.json"]),
        ("config.json", ("um3",), {}, ["config.json", "text_vocab_size"]),
        ("config.json", ("um3",), 3, ["config.json", "'um3'"]),
        ("config.json", ("um3", "pad_id"), "x", ["config.json", "pad_id", "'x'"]),
        ("config.json", ("um3", "pad_id"), 10**30, ["config.json", "pad_id"]),
        ("config.json", ("um3", "num_patches"), 0, ["config.json", "num_patches"]),
        ("config.json", ("um3", "text_vocab_size"), 279, ["config.json", "vocab_size"]),
        ("config.json", ("um3", "tokenizer_fingerprint"), None, ["config.json", "tokenizer_fingerprint"]),
        ("config.json", ("um3", "base"), {"entries": "x"}, ["config.json", "base", "'x'"]),
        ("generation_config.json", ("pad_token_id",), "x", ["generation_config.json"]),
        ("tokenizer.json", ("model", "vocab", "a"), 1.5, ["tokenizer.json", "1.5"]),
        ("tokenizer.json", ("model", "vocab", "a"), 4_000_000, ["280 entries", "tokenizer.json"]),
        ("tokenizer.json", ("model",), None, ["tokenizer.json"]),
        ("tokenizer_config.json", ("eos_token",), 1.5, ["tokenizer_config.json", "eos_token"]),
        ("tokenizer_config.json", ("model_max_length",), {"a": 1}, ["tokenizer_config.json"]),
        ("qlip/config.json", ("vision_config", "num_hidden_layers"), 10**6, ["num_hidden_layers", "1,000,000"]),
        ("qlip/config.json", ("vision_config", "patch_size"), 0, ["config.json", "patch_size is 0"]),
        ("qlip/config.json", ("decoder_config", "hidden_size"), 10**30, ["config.json"]),
        ("qlip/config.json", ("decoder_config", "layer_norm_eps"), -1e9, ["qlip", "NaN"]),
        ("qlip/preprocessor_config.json", ("image_std",), [0, 1, 1], ["preprocessor_config.json", "image_std"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:MAX_LENGTH],
)
def test_an_odd_value_is_one_line(file, keys, value, names, folder):
    change(folder / file, keys, value)
    with pytest.raises(UserError) as caught:
        UM3Pipeline.from_pretrained(folder)
    assert all(name in str(caught.value) for name in [str(folder), *names])


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json", "qlip/config.json"])
def test_a_file_that_is_no_json_object_is_one_line(file, content, folder):
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        UM3Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(("part", "name"), [(".", "model.norm.weight"), ("qlip", "visual_projection.bias")])
def test_weights_with_nan_are_refused(part, name, folder):
    tensor = load_file(folder / part / WEIGHTS)[name]
    tensor[3] = math.nan
    rewrite(folder / part / WEIGHTS, **{name: tensor})
    write_checksums(folder)
    with pytest.raises(UserError, match=f"NaN or infinity.*{name}"):
        UM3Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["flipped bit", "cut"])
def test_damaged_weights_are_one_line(damage, folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(folder)


def test_a_head_of_its_own_stays_although_the_config_ties_it(tmp_path, caplog):
    base = make_base("llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path)
    change(tmp_path / "config.json", ("tie_word_embeddings",), True)
    loaded, tokens_BT = load_base(str(tmp_path)), torch.arange(12)[None]
    assert not loaded.config.tie_word_embeddings and "lm_head.weight" in caplog.text
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT).logits, base(tokens_BT).logits)
    # An equal copy of the embedding is a tied head.
    embedding = base.model.embed_tokens.weight.detach()
    rewrite(tmp_path / WEIGHTS, **{"lm_head.weight": embedding.clone()})
    assert load_base(str(tmp_path)).config.tie_word_embeddings


def test_sharded_folders_load_and_have_a_digest(folder, tmp_path):
    whole, single = load_model(folder).model.state_dict(), weights_digest(folder)
    qlip = load_qlip(folder / "qlip").fingerprint()
    assert model_digest(str(folder), made_by="um3-init") == single != ""
    for part in (folder, folder / "qlip"):
        shard(part)
    pipeline = UM3Pipeline.from_pretrained(folder)
    assert pipeline.qlip.fingerprint() == qlip
    assert all(torch.equal(tensor, whole[name]) for name, tensor in pipeline.model.state_dict().items())
    digest = weights_digest(folder)
    assert digest not in (single, "") and model_digest(str(folder), made_by="um3-init") == digest
    assert load_encoder(pipeline.qlip, folder / "qlip")["fresh"] == []
    rewrite(folder / "model-00002-of-00002.safetensors", **{"model.norm.weight": torch.ones(32)})
    assert weights_digest(folder) != digest
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-00002"):
        load_model(folder)


def test_the_saved_tokenizer_does_not_depend_on_its_use(tmp_path):
    tokenizer = train_caption_tokenizer(["a red disk"], vocab_size=280)
    save_tokenizer(tokenizer, tmp_path / "fresh")
    tokenizer(["a red disk", "a"], padding=True, truncation=True, max_length=4)
    save_tokenizer(tokenizer, tmp_path / "used")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fresh" / file).read_bytes() == (tmp_path / "used" / file).read_bytes()


def test_special_names_and_halves_of_surrogates_in_captions_are_text():
    _, processor = load(GOLDEN)
    processor._text_tokenizer = tokenizer = train_caption_tokenizer(["a red disk"], vocab_size=280)
    ids = processor.text(["a <|endoftext|><|startoftext|><|pad|>"])["input_ids"][0].tolist()
    assert [ids.count(special) for special in tokenizer.all_special_ids] == [1, 1, 0]
    assert ids[-1] == tokenizer.eos_token_id
    for encode in (
        lambda text: processor.text([text])["input_ids"].tolist(),
        lambda text: encode_texts([text], tokenizer=tokenizer),
    ):
        assert encode("a \ud83d disk") == encode("a \ufffd disk")
    train_caption_tokenizer(["a \ud83d disk"], vocab_size=280)


def test_a_vocabulary_that_texts_do_not_fill_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(train_text_tokenizer(["a red \ud83d disk"], vocab_size=5000)) < 300
        train_caption_tokenizer(["a red disk"], vocab_size=6000)
    assert "text_vocab_size is 5000" in caplog.text and "text.vocab_size is 6000" in caplog.text
