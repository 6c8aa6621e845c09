"""What stage 1 and stage 2 share: the model to start from, the batches of images, the finished folder."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_mix.batches.image_batches import ImageBatch, ImageBatches
from data_mix.prefetch import Prefetch
from data_mix.samples import ImageSource
from data_mix.sources.image_sources import open_image_source
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.pretrained import load_encoder, load_text_tower
from tokenizer.processor import QLIPProcessor
from tokenizer.text_tokenizer import load_caption_tokenizer, train_caption_tokenizer
from train.config import ImageDataConfig, LoopConfig, QLIPSizeConfig, TextTowerConfig
from um3.core.distributed import is_main, rank, world_size
from um3.core.errors import UserError
from um3.core.files import atomic_folder
from um3.core.seeds import seed_everything

logger = logging.getLogger(__name__)

SHOWN_KEYS = 8
TOKENIZER_SAMPLES = 4000
"""Samples whose captions train a text tokenizer."""


def open_sources(data: ImageDataConfig, *, size: int, seed: int) -> list[ImageSource]:
    """The train splits of the configured sources, as squares of `size` pixels."""
    return [open_image_source(source, split="train", size=size, seed=seed) for source in data.sources]


def image_batches(sources: list[ImageSource], *, data: ImageDataConfig, loop: LoopConfig) -> Prefetch[ImageBatch]:
    """This rank's batches, the next one always under way."""
    batches = ImageBatches(
        sources,
        weights=[source.weight for source in data.sources],
        batch_size=loop.batch_size,
        seed=loop.seed,
        rank=rank(),
        world_size=world_size(),
        caption=data.caption,
    )
    return Prefetch(batches, num_steps=loop.max_steps)


def described(batch: ImageBatch) -> str:
    """Which images these are, for the line that reports a loss that is not finite."""
    some = ", ".join(batch.keys[:SHOWN_KEYS])
    if len(batch.keys) > SHOWN_KEYS:
        some += f" and {len(batch.keys) - SHOWN_KEYS} more"
    return f"images of {', '.join(sorted(set(batch.sources)))}: {some}"


def qlip_config(model: QLIPSizeConfig, text: TextTowerConfig, *, text_tokenizer: Any = None) -> QLIPConfig:
    """The QLIP configuration of a size; ids and vocabulary come from the text tokenizer when one is given."""
    tower = dict(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        image_size=model.image_size,
        patch_size=model.patch_size,
        rope_pretrained_grid=model.rope_pretrained_grid,
    )
    ids = {}
    if text_tokenizer is not None:
        if text_tokenizer.eos_token_id == 2:
            raise UserError(
                "the text tokenizer ends texts with entry 2, which QLIP's layout reads as 'the largest id ends the "
                f"text' (old CLIP); use a tokenizer with another end entry than {text_tokenizer.eos_token!r} at 2"
            )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(text_tokenizer, name) for name in names} | {"vocab_size": len(text_tokenizer)}
    quantizer = dict(embed_dim=model.bits, group_size=model.group_size, inv_temperature=model.inv_temperature)
    return QLIPConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.max_tokens,
            "projection_dim": model.projection_dim,
            "hidden_act": text.hidden_act,
            **ids,
        },
        vision_config={**tower, "quantizer_cfg": quantizer},
        decoder_config=tower,
        projection_dim=model.projection_dim,
        initializer_range=model.initializer_range,
    )


def new_tokenizer(
    model: QLIPSizeConfig, text: TextTowerConfig, *, sources: list[ImageSource], seed: int
) -> tuple[QLIPModel, QLIPProcessor]:
    """A fresh QLIP of the configured size with its processor, equal on every rank."""
    if text.tokenizer:
        text_tokenizer = load_caption_tokenizer(text.tokenizer)
    else:
        text_tokenizer = train_caption_tokenizer(_captions(sources), vocab_size=text.vocab_size)
    seed_everything(seed, "qlip weights")
    qlip = QLIPModel(qlip_config(model, text, text_tokenizer=text_tokenizer))
    for load, path in ((load_encoder, model.encoder_weights), (load_text_tower, text.weights)):
        if path:
            report = load(qlip, path)
            for kind, names in report.items():
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if kind != "loaded" else ""
                logger.info("%s: %d tensors %s%s", path, len(names), kind, f" ({some})" if some else "")
    return qlip, QLIPProcessor(text_tokenizer, image_size=model.image_size, max_text_tokens=text.max_tokens)


def train_only(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze every parameter of `module` whose name starts with none of `prefixes`.

    Raises:
        UserError: a prefix that no name starts with.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise UserError(f"trainable: no parameter's name starts with '{prefix}'; there are {', '.join(parts)}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))


def flatten_scalars(qlip: QLIPModel) -> None:
    """Give the 0-dimensional logit scale one dimension: DeepSpeed broadcasts parameters as bytes, which a scalar
    cannot be viewed as. `save_tokenizer` writes it as the scalar of the released layout again."""
    qlip.logit_scale.data = qlip.logit_scale.data.reshape(1)


def save_tokenizer(folder: Path, *, qlip: QLIPModel, processor: QLIPProcessor, weights: dict[str, torch.Tensor]) -> str:
    """Write a QLIP folder with the trained weights; returns its fingerprint."""
    if is_main():
        qlip.logit_scale.data = qlip.logit_scale.data.reshape(())
        state = qlip.float().state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor.reshape(state[name].shape))
        with atomic_folder(folder) as partial:
            qlip.save_pretrained(partial)
            processor.save_pretrained(partial)
        return qlip.fingerprint()
    return ""


def skipped_metrics(total: dict[str, int], skipped: Mapping[tuple[str, str], int]) -> dict[str, float]:
    """Add a batch's skipped samples to `total` and return it as metrics."""
    for (source, reason), count in skipped.items():
        key = f"data/skipped/{source}/{reason}".replace(" ", "_")
        total[key] = total.get(key, 0) + count
    return {key: float(count) for key, count in total.items()}


def _captions(sources: list[ImageSource]) -> Any:
    from data_mix.samples import BadSample

    share = max(1, TOKENIZER_SAMPLES // len(sources))
    for source in sources:
        stride = max(1, len(source) // share)
        for index in range(0, len(source), stride):
            try:
                yield from source[index].captions
            except BadSample:
                continue
