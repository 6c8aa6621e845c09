"""Tiny vocabularies and language models for tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tokenizer.modeling import load_qlip
from um3.core.files import write_json
from um3.model.configuration import ModelConfig
from um3.model.language_model import build_model, save_model
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer
from um3.model.vocabulary import UnifiedVocabulary


def make_ids(
    *,
    subtokens: int = 4,
    bits_per_subtoken: int = 7,
    num_patches: int = 16,
    text_vocab_size: int = 50,
    depth_layers: int = 0,
) -> UnifiedVocabulary:
    """A vocabulary with bos, eos, pad, <boi>, <eoi> = 0 .. 4."""
    special_ids = ("bos_id", "eos_id", "pad_id", "begin_of_image_id", "end_of_image_id")
    return UnifiedVocabulary(
        text_vocab_size=text_vocab_size,
        subtokens=subtokens,
        bits_per_subtoken=bits_per_subtoken,
        num_patches=num_patches,
        depth_layers=depth_layers,
        **{name: index for index, name in enumerate(special_ids)},
    )


def make_model(ids: UnifiedVocabulary, *, scale: float = 1.0, seed: int = 0, **sizes: Any) -> hf.PreTrainedModel:
    """A model with random weights; a `scale` of 8 or more moves its greedy choices far apart."""
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config |= {"intermediate_size": 48, "max_position_embeddings": 64}
    model = build_model(ModelConfig(**config | sizes), ids=ids).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(scale)
    return model


TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("square", "disk")] * 3
LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
BASES: dict[str, tuple[Any, Any]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
}


def make_base(kind: str, **options: Any) -> hf.PreTrainedModel:
    """A stock Llama or Qwen with random weights, biases and gains."""
    sizes = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    config_class, model_class = BASES[kind]
    base: hf.PreTrainedModel = model_class(config_class(**sizes | options)).eval()
    for name, parameter in base.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return base


def save_um3(
    folder: Path, *, qlip_folder: Path, texts: Iterable[str] = TEXTS, bits: tuple[int, int] = (4, 7), **options: Any
) -> Path:
    """Write a UM3 over a QLIP, with random weights and `bits` (sub-tokens, bits of each), to `folder`/model."""
    text_tokenizer, image = train_text_tokenizer(texts, vocab_size=280), load_qlip(qlip_folder).num_patches
    ids = make_vocabulary(text_tokenizer, subtokens=bits[0], bits_per_subtoken=bits[1], num_patches=image)
    parts: dict[str, Any] = {"text_tokenizer": text_tokenizer, "ids": ids, "visual_tokenizer": qlip_folder}
    save_model(folder / "model", model=make_model(ids, **options), **parts)
    return folder / "model"


def save_language_model(folder: Path, *, kind: str = "llama", **options: Any) -> Path:
    """Write a stock language model with random weights and a byte-level tokenizer, which adds bos, to `folder`."""
    tokenizer = train_text_tokenizer(TEXTS, vocab_size=280)
    tokenizer.add_bos_token = True
    model = make_base(kind, vocab_size=280, max_position_embeddings=512, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Settings of sampling without sampling, as Vicuna's: transformers refuses to save them.
    write_json(folder / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "do_sample": False})
    return folder
