"""The model that UM3's training starts from: new weights, a language model to extend, or a UM3 folder
(model.base_model)."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.token_stream import TokenStream
from data_mix.sources.fingerprint import source_fingerprint
from train.recipes.tokenizer_setup import trained_once
from train.settings.um3 import UM3Config
from um3.core.distributed import device, make_once
from um3.core.errors import UserError
from um3.core.files import atomic_file, sha256_of, short_hash
from um3.core.hub import read_tensors, weights_digest
from um3.core.seeds import seed_everything
from um3.model.configuration import is_um3
from um3.model.extend import check_vocabulary, extend_model, load_base, load_base_tokenizer, read_base_config
from um3.model.language_model import LoadedModel, build_model, load_model
from um3.model.qk_norm import fit_qk_norm, insert_qk_norm, inserts_qk_norm
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer
from um3.model.visual_parts import DepthHead

if TYPE_CHECKING:
    from tokenizer.modeling import QLIPModel

POSITIONS_PER_DIMENSION = 8


class UM3Start:
    """The text tokenizer and vocabulary of a run; its model once the texts are open."""

    def __init__(self, config: UM3Config, *, qlip: "QLIPModel", texts: Iterable[str]):
        """`texts` train a new text vocabulary if the config asks for one. UserError: a base model, tokenizer or UM3
        folder that cannot be loaded or contradicts the config."""
        self.config, vocabulary = config, config.vocabulary
        self.text_tokenizer: PreTrainedTokenizerBase
        self.base_entries: int | None = None
        self.loaded: LoadedModel | None = None
        if is_um3(config.model.base_model):
            self.loaded = load_model(config.model.base_model, dtype=torch.float32)
            _check(self.loaded, config=config, fingerprint=qlip.fingerprint())
            self.text_tokenizer = self.loaded.text_tokenizer
            self.ids = dataclasses.replace(self.loaded.ids, depth_layers=vocabulary.depth_head_layers)
            return
        if source := vocabulary.tokenizer or config.model.base_model:
            self.text_tokenizer, self.base_entries = load_base_tokenizer(source)
            if config.model.base_model:  # before the texts are tokenised
                check_vocabulary(self.base_entries, rows=read_base_config(config.model.base_model).vocab_size)
        else:
            self.text_tokenizer = self._trained_tokenizer(texts)
        self.ids = make_vocabulary(
            self.text_tokenizer,
            subtokens=vocabulary.subtokens,
            bits_per_subtoken=vocabulary.bits_per_subtoken,
            num_patches=qlip.num_patches,
            depth_layers=vocabulary.depth_head_layers,
        )

    def model(self, streams: Mapping[str, TokenStream]) -> PreTrainedModel:
        """The model before the first step, on the CPU in float32.

        Query-key normalisation, if it is inserted, is fitted to the first sequences of every text; `make um3-init`
        also distils it.
        """
        config = self.config.model
        if self.loaded is not None:
            return self.loaded.model.train()
        if not config.base_model:
            return build_model(config, ids=self.ids)

        base = load_base(config.base_model)
        if inserts_qk_norm(base.config, qk_norm=config.qk_norm):
            cache = Path(self.config.loop.output_dir) / "cache"
            base = with_qk_norm(base, _first_sequences(streams, hidden_size=base.config.hidden_size), cache=cache)
        options: dict[str, Any] = {"new_token_init": config.new_token_init, "seed": self.config.loop.seed}
        return extend_model(base, ids=self.ids, base_entries=self.base_entries, **options)

    def depth_head(self, model: PreTrainedModel) -> DepthHead | None:
        """The depth head before the first step, if the config asks for one; drawn unless the UM3 folder has it."""
        if not self.ids.depth_layers or (self.loaded and self.loaded.depth):
            return self.loaded.depth.train() if self.loaded and self.loaded.depth else None
        seed_everything(self.config.loop.seed, "depth head")
        return DepthHead(self.ids, model=model)

    def _trained_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """A text tokenizer that rank 0 trains once a run on its texts and captions."""
        data, entries = self.config.data, self.config.vocabulary.text_vocab_size
        codes = Path(data.codes) / "summary.json"
        codes_digest = sha256_of(codes) if codes.exists() else ""
        sources = [*data.texts, *self.config.vocabulary.conversations]
        key = short_hash([source_fingerprint(source, "train") for source in sources], codes_digest, entries)
        path = Path(self.config.loop.output_dir) / "cache" / f"vocabulary-{key}.json"
        return trained_once(path, lambda: train_text_tokenizer(texts, vocab_size=entries))


def with_qk_norm(base: PreTrainedModel, sequences: Sequence[torch.Tensor], *, cache: Path) -> PreTrainedModel:
    """The base with query-key normalisation (`um3.model.qk_norm`), fitted to sequences of ids (T).

    The first rank fits it, once for a base and its sequences, and keeps the tensors in the folder `cache`.
    """
    name = str(base.name_or_path)
    key = short_hash(weights_digest(name) or name, [ids_T.tolist() for ids_T in sequences])
    path = cache / f"qk_norm-{key}.safetensors"

    def fit() -> None:
        place = base.device
        fitted = fit_qk_norm(base.to(device()), calibration=[ids_T[None] for ids_T in sequences])  # type: ignore[arg-type]
        base.to(place)  # type: ignore[arg-type]
        with atomic_file(path) as partial:
            save_file({name: tensor.cpu() for name, tensor in fitted.items()}, partial)

    return insert_qk_norm(base, read_tensors(make_once(path, fit)))


def calibration_length(hidden_size: int, *, seq_len: int) -> int:
    """How many sequences `fit_qk_norm` needs: several positions for each of the model's dimensions."""
    return math.ceil(POSITIONS_PER_DIMENSION * hidden_size / seq_len)


