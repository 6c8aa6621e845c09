"""The model that UM3's training starts from: new weights, a language model to extend, or a UM3 folder
(model.base_model)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.token_stream import TokenStream
from data_mix.sources.fingerprint import source_fingerprint
from train.recipes.configs import UM3Config
from train.recipes.tokenizer_setup import trained_once
from um3.core.distributed import device, make_once
from um3.core.errors import UserError
from um3.core.files import atomic_file, sha256_of, short_hash
from um3.core.hub import read_tensors
from um3.model.configuration import ModelConfig, is_um3
from um3.model.extend import extend_model, fit_gains, inserts_qk_norm, load_base, load_base_tokenizer
from um3.model.language_model import LoadedModel, build_model, load_model
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer

if TYPE_CHECKING:
    from tokenizer.modeling import QLIPModel
    from train.recipes.um3_init import InitConfig

Gains = dict[str, torch.Tensor]
CALIBRATION_SEQUENCES = 8
"""Of every text: the gains of an inserted normalisation are fitted to them."""


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
            self.text_tokenizer, self.ids = self.loaded.text_tokenizer, self.loaded.ids
            return
        if source := vocabulary.tokenizer or config.model.base_model:
            self.text_tokenizer, self.base_entries = load_base_tokenizer(source)
        else:
            self.text_tokenizer = self._trained_tokenizer(texts)
        self.ids = make_vocabulary(
            self.text_tokenizer,
            subtokens=vocabulary.subtokens,
            bits_per_subtoken=vocabulary.bits_per_subtoken,
            num_patches=qlip.num_patches,
        )

    def model(self, streams: Mapping[str, TokenStream]) -> PreTrainedModel:
        """The model before the first step, on the CPU in float32.

        If query-key normalisation is inserted, rank 0 fits its gains to the first sequences of every text, once a run.
        """
        config = self.config.model
        if self.loaded is not None:
            return self.loaded.model.train()
        if not config.base_model:
            return build_model(config, ids=self.ids)

        base, seed = load_base(config.base_model), self.config.loop.seed
        path = Path(self.config.loop.output_dir) / "cache" / "qk_norm_gains.safetensors"

        def fit() -> None:
            firsts = [(stream, min(len(stream), CALIBRATION_SEQUENCES)) for stream in streams.values()]
            sequences = [stream[index].input_ids for stream, count in firsts for index in range(count)]
            with atomic_file(path) as partial:
                save_file({name: gain.cpu() for name, gain in fitted_gains(base, sequences).items()}, partial)
            base.to("cpu")  # type: ignore[arg-type]

        options: dict[str, Any] = {"ids": self.ids, "base_entries": self.base_entries, "seed": seed}
        return extend_base(base, config, gains=lambda: read_tensors(make_once(path, fit)), **options)

    def _trained_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """A text tokenizer that rank 0 trains once a run on its texts and captions."""
        data, entries = self.config.data, self.config.vocabulary.text_vocab_size
        codes = Path(data.codes) / "summary.json"
        codes_digest = sha256_of(codes) if codes.exists() else ""
        key = short_hash([source_fingerprint(source, "train") for source in data.texts], codes_digest, entries)
        path = Path(self.config.loop.output_dir) / "cache" / f"vocabulary-{key}.json"
        return trained_once(path, lambda: train_text_tokenizer(texts, vocab_size=entries))


def fitted_gains(base: PreTrainedModel, sequences: Sequence[torch.Tensor]) -> Gains:
    """Gains (`um3.model.extend.fit_gains`) on sequences of ids (T), computed on this rank's device."""
    return fit_gains(base.to(device()), calibration=[ids_T[None] for ids_T in sequences])  # type: ignore[arg-type]


def extend_base(
    base: PreTrainedModel, config: "ModelConfig | InitConfig", *, gains: Callable[[], Gains], **options: Any
) -> PreTrainedModel:
    """`extend_model` with the config and `options`, and the `gains` of a query-key normalisation if it inserts one."""
    fitted = gains() if inserts_qk_norm(base.config, qk_norm=config.qk_norm) else {}
    return extend_model(base, qk_norm=config.qk_norm, gains=fitted, new_token_init=config.new_token_init, **options)


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
    if vocabulary.tokenizer:
        raise UserError(f"{folder} has its own text tokenizer; unset vocabulary.tokenizer")
    has_qk_norm = start.model.config.model_type == "qwen3"
    if config.model.qk_norm != has_qk_norm:
        raise UserError(
            f"{folder} is {'with' if has_qk_norm else 'without'} query-key normalisation; "
            f"set model.qk_norm={str(has_qk_norm).lower()}, or run `make um3-init` with qk_norm={config.model.qk_norm}"
        )
