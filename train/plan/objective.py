"""The objective of UM3's training on the meta device: its parameters have shapes and names, but no memory."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tokenizer.configuration import read_qlip_config
from train.recipes.um3 import UM3Objective
from train.settings.um3 import UM3Config
from um3.core.hub import load_pretrained
from um3.model.configuration import is_um3
from um3.model.extend import extend_model, load_base_tokenizer, read_base_config
from um3.model.language_model import build_model
from um3.model.lora import freeze_base
from um3.model.qk_norm import insert_qk_norm, inserts_qk_norm
from um3.model.visual_parts import BitEmbeddings, DepthHead
from um3.model.vocabulary import UnifiedVocabulary

PATCHES = 256
"""Of QLIP-B-16-256: used if the config's visual tokenizer is not available, or fewer if sequences are too short."""
LLAMA_SIZES: dict[str, Any] = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
LLAMA_SIZES |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
SMOLLM2_SIZES: dict[str, Any] = dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
SMOLLM2_SIZES |= dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)
KNOWN_BASES = {
    "meta-llama/Llama-3.2-1B": LLAMA_SIZES | {"max_position_embeddings": 131_072},
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_SIZES | {"max_position_embeddings": 8192},
}
"""Sizes of base models that need no access to the hub."""


def build_objective(config: UM3Config) -> tuple[UM3Objective, UnifiedVocabulary]:
    """The training objective on the meta device, and its vocabulary; UserError if the base model cannot be read."""
    base = config.model.base_model
    with torch.device("meta"):
        if is_um3(base):
            stored = load_pretrained(AutoConfig, base, kind="UM3 model")
            ids = UnifiedVocabulary.from_dict(stored.um3, where=Path(base) / "config.json")
            ids = dataclasses.replace(ids, depth_layers=config.vocabulary.depth_head_layers)
            model = AutoModelForCausalLM.from_config(stored, trust_remote_code=False)
        elif base:
            stored = LlamaConfig(**KNOWN_BASES[base]) if base in KNOWN_BASES else read_base_config(base)
            ids = _vocabulary(config, text_vocab_size=stored.vocab_size + 2)
            model = AutoModelForCausalLM.from_config(stored, trust_remote_code=False)
            if inserts_qk_norm(stored, qk_norm=config.model.qk_norm):
                model = insert_qk_norm(model)
            model = extend_model(model, ids=ids)
        else:
            ids = _vocabulary(config, text_vocab_size=config.vocabulary.text_vocab_size)
            model = build_model(config.model, ids=ids)
        if config.freezes_base:
            freeze_base(model, ids=ids, lora=config.lora)
        bits = BitEmbeddings(ids, model_config=model.config) if config.vocabulary.bit_embeddings else None
        packed = config.data.packing == "documents"
        depth = DepthHead(ids, model=model) if ids.depth_layers else None
        return UM3Objective(model, ids=ids, loss=config.loss, bits=bits, depth=depth, packed=packed), ids


def _vocabulary(config: UM3Config, *, text_vocab_size: int) -> UnifiedVocabulary:
    """A vocabulary of the right sizes; which text entries are the special tokens does not matter here."""
    vocabulary = config.vocabulary
    patches = max(
        1, min(PATCHES, (config.data.seq_len - 5) // (1 if vocabulary.depth_head_layers else vocabulary.subtokens))
    )
    if vocabulary.tokenizer:
        text_vocab_size = len(load_base_tokenizer(vocabulary.tokenizer)[0])
    if (Path(config.visual_tokenizer) / "config.json").is_file():
        vision = read_qlip_config(Path(config.visual_tokenizer)).vision_tower
        patches = (vision.image_size // vision.patch_size) ** 2
    special = dict(bos_id=0, eos_id=1, pad_id=2, begin_of_image_id=text_vocab_size - 2)
    return UnifiedVocabulary(
        text_vocab_size=text_vocab_size,
        subtokens=vocabulary.subtokens,
        bits_per_subtoken=vocabulary.bits_per_subtoken,
        num_patches=patches,
        end_of_image_id=text_vocab_size - 1,
        depth_layers=vocabulary.depth_head_layers,
        **special,
    )
