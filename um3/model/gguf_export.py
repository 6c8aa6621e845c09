"""`um3 gguf`: a UM3 as one GGUF file, for llama.cpp and the programs on it.

The file holds the whole model: text and visual entries, the untied head, and query-key normalisation (a Qwen3). A
visual entry is a control token, `<|visual_S_V|>` for value V of sub-token S. The keys `um3.*` hold the vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quantize
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from um3.core.errors import UserError
from um3.core.files import atomic_file, check_new
from um3.model.configuration import GGUFType
from um3.model.gguf import ARCHITECTURES, DIGITS_PRE_TOKENIZER, ROPE_FACTORS, gguf_names, rope_factors
from um3.model.language_model import LoadedModel, load_model
from um3.model.vocabulary import UnifiedVocabulary

PRE_TOKENIZERS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Rules of a single regular expression, by the names of llama.cpp."""


def export_gguf(folder: str | Path, *, out: str | Path, weights: GGUFType = "f16") -> str:
    """Write the UM3 in `folder` to the file `out` and return a summary for the user.

    `weights` is the type of the matrices. With q8_0 a matrix whose rows are no multiple of 32 stays f16; gains and
    biases are always f32. UserError: `out` exists, or llama.cpp cannot express the model or its tokenizer.
    """
    out = Path(out)
    check_new(out, kind="file")
    loaded = load_model(folder)
    if loaded.ids.depth_layers:
        raise UserError(f"{folder} has a depth head, which llama.cpp lacks; write its text half with um3 export")
    config = loaded.model.config
    file_type = "ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"
    with atomic_file(out) as partial:
        writer = GGUFWriter(partial, config.model_type)
        writer.add_file_type(LlamaFileType[file_type])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _add_config(writer, config)
        _add_vocabulary(writer, loaded)
        sizes = [_add_tensor(writer, name, tensor, weights=weights) for name, tensor in _tensors(loaded)]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    name, size = type(loaded.model).__name__, out.stat().st_size / 1024**2
    return f"{out}: {name}, {config.vocab_size:,} entries, {sum(sizes):,} parameters, {weights}, {size:,.1f} MiB."


def _add_config(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Sizes under llama.cpp's names; UserError for what its layer lacks."""
    kind, rope = config.model_type, config.rope_parameters
    if kind not in ARCHITECTURES:
        raise UserError(f"a '{kind}' model cannot be written as GGUF; only one of: {', '.join(ARCHITECTURES)}")
    if rope["rope_type"] != "default" and (kind, rope["rope_type"]) != ("llama", "llama3"):
        problem = f"llama.cpp's {kind} has no rotary scaling of type '{rope['rope_type']}'"
        raise UserError(f"{problem}; start from a base without it, or from a Llama with qk_norm=false")
    if kind != "qwen2" and getattr(config, "attention_bias", False):
        raise UserError(f"llama.cpp's {kind} has no attention biases; start from another base, or with qk_norm=false")
    if getattr(config, "use_sliding_window", False) or getattr(config, "mlp_bias", False):
        raise UserError("sliding windows and MLP biases cannot be written as GGUF; start from another base")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    base = config.um3.get("base") or {}
    writer.add_name(f"UM3 from {base['name']}" if base.get("name") else "UM3")
    if base.get("license"):
        writer.add_license(base["license"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])


def _add_vocabulary(writer: GGUFWriter, loaded: LoadedModel) -> None:
    """Tokens, merges and special ids; sequences begin with bos. UserError for a tokenizer that GGUF cannot express."""
    ids, tokenizer = loaded.ids, loaded.text_tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = zip(*_entries(tokenizer, ids), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(backend))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(ids.bos_id)
    writer.add_eos_token_id(ids.eos_id)
    writer.add_pad_token_id(ids.pad_id)
    writer.add_add_bos_token(True)
    for name, value in ids.to_dict().items():
        writer.add_uint32(f"um3.{name}", value)
    writer.add_string("um3.tokenizer_fingerprint", loaded.fingerprint)


def _entries(tokenizer: PreTrainedTokenizerBase, ids: UnifiedVocabulary) -> Iterator[tuple[str, int]]:
    """Name and type of every entry, in the order of the ids."""
    names = {index: name for name, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    for index in range(ids.text_vocab_size):
        if index in added:
            yield names[index], TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        else:
            yield names.get(index, f"<|unused_{index}|>"), TokenType.NORMAL if index in names else TokenType.UNUSED
    for subtoken in range(ids.subtokens):
        for value in range(1 << ids.bits_per_subtoken):
            yield f"<|visual_{subtoken}_{value}|>", TokenType.CONTROL


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits text."""
    if backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback"):
        raise UserError("only a byte-level BPE tokenizer can be written as GGUF; start from a base that has one")
    if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # llama.cpp leaves NFC out, as for every Qwen
        raise UserError(f"llama.cpp cannot normalize text by {backend['normalizer']['type']}; start from another base")
    rules = backend["pre_tokenizer"] or {}
    *before, last = rules.get("pretokenizers") or [rules]
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            return "gpt-2"
        if before == [{"type": "Digits", "individual_digits": True}] and last["use_regex"]:
            return DIGITS_PRE_TOKENIZER
        if len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]:
            for name in PRE_TOKENIZERS:
                if before[0]["pattern"] == {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}:
                    return name
    raise UserError("the text tokenizer splits text by a rule that llama.cpp does not know; start from another base")


def _tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as llama.cpp has them. In a Llama's queries and keys it rotates neighbours, not halves."""
    config, names = loaded.model.config, gguf_names(loaded.model)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in loaded.model.named_parameters():
        tensor, part = parameter.detach(), name.split(".")[-2]
        if config.model_type == "llama" and part in heads:
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        yield names[name], tensor
    if config.rope_parameters["rope_type"] == "llama3":
        yield ROPE_FACTORS, rope_factors(config)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, *, weights: GGUFType) -> int:
    """Add a tensor in the wanted type; returns its number of parameters."""
    kind = GGMLQuantizationType[weights.upper()]
    if tensor.dim() < 2:
        kind = GGMLQuantizationType.F32
    elif kind == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, quantize(tensor.to(torch.float32).numpy(), kind), raw_dtype=kind)
    return tensor.numel()