def _first_sequences(streams: Mapping[str, TokenStream], *, hidden_size: int) -> list[torch.Tensor]:
    """The first sequences of every text, enough for `fit_qk_norm` if the texts are."""
    firsts: list[torch.Tensor] = []
    for stream in streams.values():
        count = math.ceil(calibration_length(hidden_size, seq_len=stream.seq_len) / len(streams))
        firsts += [stream[index].input_ids for index in range(min(len(stream), count))]
    return firsts


def _check(start: LoadedModel, *, config: UM3Config, fingerprint: str) -> None:
    """Refuse settings that a UM3 folder fixes differently: they would have no effect."""
    folder, vocabulary, ids = config.model.base_model, config.vocabulary, start.ids
    if start.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was made for visual tokenizer {start.fingerprint}, but "
            f"visual_tokenizer={config.visual_tokenizer} is {fingerprint}; set visual_tokenizer={folder}/qlip, or run "
            "`make um3-init` with the other"
        )
    if (vocabulary.subtokens, vocabulary.bits_per_subtoken) != (ids.subtokens, ids.bits_per_subtoken):
        configured = f"{vocabulary.subtokens} x {vocabulary.bits_per_subtoken}"
        raise UserError(
            f"{folder} has {ids.subtokens} x {ids.bits_per_subtoken} bits a code, the config {configured}; set "
            f"vocabulary.subtokens={ids.subtokens} vocabulary.bits_per_subtoken={ids.bits_per_subtoken}"
        )
    if ids.depth_layers not in (0, vocabulary.depth_head_layers):
        raise UserError(
            f"{folder} has a depth head of {ids.depth_layers} layers; set vocabulary.prediction=depth "
            f"vocabulary.depth_layers={ids.depth_layers}"
        )
    if vocabulary.tokenizer:
        raise UserError(f"{folder} has its own text tokenizer; unset vocabulary.tokenizer")
    has_qk_norm = start.model.config.model_type == "qwen3"
    if config.model.qk_norm != has_qk_norm:
        raise UserError(
            f"{folder} is {'with' if has_qk_norm else 'without'} query-key normalisation; "
            f"set model.qk_norm={str(has_qk_norm).lower()}, or run `make um3-init` with qk_norm={config.model.qk_norm}"
        )
