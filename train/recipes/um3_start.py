"""What UM3's training starts from: fresh weights, or `model.base_model`: a language model to extend, or a UM3 as it is."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.token_stream import TokenStream
from data_mix.sources.fingerprint import origin
from train.config import UM3Config
from um3.core.distributed import device, is_main, wait_for_file
from um3.core.errors import UserError
from um3.core.files import atomic_file, sha256_of
from um3.model.configuration import is_um3
from um3.model.extend import extend_model, fit_gains, inserts_qk_norm, load_base, load_base_tokenizer
from um3.model.language_model import LoadedModel, build_model, load_model
from um3.model.text_tokenizer import make_vocabulary, read_trained_tokenizer, train_text_tokenizer

if TYPE_CHECKING:
    from tokenizer.modeling import QLIPModel

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 8


class Start:
    """The text tokenizer and ids of a run at once, its model when the text is open."""

    def __init__(self, config: UM3Config, *, qlip: "QLIPModel", texts: Iterable[str]):
        """`texts`: what a vocabulary of our own is trained on, read only where one is.

        Raises:
            UserError: a base, tokenizer or UM3 folder that cannot be loaded or contradicts the config.
        """
        self.config, vocabulary = config, config.vocabulary
        self.text_tokenizer: PreTrainedTokenizerBase
        self.base_entries: int | None = None
        self.loaded: LoadedModel | None = None
        if is_um3(config.model.base_model):
            self.loaded = load_model(config.model.base_model, dtype=torch.float32)
            _check(self.loaded, config=config, fingerprint=qlip.fingerprint())
            self.text_tokenizer, self.ids = self.loaded.text_tokenizer, self.loaded.ids
            return
        if source := vocabulary.tokenizer or config.model.base_model:
            self.text_tokenizer, self.base_entries = load_base_tokenizer(source)
        else:
            self.text_tokenizer = self._vocabulary(texts)
        self.ids = make_vocabulary(
            self.text_tokenizer,
            subtokens=vocabulary.subtokens,
            bits_per_subtoken=vocabulary.bits_per_subtoken,
            num_patches=qlip.num_patches,
        )

    def model(self, streams: Mapping[str, TokenStream]) -> PreTrainedModel:
        """The model before the first step, on the CPU in float32. The gains of a normalisation that a base lacks are
        fitted to the first rows of every text once a run: by the first rank, into the run folder's cache."""
        config = self.config.model
        if self.loaded is not None:
            return self.loaded.model.train()
        if not config.base_model:
            return build_model(config, ids=self.ids)
        base = load_base(config.base_model)
        gains = self._gains(base, streams) if inserts_qk_norm(base.config, qk_norm=config.qk_norm) else {}
        return extend_model(
            base,
            ids=self.ids,
            qk_norm=config.qk_norm,
            base_entries=self.base_entries,
            gains=gains,
            new_token_init=config.new_token_init,
            seed=self.config.loop.seed,
        )

    def _gains(self, base: PreTrainedModel, streams: Mapping[str, TokenStream]) -> dict[str, torch.Tensor]:
        path = Path(self.config.loop.output_dir) / "cache" / "qk_norm_gains.safetensors"
        if is_main() and not path.exists():
            rows = [
                stream[row].input_ids[None]
                for stream in streams.values()
                for row in range(min(len(stream), CALIBRATION_ROWS))
            ]
            gains = fit_gains(base.to(device()), calibration=rows)  # type: ignore[arg-type]
            base.to("cpu")  # type: ignore[arg-type]
            with atomic_file(path) as partial:
                save_file({name: gain.cpu() for name, gain in gains.items()}, partial)
        wait_for_file(path)
        return load_file(path)

    def _vocabulary(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """One of our own, trained once a run on its text and captions, by the first rank."""
        data, entries = self.config.data, self.config.vocabulary.text_vocab_size
        codes = Path(data.codes) / "summary.json"
        made_of = [origin(source, "train") for source in data.texts], codes.exists() and sha256_of(codes), entries
        key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
        path = Path(self.config.loop.output_dir) / "cache" / f"vocabulary-{key}.json"
        if is_main() and not path.exists():
            trained = train_text_tokenizer(texts, vocab_size=entries)
            with atomic_file(path) as partial:
                trained.backend_tokenizer.save(str(partial))
        wait_for_file(path)
        return read_trained_tokenizer(path)


def _check(start: LoadedModel, *, config: UM3Config, fingerprint: str) -> None:
    """Refuse settings that a UM3 folder has decided otherwise: they would have no effect."""
    folder, vocabulary, ids = config.model.base_model, config.vocabulary, start.ids
    if start.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was made for visual tokenizer {start.fingerprint}, but visual_tokenizer={config.visual_tokenizer} is {fingerprint}; "
            f"set visual_tokenizer={folder}/qlip, or make a start for the other"
        )
    if (vocabulary.subtokens, vocabulary.bits_per_subtoken) != (ids.subtokens, ids.bits_per_subtoken):
        raise UserError(
            f"{folder} cuts a code into {ids.subtokens} x {ids.bits_per_subtoken} bits, the config into {vocabulary.subtokens} x "
            f"{vocabulary.bits_per_subtoken}; set vocabulary.subtokens={ids.subtokens} vocabulary.bits_per_subtoken={ids.bits_per_subtoken}"
        )
    if vocabulary.tokenizer:
        raise UserError(f"{folder} has its own text tokenizer; leave vocabulary.tokenizer empty")
    has_qk_norm = start.model.config.model_type == "qwen3"
    if config.model.qk_norm != has_qk_norm:
        raise UserError(
            f"{folder} is {'with' if has_qk_norm else 'without'} query-key normalisation; "
            f"set model.qk_norm={str(has_qk_norm).lower()}, or make another start"
        )
