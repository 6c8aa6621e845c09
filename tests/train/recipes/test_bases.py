"""Language models of every kind that UM3 can start from, and their faults, by `um3-init` and by `um3` itself.

The folders are those that transformers writes, with random weights.
"""

import json

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_mix.batches.token_stream import TokenFile
from eval.lm import UM3LM
from tests.helpers.language_items import PAIRS, requests
from tests.helpers.tiny_um3 import LLAMA_3_ROPE, make_base
from tests.tokenizer.conftest import change_json
from tests.train.conftest import train_here
from tests.um3.model.test_model_folders import shard
from tests.um3.model.test_um3_init import byte_tokenizer, command
from train.phase import main as init
from um3.core.errors import UserError
from um3.inference.pipeline import UM3Pipeline
from um3.model.export import export_text_half
from um3.model.language_model import load_model

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
ENTRIES = 303
START, END, END_OF_TEXT = 300, 301, 302
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def save_base(folder, *, kind="llama", bos=True, **options):
    """A base whose tokenizer has 300 words and the special tokens; begins with <|im_start|>, ends with <|im_end|>."""
    base = make_base(kind, **{"vocab_size": ENTRIES, "bos_token_id": START, "eos_token_id": END} | options)
    base.save_pretrained(folder)
    byte_tokenizer(words=300, specials=SPECIALS, bos=bos, padding=True).save_pretrained(folder)
    return base


@pytest.fixture
def texts(tmp_path):
    path, line = tmp_path / "prose.jsonl", "The quick brown fox jumps over the lazy dog; nobody asks why."
    path.write_text("".join(json.dumps({"text": f"{number}. {line}"}) + "\n" for number in range(60)))
    return path


def start(base, *, made, texts, out, qk_norm=False, options=""):
    """The model that `um3-init` writes."""
    settings = ["loop.max_steps=1", f"qk_norm={str(qk_norm).lower()}", *options.split()]
    init(command(base, made / "stage2/model", texts, out, *settings))
    return out / "model"


def train(base, *, made, texts, out, options=""):
    """The model of one step of `um3` on a base."""
    options += f" model.base_model={base} loop.max_steps=1 vocabulary.bit_embeddings=false model.qk_norm=false"
    train_here("um3", made, out, *options.split(), f"data.texts=[{{name: prose, path: {texts}, val_fraction: 0}}]")
    return out / "model"


@torch.no_grad()
def logits(folder):
    """Logits of the base's entries on a text of 100 tokens, by stock transformers."""
    input_ids = torch.randint(0, ENTRIES, (1, 100), generator=torch.Generator().manual_seed(0))
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids).logits[..., :ENTRIES].float()


def yarn(**options):
    return {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32} | options


