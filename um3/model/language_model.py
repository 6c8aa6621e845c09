"""UM3 as a stock language model: built from a config, counted, saved and loaded.

With query-key normalisation the architecture is transformers' Qwen3ForCausalLM, without it LlamaForCausalLM
(or the base's own): no modeling code of ours, so transformers, vLLM and lm-eval load a checkpoint as it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from um3.core.errors import UserError
from um3.core.files import atomic_folder, write_text
from um3.model.configuration import ModelConfig
from um3.model.extend import set_generation_defaults
from um3.model.model_card import model_card
from um3.model.text_tokenizer import BEGIN_OF_IMAGE
from um3.model.vocabulary import UnifiedVocabulary

QLIP_FOLDER = "qlip"


class ParameterCounts(NamedTuple):
    """Parameters by part; a tied output head counts as 0."""

    text_rows_in: int
    text_rows_out: int
    visual_rows_in: int
    visual_rows_out: int
    layers: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)

    @property
    def body(self) -> int:
        """All but the rows of the vocabulary."""
        return self.layers + self.norms

    def by_part(self) -> dict[str, int]:
        """The counts under the names a reader knows, the total last."""
        return {
            "text embedding": self.text_rows_in,
            "visual embedding": self.visual_rows_in,
            "layers": self.layers,
            "norms": self.norms,
            "text head": self.text_rows_out,
            "visual head": self.visual_rows_out,
            "total": self.total,
        }


class LoadedModel(NamedTuple):
    """A UM3 folder in memory, without its visual tokenizer."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    ids: UnifiedVocabulary
    fingerprint: str


def build_model(config: ModelConfig, *, ids: UnifiedVocabulary) -> PreTrainedModel:
    """A model of fresh weights and the config's sizes; a `base` is `um3.model.extend`'s business.

    Works under `torch.device("meta")` for counting parameters.
    """
    assert not config.base_model, "a base brings its own sizes"
    sizes: dict[str, Any] = {
        "vocab_size": ids.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
    }
    if config.qk_norm:
        return set_generation_defaults(Qwen3ForCausalLM(Qwen3Config(**sizes)), ids=ids)
    return set_generation_defaults(LlamaForCausalLM(LlamaConfig(**sizes)), ids=ids)


def count_parameters(model: PreTrainedModel, *, ids: UnifiedVocabulary) -> ParameterCounts:
    """Parameters by part; also on the meta device."""
    width, tied = model.config.hidden_size, model.config.tie_word_embeddings
    text, visual = ids.text_vocab_size * width, ids.visual_vocab_size * width
    total = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    out = (0, 0) if tied else (text, visual)
    return ParameterCounts(
        text_rows_in=text,
        text_rows_out=out[0],
        visual_rows_in=visual,
        visual_rows_out=out[1],
        layers=total - text - visual - sum(out) - norms,
        norms=norms,
    )


def save_model(
    folder: str | Path,
    *,
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    ids: UnifiedVocabulary,
    qlip_folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    trained: bool = True,
) -> None:
    """Write a stock Hugging Face folder with a card and the visual tokenizer in `qlip/`, whole or not at all.

    `state_dict` replaces the model's own tensors (gathered from a sharded run). config.json carries the id space,
    the visual tokenizer's fingerprint and the base under "um3"; other software passes over that key. `trained` is
    what the card says of the visual rows.
    """
    import tokenizer

    qlip, processor = tokenizer.load(qlip_folder)
    with atomic_folder(folder) as partial:
        known = getattr(model.config, "um3", None) or {}
        model.config.um3 = known | ids.to_dict() | {"tokenizer_fingerprint": qlip.fingerprint()}
        model.save_pretrained(partial, state_dict=state_dict)
        text_tokenizer.save_pretrained(partial)
        qlip.save_pretrained(partial / QLIP_FOLDER)
        processor.save_pretrained(partial / QLIP_FOLDER)
        parts = count_parameters(_without_weights(model.config), ids=ids).by_part()
        license_of_qlip = str(qlip.config.weights_license)
        card = model_card(model.config, ids=ids, parts=parts, qlip_license=license_of_qlip, trained=trained)
        write_text(partial / "README.md", card)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load what `save_model` wrote, in eval mode.

    Raises:
        UserError: no such folder, a model that is no UM3, or one without its text tokenizer.
    """
    folder = _existing(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load {folder}: {' '.join(str(error).strip().split(chr(10))[0].split())}") from None
    model.to(torch.device(device))  # type: ignore[arg-type]
    ids, fingerprint = _stored_ids(model.config, folder=folder)
    text_tokenizer = _load_text_tokenizer(folder, ids=ids)
    return LoadedModel(model=model.eval(), text_tokenizer=text_tokenizer, ids=ids, fingerprint=fingerprint)


def _load_text_tokenizer(folder: Path, *, ids: UnifiedVocabulary) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        found = None
    # Without its files transformers makes an empty tokenizer of the model's type, and says nothing.
    if found is None or found.get_vocab().get(BEGIN_OF_IMAGE) != ids.begin_of_image_id:
        raise UserError(
            f"{folder} has no text tokenizer with {BEGIN_OF_IMAGE} as id {ids.begin_of_image_id}; "
            "put back the tokenizer.json and tokenizer_config.json that were saved with the model"
        )
    return found


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: under ZeRO 3 the real one's tensors are elsewhere."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _existing(folder: str | Path) -> Path:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make demo or pass --model with the folder of a trained one")
    return Path(folder)


def _stored_ids(config: PreTrainedConfig, *, folder: str | Path) -> tuple[UnifiedVocabulary, str]:
    stored = getattr(config, "um3", None)
    if stored is None:
        raise UserError(f"{folder} holds a {config.model_type} model that is no UM3 (no 'um3' in its config.json)")
    return UnifiedVocabulary.from_dict(stored), str(stored["tokenizer_fingerprint"])
