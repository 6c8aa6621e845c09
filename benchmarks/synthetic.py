"""Synthetic parts of benchmarks: a UM3 (Qwen3 with random weights, equal in every process), tokenizer and data."""

import argparse
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from um3.core.commands import positive
from um3.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from data_mix.batches.mix import SequenceBatches
    from um3.model.vocabulary import UnifiedVocabulary

SPECIAL_IDS = dict(bos_id=0, eos_id=1, pad_id=2, begin_of_image_id=3, end_of_image_id=4)
SUBTOKENS = 2
SHARDS, IMAGES_PER_SHARD, PATCHES, BITS_PER_SUBTOKEN, TEXT_VOCAB_SIZE = 4, 256, 256, 14, 1024
CAPTION, DOCUMENT_LETTERS, DOCUMENTS = "a small red circle left of a large blue square on a dark ground. ", 4_000, 64
JPEGS, JPEG_SIZE = 256, (512, 384)


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


def made_text_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """A text tokenizer with one token per byte, Llama's special tokens, and otherwise unused entries."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    unused = [f"unused{number}" for number in range(vocab_size - len(alphabet) - len(specials))]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet + unused)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special) for special in specials])
    named = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def made_sequences(
    folder: Path, *, seq_len: int, mix: list[float], batch_size: int, rank: int = 0, world_size: int = 1
) -> "SequenceBatches":
    """Packed sequences of made codes and texts, which are written to `folder` if they are not there."""
    from data_mix.batches.config import DataConfig
    from data_mix.batches.mix import SequenceBatches
    from data_mix.batches.schedule import MixConfig
    from data_mix.sources.config import TextSourceConfig
    from um3.model.vocabulary import UnifiedVocabulary

    texts = folder / "texts.jsonl"
    if not texts.exists():
        write_codes(folder / "codes", shards=SHARDS, images=IMAGES_PER_SHARD)
        document = (CAPTION * (DOCUMENT_LETTERS // len(CAPTION) + 1))[:DOCUMENT_LETTERS]
        texts.write_text(DOCUMENTS * (json.dumps({"text": document}) + "\n"))
    vocabulary = dict(subtokens=SUBTOKENS, bits_per_subtoken=BITS_PER_SUBTOKEN, num_patches=PATCHES)
    return SequenceBatches(
        DataConfig(
            codes=str(folder / "codes"),
            texts=[TextSourceConfig(name="made", path=str(texts))],
            mix=MixConfig(start=mix, end=mix),
            seq_len=seq_len,
            packing="documents",
        ),
        ids=UnifiedVocabulary(text_vocab_size=TEXT_VOCAB_SIZE, **vocabulary, **SPECIAL_IDS),
        text_tokenizer=made_text_tokenizer(TEXT_VOCAB_SIZE),
        batch_size=batch_size,
        seed=0,
        cache=folder / "cache",
        rank=rank,
        world_size=world_size,
    )


def write_codes(folder: Path, *, shards: int, images: int, patches: int = PATCHES) -> None:
    """Write `shards` code shards of `images` images each, with random codes and one caption."""
    import numpy as np

    from data_mix.codes.shards import ShardHeader, shard_path, write_shard

    draw = np.random.default_rng(0)
    for shard in range(shards):
        place: Any = {"split": "train", "source": "made", "shard": shard}
        write_shard(
            shard_path(folder, **place),
            header=ShardHeader("made", bits=SUBTOKENS * BITS_PER_SUBTOKEN, image_size=256, num_shards=shards, **place),
            keys=[f"{shard}-{number}" for number in range(images)],
            codes_BN=draw.integers(0, 2 ** (SUBTOKENS * BITS_PER_SUBTOKEN), (images, patches)),
            captions=[[CAPTION.strip()]] * images,
        )


def write_jpegs(folder: Path) -> None:
    """Write JPEGS smooth random images with captions, as a folder and as one parquet file."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draw, encoded = np.random.default_rng(0), []
    (folder / "jpegs").mkdir(parents=True)
    for number in range(JPEGS):
        coarse = Image.fromarray(draw.integers(0, 256, (JPEG_SIZE[1] // 16, JPEG_SIZE[0] // 16, 3), dtype=np.uint8))
        data = io.BytesIO()
        coarse.resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
        encoded.append(data.getvalue())
        (folder / f"jpegs/{number:04}.jpg").write_bytes(encoded[-1])
        (folder / f"jpegs/{number:04}.txt").write_text(CAPTION)
    pq.write_table(pa.table({"image": encoded, "caption": [CAPTION] * JPEGS}), folder / "jpegs.parquet")
