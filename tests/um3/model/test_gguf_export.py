"""A UM3 as GGUF: read back by transformers and, where it is installed, by llama.cpp it is the same model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tests.helpers.tiny_um3 import LLAMA_3_ROPE, make_base
from um3.core.errors import UserError
from um3.inference.generate import Sampler
from um3.inference.grammar import Grammar
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.extend import extend_model, load_base
from um3.model.gguf import rope_factors
from um3.model.gguf_export import export_gguf
from um3.model.language_model import load_model, save_model
from um3.model.qk_norm import insert_qk_norm
from um3.model.text_tokenizer import (
    encode_captions,
    encode_texts,
    make_vocabulary,
    read_text_tokenizer,
    train_text_tokenizer,
)

TEXTS = ["the quick  brown fox", "x =  12, 3456\n\n  7 don't", "é ü 日本 <|end_of_text|>", " a\tb \r\n"]
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, False),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3_ROPE}, False),
    "llama with qk-norm": ("llama", {}, True),
    "qwen2": ("qwen2", {"head_dim": 16}, False),
    "qwen3": ("qwen3", {"head_dim": 16}, True),
}
SPLITS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
for name in ("llama-bpe", "qwen2"):
    rule = Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    SPLITS[name] = Sequence([rule, ByteLevel(add_prefix_space=False, use_regex=False)])


def save_um3(
    folder: Path, *, model: str, qlip_folder: Path, split: str = "gpt-2", change: Any = None, **options: Any
) -> Path:
    """A UM3 from a tiny base with random weights, large enough for clear choices, and 4 visual ids an image."""
    kind, sizes, qk_norm = MODELS[model]
    tokenizer = train_text_tokenizer(["the quick brown fox  12 345  6789 don't"] * 40, vocab_size=280)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[split]
    if change is not None:
        change(tokenizer.backend_tokenizer)
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)  # transformers' class for Qwen2 expects it
    ids = make_vocabulary(tokenizer, subtokens=4, bits_per_subtoken=7, num_patches=4)
    base = make_base(kind, **{"vocab_size": ids.text_vocab_size, "hidden_size": 64, **sizes, **options})
    um3 = extend_model(insert_qk_norm(base) if qk_norm else base, ids=ids, new_token_init="random")
    save_model(folder, model=um3, text_tokenizer=tokenizer, ids=ids, visual_tokenizer=qlip_folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_read_back_it_gives_the_same_logits_and_tokens(model: str, qlip_folder: Path, tmp_path: Path) -> None:
    folder = save_um3(tmp_path / "model", model=model, qlip_folder=qlip_folder)
    summary = export_gguf(folder, out=tmp_path / "um3.gguf", weights="f32")
    loaded = load_model(folder)
    assert f"{loaded.ids.vocab_size:,} entries" in summary and type(loaded.model).__name__ in summary
    if model == "llama 3":  # its original context is not Llama 3's own, so that only the factors can be compared
        with pytest.raises(UserError, match=r"rope_freqs\.weight"):
            load_base(str(tmp_path / "um3.gguf"))
        stored = next(x for x in gguf.GGUFReader(tmp_path / "um3.gguf").tensors if x.name == "rope_freqs.weight")
        assert torch.equal(torch.tensor(stored.data), rope_factors(loaded.model.config))
        return
    read = load_base(str(tmp_path / "um3.gguf"))
    input_ids = torch.randint(0, loaded.ids.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.model(input_ids).logits
        torch.testing.assert_close(read(input_ids).logits, logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.5  # of a model whose parts all matter


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_and_the_vocabulary_are_in_the_file(split: str, qlip_folder: Path, tmp_path: Path) -> None:
    folder = save_um3(tmp_path / "model", model="llama", qlip_folder=qlip_folder, split=split)
    export_gguf(folder, out=tmp_path / "um3.gguf")
    loaded, tokenizer = load_model(folder), read_text_tokenizer(tmp_path / "um3.gguf")
    tokens = encode_texts(TEXTS, tokenizer=loaded.text_tokenizer)
    assert encode_texts(TEXTS, tokenizer=tokenizer) == tokens
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS["gpt-2"]
    assert (encode_texts(TEXTS, tokenizer=tokenizer) == tokens) == (split == "gpt-2")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "um3.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == split
    assert {name: fields[f"um3.{name}"] for name in loaded.ids.to_dict()} == loaded.ids.to_dict()
    assert fields["um3.tokenizer_fingerprint"] == loaded.fingerprint
    stored, first = fields["tokenizer.ggml.tokens"], loaded.ids.subtoken_range(2)[0]
    assert len(set(stored)) == loaded.ids.vocab_size and stored[first + 5] == "<|visual_2_5|>"
    special = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert special == [loaded.ids.bos_id, loaded.ids.eos_id, loaded.ids.pad_id]
    assert tokenizer(TEXTS[0])["input_ids"][0] == loaded.ids.bos_id  # sequences begin with it


@pytest.mark.parametrize(("weights", "bytes_each"), [("f32", 4), ("f16", 2), ("bf16", 2), ("q8_0", 34 / 32)])
def test_the_type_of_the_matrices(weights: Any, bytes_each: float, qlip_folder: Path, tmp_path: Path) -> None:
    """The rows of 48 of one matrix are not divisible into blocks of 32."""
    folder = save_um3(tmp_path / "model", model="qwen3", qlip_folder=qlip_folder)
    export_gguf(folder, out=tmp_path / "um3.gguf", weights=weights)
    types = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "um3.gguf").tensors}
    for name, tensor in types.items():
        if tensor.name.endswith("norm.weight"):
            expected = "F32"
        else:
            expected = "F16" if weights == "q8_0" and "ffn_down" in name else weights.upper()
        assert tensor.tensor_type.name == expected, name
    assert types["output.weight"].n_bytes == types["output.weight"].n_elements * bytes_each
    exact, read = load_model(folder).model.lm_head.weight, load_base(str(tmp_path / "um3.gguf")).lm_head.weight
    error = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}[weights]
    assert (read - exact).abs().max() <= error * exact.abs().max()


def test_what_llama_cpp_cannot_express_is_one_line(qlip_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("rotary scaling of type 'llama3'", {"model": "llama with qk-norm", "rope_parameters": LLAMA_3_ROPE}),
        (
            "rotary scaling of type 'linear'",
            {"model": "llama", "rope_parameters": {**LLAMA_3_ROPE, "rope_type": "linear"}},
        ),
        ("attention biases", {"model": "llama", "attention_bias": True}),
        ("MLP biases", {"model": "llama", "mlp_bias": True}),
        ("splits text", {"model": "llama", "change": lambda x: setattr(x, "pre_tokenizer", ByteLevel())}),
        ("Lowercase", {"model": "llama", "change": lambda x: setattr(x, "normalizer", normalizers.Lowercase())}),
    ]
    for index, (message, options) in enumerate(cases):
        folder = save_um3(tmp_path / str(index), qlip_folder=qlip_folder, **options)
        with pytest.raises(UserError, match=message):
            export_gguf(folder, out=tmp_path / "um3.gguf")
    (tmp_path / "taken.gguf").touch()
    with pytest.raises(UserError, match="already exists"):
        export_gguf(folder, out=tmp_path / "taken.gguf")
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["taken.gguf"]  # nothing half written


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_samples_the_same_images(model: str, qlip_folder: Path, tmp_path: Path) -> None:
    """Greedily, under the grammar, from its own tokens of the prompts."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = save_um3(tmp_path / "model", model=model, qlip_folder=qlip_folder)
    export_gguf(folder, out=tmp_path / "um3.gguf", weights="f32")
    loaded = load_model(folder)
    ids, grammar = loaded.ids, Grammar(loaded.ids)
    llama = llama_cpp.Llama(str(tmp_path / "um3.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    captions = ["the quick brown fox", "fox  12 345 6789 don't", "ü"]
    prompts = [
        sequences.image_prompt(tokens, ids=ids) for tokens in encode_captions(captions, tokenizer=loaded.text_tokenizer)
    ]
    sampled = Sampler(loaded.model, ids=ids).images(
        prompts=prompts, sampling=Sampling(temperature=0), uniforms_BP=torch.zeros(len(prompts), ids.image_tokens)
    )
    for caption, expected in zip(captions, sampled.visual_ids.tolist(), strict=True):
        so_far = [*llama.tokenize(" ".join(caption.split()).encode()), ids.begin_of_image_id]
        llama.reset()
        llama.eval(so_far)
        for _ in range(ids.image_tokens):
            allowed = grammar.allowed(so_far)
            assert allowed is not None
            logits = llama.scores[llama.n_tokens - 1][allowed.start : allowed.stop]
            so_far.append(allowed.start + int(np.argmax(logits)))
            llama.eval(so_far[-1:])
        assert so_far[-ids.image_tokens :] == expected
    llama.close()
