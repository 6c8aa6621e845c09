"""The made model that UM3's loss and sampling are measured on: a Qwen3 with random weights, equal in every process."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from um3.model.vocabulary import UnifiedVocabulary


def made_model(options: argparse.Namespace, *, positions: int) -> "tuple[PreTrainedModel, UnifiedVocabulary]":
    """A model of `options` (width, layers, text_vocab_size, bits_per_subtoken, patches), and its ids, two a patch.

    Also sets torch's seed, and the threads that were asked for.
    """
    import torch

    from um3.model.configuration import ModelConfig
    from um3.model.language_model import build_model
    from um3.model.vocabulary import UnifiedVocabulary

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = UnifiedVocabulary(
        text_vocab_size=options.text_vocab_size,
        subtokens=2,
        bits_per_subtoken=options.bits_per_subtoken,
        num_patches=options.patches,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        begin_of_image_id=3,
        end_of_image_id=4,
    )
    heads = max(1, options.width // 64)
    sizes = ModelConfig(
        hidden_size=options.width,
        num_layers=options.layers,
        num_heads=heads,
        num_kv_heads=heads if heads % 4 else heads // 4,
        head_dim=64,
        intermediate_size=4 * options.width,
        max_position_embeddings=positions,
    )
    return build_model(sizes, ids=ids), ids
