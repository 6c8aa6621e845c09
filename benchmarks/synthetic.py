"""The synthetic UM3 of the loss and sampling benchmarks: a Qwen3 with random weights, equal in every process."""

import argparse
from typing import TYPE_CHECKING

from benchmarks.harness import positive
from um3.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from um3.model.vocabulary import UnifiedVocabulary

SPECIAL_IDS = dict(bos_id=0, eos_id=1, pad_id=2, begin_of_image_id=3, end_of_image_id=4)
SUBTOKENS = 2


def add_model_options(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """Options for `synthetic_model`."""
    for name, default, about in (
        ("batch", 4, "sequences at a time"),
        ("patches", 256, "of an image, two ids each"),
        ("hidden-size", 512, "of the model"),
        ("layers", layers, "of the model"),
        ("text-vocab-size", 128_258, "text entries of the vocabulary"),
        ("bits-per-subtoken", 14, "bits of each of a code's two sub-tokens"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{about} (default {default})")


def synthetic_model(options: argparse.Namespace, *, max_positions: int) -> "tuple[PreTrainedModel, UnifiedVocabulary]":
    """Build the model and its vocabulary, or raise UserError; sets torch's seed and the number of threads."""
    import torch

    from um3.model.configuration import ModelConfig
    from um3.model.language_model import build_model
    from um3.model.vocabulary import UnifiedVocabulary

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        ids = UnifiedVocabulary(
            text_vocab_size=options.text_vocab_size,
            subtokens=SUBTOKENS,
            bits_per_subtoken=options.bits_per_subtoken,
            num_patches=options.patches,
            **SPECIAL_IDS,
        )
    except ValueError as error:
        raise UserError(f"--text-vocab-size and --bits-per-subtoken: {error}") from None
    heads = max(1, options.hidden_size // 64)
    sizes = ModelConfig(
        hidden_size=options.hidden_size,
        num_layers=options.layers,
        num_heads=heads,
        num_kv_heads=heads if heads % 4 else heads // 4,
        head_dim=64,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=max_positions,
    )
    return build_model(sizes, ids=ids), ids