def rewrite_generation(**options):
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(options))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param({"rope_parameters": LLAMA_3_ROPE}, None, id="llama 3 rope"),
        pytest.param({"rope_parameters": yarn(beta_fast=16.0)}, None, id="yarn"),
        pytest.param({"rope_parameters": yarn(rope_type="linear")}, None, id="linear rope"),
        pytest.param({"rope_parameters": yarn(), "kind": "qwen2"}, None, id="yarn in qwen2"),
        pytest.param({"head_dim": 16, "tie_word_embeddings": True}, None, id="head_dim is not width / heads"),
        pytest.param({"mlp_bias": True, "attention_bias": True}, None, id="biases"),
        pytest.param({"vocab_size": 320}, None, id="padding rows"),
        pytest.param({"vocab_size": 320, "kind": "qwen2", "bos": False}, None, id="padding rows, no bos"),
        pytest.param({}, shard, id="shards"),
        pytest.param({}, rewrite_generation(do_sample=False, temperature=0.6, top_p=0.9), id="unsavable generation"),
        pytest.param({}, rewrite_generation(eos_token_id=[END, END_OF_TEXT], bos_token_id=START), id="two ends"),
        pytest.param({"eos_token_id": [END, END_OF_TEXT]}, None, id="two ends in the config"),
    ],
)
def test_a_base_of_any_kind_keeps_its_text_logits(options, change, made, texts, tmp_path):
    """Also through the export; `generate()` and our own sampling end with the tokenizer's own end of text."""
    save_base(tmp_path / "base", **options)
    expected = logits(tmp_path / "base")
    if change:
        change(tmp_path / "base")
    folder = start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out")
    assert torch.equal(logits(folder), expected)
    base, extended = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "base", folder))
    assert extended["rope_parameters"] == base["rope_parameters"]
    loaded = load_model(folder)
    ends = [loaded.ids.eos_id, loaded.model.generation_config.eos_token_id, loaded.model.config.eos_token_id]
    assert ends == [END] * 3 and loaded.ids.begin_of_image_id == ENTRIES
    export_text_half(folder, out=tmp_path / "plain")
    assert torch.equal(logits(tmp_path / "plain"), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"rope_parameters": LLAMA_3_ROPE, "head_dim": 16}),
        ("llama", {"rope_parameters": yarn(beta_fast=16.0), "attention_bias": True}),
        ("qwen2", {"rope_parameters": yarn()}),
    ],
)
def test_an_inserted_normalisation_keeps_the_rest_of_the_layer(kind, options, made, texts, tmp_path):
    base = save_base(tmp_path / "base", kind=kind, **options)
    model = load_model(start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out", qk_norm=True)).model
    assert model.config.model_type == "qwen3" and dict(model.config.rope_parameters) == options["rope_parameters"]
    assert model.config.head_dim == options.get("head_dim", 8)
    weights = model.state_dict()
    for name, tensor in base.model.layers.state_dict(prefix="model.layers.").items():
        assert torch.equal(weights[name], tensor) or "q_proj" in name or "k_proj" in name
    x_BTD, positions_BT = torch.zeros(1, 100, 32), torch.arange(100)[None]
    tables = zip(model.model.rotary_emb(x_BTD, positions_BT), base.model.rotary_emb(x_BTD, positions_BT), strict=True)
    assert all(torch.equal(*table) for table in tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_computed_in_float32_and_keeps_its_type(dtype, made, texts, tmp_path):
    save_base(tmp_path / "base").to(dtype).save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base/model.safetensors")
    after = load_file(start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())
    trained = load_file(train(tmp_path / "base", made=made, texts=texts, out=tmp_path / "um3") / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_mlp_biases_rule_out_an_inserted_normalisation(made, texts, tmp_path):
    save_base(tmp_path / "base", mlp_bias=True)
    with pytest.raises(UserError, match=r"MLP biases.*qk_norm=false"):
        start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out", qk_norm=True)


def test_weights_beyond_float16_are_one_line(made, texts, tmp_path):
    base = save_base(tmp_path / "base")
    base.model.layers[0].mlp.up_proj.weight.data.mul_(1e6)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"up_proj\.weight of .*base does not fit float16; set dtype=bfloat16"):
        start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out", options="dtype=float16")


def test_without_a_bos_token_sequences_begin_as_the_bases_config_says(made, texts, tmp_path):
    """As of Qwen's chat models: texts end with <|im_end|>, but <|endoftext|> stood between documents in training."""
    save_base(tmp_path / "base", kind="qwen2", bos=False, bos_token_id=END_OF_TEXT)
    folder = train(tmp_path / "base", made=made, texts=texts, out=tmp_path / "um3")
    pipeline = UM3Pipeline.from_pretrained(folder)
    assert (pipeline.ids.bos_id, pipeline.ids.eos_id) == (END_OF_TEXT, END)
    (cache,) = (tmp_path / "um3/cache").glob("text-prose-*.bin")
    stream = TokenFile(cache)[:].tolist()
    assert stream.count(END) == 60
    assert all(stream[index + 1] == END_OF_TEXT for index, token in enumerate(stream[:-1]) if token == END)
    scorer = UM3LM(pipeline.model, tokenizer=pipeline.text_tokenizer, batch_size=1)
    assert scorer.prefix_token_id == END_OF_TEXT and scorer._encode_pair("a", " b")[0][0] == END_OF_TEXT
    export_text_half(folder, out=tmp_path / "plain")
    stock = HFLM(str(tmp_path / "plain"), device="cpu", batch_size=1, add_bos_token=True)
    ours, theirs = (lm.loglikelihood(requests(PAIRS), disable_tqdm=True) for lm in (scorer, stock))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    # Saving and the token do not change what the tokenizer does with a text.
    before, after = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "base", folder))
    assert (before.bos_token, after.bos_token) == (None, "<|endoftext|>")
    assert before("a fox")["input_ids"] == after("a fox")["input_ids"]


@pytest.mark.parametrize("named", [None, 5])
def test_without_any_bos_token_sequences_begin_with_the_end(named, made, texts, tmp_path):
    """The config's id counts only if it is a special token: Llama's default is 1, a word."""
    save_base(tmp_path / "base", bos=False, bos_token_id=named)
    ids = load_model(start(tmp_path / "base", made=made, texts=texts, out=tmp_path / "out")).ids
    assert ids.bos_id == ids.eos_id == END


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def in_shards(change):
    def apply(folder):
        shard(folder)
        change(folder)

    return apply


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_rows(folder):
    """An embedding that is smaller than the tokenizer."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:290].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", vocab_size=290)


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
LFS = r" is a git-LFS pointer, not the file; run `git lfs pull`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(pointer("model.safetensors"), "model.safetensors" + LFS, id="pointer to weights"),
        pytest.param(pointer("tokenizer.json"), "tokenizer.json" + LFS, id="pointer to the tokenizer"),
        pytest.param(pointer("config.json"), "/config.json" + LFS, id="pointer to the config"),
        pytest.param(in_shards(pointer(SHARD)), SHARD + LFS, id="pointer to a shard"),
        pytest.param(in_shards(pointer(INDEX)), INDEX + LFS, id="pointer to the index"),
        pytest.param(in_shards(lambda folder: (folder / SHARD).unlink()), f"{SHARD} of .* does not exist", id="shard"),
        pytest.param(pickle_only, r"no model\.safetensors, and pytorch_model\.bin, a pickle", id="pickle"),
        pytest.param(cut_rows, "303 entries, but the base only 290 rows", id="tokenizer beyond the embedding"),
    ],
)
def test_a_fault_of_a_base_is_one_line(change, message, made, texts, tmp_path):
    save_base(tmp_path / "base")
    change(tmp_path / "base")
    for door in (start, train):
        with pytest.raises(UserError, match=message):
            door(tmp_path / "base", made=made, texts=texts, out=tmp_path / door.__name__)
        assert not (tmp_path / door.__name__ / "model").exists()
