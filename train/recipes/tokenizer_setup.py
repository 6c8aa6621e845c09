"""The QLIP model that stage 1 starts from: its configuration, new or pretrained weights, and which parameters train."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_mix.samples import ImageSource, usable
from data_mix.sources.image_sources import open_image_source
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.pretrained import load_encoder, load_text_tower
from tokenizer.processor import QLIPProcessor
from tokenizer.text_tokenizer import train_caption_tokenizer
from train.run_folder import read_record, write_record
from train.settings.tokenizer import ImageDataConfig, QLIPSizeConfig, TextTowerConfig
from um3.core.distributed import is_main, make_once
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.hub import load_pretrained
from um3.core.seeds import seed_everything
from um3.model.configuration import hugging_face_options

logger = logging.getLogger(__name__)

TOKENIZER_SAMPLES = 4000
"""Number of samples whose captions train a text tokenizer."""


def open_sources(data: ImageDataConfig, *, size: int, seed: int) -> list[ImageSource]:
    """The train splits of the configured sources, as squares of `size` pixels; UserError if one cannot be opened, or
    leaves no image for the validation of the phases that follow."""
    sources = [open_image_source(source, split="train", size=size, seed=seed) for source in data.sources]
    for source in data.sources if is_main() else []:
        try:
            if source.val_fraction:
                open_image_source(source, split="val", size=size, seed=seed)
        except UserError as error:
            raise UserError(f"{error}; with DATA= set VAL_FRACTION=0.2, or 0 to train on every image") from None
    return sources


def qlip_config(model: QLIPSizeConfig, text: TextTowerConfig, *, text_tokenizer: Any = None) -> QLIPConfig:
    """The QLIP configuration of this size; with a text tokenizer, special token ids and vocabulary size are its own."""
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    tower = hugging_face_options(model, *shape, "image_size", "patch_size", "rope_pretrained_grid")
    ids = {}
    if text_tokenizer is not None:
        if text_tokenizer.eos_token_id == 2:
            raise UserError(
                f"the end-of-text token {text_tokenizer.eos_token!r} has id 2, which QLIP's layout reads as 'pool at "
                "the largest id' (old CLIP); set text.tokenizer to a tokenizer whose end-of-text id is not 2"
            )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(text_tokenizer, name) for name in names} | {"vocab_size": len(text_tokenizer)}
    options = dict(embed_dim=model.bits, group_size=model.group_size, inv_temperature=model.inv_temperature)
    if model.quantizer == "vq":
        options = dict(num_bits=model.bits, embed_dim=model.code_size)
    text_tower = hugging_face_options(text, *shape, "vocab_size", "max_tokens", "hidden_act")
    return QLIPConfig(
        text_config=text_tower | {"projection_dim": model.projection_dim} | ids,
        vision_config=tower | {"quantizer": model.quantizer, "quantizer_cfg": options},
        decoder_config=tower | {"overlap": model.decoder_overlap},
        projection_dim=model.projection_dim,
        initializer_range=model.initializer_range,
    )


def new_tokenizer(
    model: QLIPSizeConfig, text: TextTowerConfig, *, sources: list[ImageSource], seed: int, cache: Path
) -> tuple[QLIPModel, QLIPProcessor]:
    """A new QLIP of this size, with the configured pretrained towers, and its processor; equal on every rank.

    A trained vocabulary is kept in the folder `cache`: an image that cannot be read later must not change its ids.
    """
    if text.tokenizer:
        text_tokenizer = load_pretrained(AutoTokenizer, text.tokenizer, kind="text tokenizer")
    else:
        text_tokenizer = trained_once(
            cache / f"captions-{short_hash([source.fingerprint() for source in sources], text.vocab_size)}.json",
            lambda: train_caption_tokenizer(_captions(sources), vocab_size=text.vocab_size),
        )
    seed_everything(seed, "qlip weights")
    qlip = QLIPModel(qlip_config(model, text, text_tokenizer=text_tokenizer))
    for load, path in ((load_encoder, model.encoder_weights), (load_text_tower, text.weights)):
        for kind, names in (load(qlip, path) if path else {}).items():
            examples = "" if kind == "loaded" else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            logger.info("%s: %d tensors %s%s", path, len(names), kind, examples if names else "")
    return qlip, QLIPProcessor(text_tokenizer, image_size=model.image_size, max_text_tokens=text.max_tokens)


def trained_once(path: Path, train: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer whose backend is kept in `path` (UserError if it is damaged); the first rank trains it if there is
    none (a collective call)."""

    def make() -> None:
        tokenizer = train()
        options = {name: value for name, value in tokenizer.init_kwargs.items() if name != "backend"}
        write_record(path, {"backend": tokenizer.backend_tokenizer.to_str(), "options": options})

    record = read_record(make_once(path, make))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(record["backend"]), **record["options"])


def train_only(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze every parameter of `module` whose name starts with none of `prefixes`, which must all be in use."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise UserError(f"trainable: no parameter name starts with '{prefix}'; use one of {', '.join(parts)}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))


def _captions(sources: list[ImageSource]) -> Iterator[str]:
    share = max(1, TOKENIZER_SAMPLES // len(sources))
    for source in sources:
        stride = max(1, len(source) // share)
        for sample in usable(source.__getitem__, range(0, len(source), stride)):
            yield from sample.captions
