"""Tiny GGUF files of Llamas and Qwens, written tensor by tensor with the names that llama.cpp gives them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`."""
    name, suffix = name.rsplit(".", 1)
    parts = name.split(".")
    return f"{TOP[name] if name in TOP else f'blk.{parts[2]}.{PARTS[parts[-1]]}'}.{suffix}"


def rotated_in_pairs(weight: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of llama.cpp's converter for Llamas."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: str = "F32",
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """Write a base; `values` add or replace metadata and `tensors` tensors, None removes them."""
    config, kind = base.config, base.config.model_type
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, added = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), tokenizer.added_tokens_decoder
    types = [gguf.TokenType.CONTROL if index in added else gguf.TokenType.NORMAL for index in range(len(tokens))]
    metadata: dict[str, Any] = {
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.key_length": config.head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{kind}.rope.dimension_count": config.head_dim,
        f"{kind}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{kind}.vocab_size": config.vocab_size,
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(part) for part in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    } | dict(values or {})
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", kind))
    for key, value in metadata.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    stored = {gguf_name(name): tensor.detach().float() for name, tensor in base.named_parameters()}
    for name, tensor in (stored | dict(tensors or {})).items():
        part = name.split(".")[-2]
        if tensor is None:
            continue
        if kind == "llama" and part in heads and name.endswith("weight"):
            tensor = rotated_in_pairs(tensor, heads=heads[part])
        type_ = gguf.GGMLQuantizationType[weights if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
