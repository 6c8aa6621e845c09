"""Extend a Llama or Qwen to a UM3: add visual rows and untie the head. `um3.model.qk_norm` inserts the normalisation.

Shapes: V entries, D width.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from um3.core.errors import UserError
from um3.core.hub import load_pretrained, model_folder
from um3.core.seeds import torch_generator
from um3.model.configuration import IMAGE_SAMPLING, NewTokenInit
from um3.model.gguf import gguf_license, is_gguf, load_gguf, read_gguf_config
from um3.model.text_tokenizer import add_image_tokens, num_entries, read_text_tokenizer
from um3.model.vocabulary import UnifiedVocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SUPPORTED_BASES = ("llama", "qwen2", "qwen3")
ROWS_AT_ONCE = 8192


def read_base_config(path_or_hub_id: str) -> PreTrainedConfig:
    """The config of a language model that UM3 can extend (UserError for any other); downloads no weights."""
    if is_gguf(path_or_hub_id):
        return read_gguf_config(path_or_hub_id)
    config = load_pretrained(AutoConfig, path_or_hub_id, kind="base model")
    base, known = f"base '{path_or_hub_id}'", ", ".join(SUPPORTED_BASES)
    if config.model_type not in SUPPORTED_BASES:
        raise UserError(f"{base} is a '{config.model_type}' model; UM3 extends one of: {known}")
    if getattr(config, "um3", None) is not None:
        raise UserError(f"{base} is already a UM3; train it further with model.base_model=FOLDER")
    architecture = next(iter(config.architectures or []), "")
    if architecture and not architecture.endswith("ForCausalLM"):
        raise UserError(f"{base} is a {architecture}; UM3 extends causal language models (...ForCausalLM)")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{base} has quantised weights; use the unquantised model")
    return config


def load_base(path_or_hub_id: str) -> PreTrainedModel:
    """Load a Llama or Qwen in float32 from a folder, a GGUF file or the hub; UserError for another or a damaged one."""
    config = read_base_config(path_or_hub_id)
    if is_gguf(path_or_hub_id):
        folder, packed = Path(path_or_hub_id), load_gguf(path_or_hub_id, config=config)
        base = assemble_model(type(packed), config, packed.state_dict()).eval()
    else:
        folder = model_folder(path_or_hub_id, kind="language model")
        base = load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32, kind="base model", strict=True)
    base.name_or_path = str(path_or_hub_id)
    return check_logits(base, folder)


@torch.inference_mode()
def check_logits(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model itself; UserError if its logits are not finite, as with a NaN or 0 in the wrong place of its config."""
    if not model(torch.tensor([[0, 1]], device=model.device)).logits.isfinite().all():
        raise UserError(f"{folder} gives logits with NaN or infinity; restore the numbers in its config.json")
    return model


def load_base_tokenizer(path_or_hub_id: str) -> tuple[PreTrainedTokenizerBase, int]:
    """A base's tokenizer with UM3's special tokens, and its original number of entries; a chat template stays.

    A tokenizer without a bos token (Qwen) gets the one of the base's config.json if that is a special token.
    """
    tokenizer = read_text_tokenizer(path_or_hub_id)
    entries = num_entries(tokenizer)
    if tokenizer.bos_token is None and (model_folder(path_or_hub_id, files=["*.json"]) / "config.json").is_file():
        # Qwen's config names what stood between documents in its training. Llama's default of 1 may be a word.
        config = load_pretrained(AutoConfig, path_or_hub_id, kind="base model")
        token = tokenizer.added_tokens_decoder.get(getattr(config, "bos_token_id", -1))
        if token is not None and token.special:
            tokenizer.bos_token = token.content
    return add_image_tokens(tokenizer), entries


def check_vocabulary(entries: int, *, rows: int) -> None:
    """Raise UserError if a tokenizer has more entries than the base has rows."""
    if entries > rows:
        problem = f"the text tokenizer has {entries:,} entries, but the base only {rows:,} rows"
        raise UserError(f"{problem}; use the tokenizer that the base was trained with")


def extend_model(
    base_model: PreTrainedModel,
    *,
    ids: UnifiedVocabulary,
    base_entries: int | None = None,
    new_token_init: NewTokenInit = "mean",
    seed: int = 0,
) -> PreTrainedModel:
    """Add the rows of `ids` to a base. The tensors of its layers are shared.

    The first `base_entries` rows are kept: those of the base's own tokenizer (None: as many as fit); padding rows after
    them are dropped. New input and output rows are the mean of the kept ones (section 4 of the paper), or normal with
    their standard deviation; the output head is untied. UserError: the tokenizer has more entries than the base has
    rows.
    """
    config = base_model.config
    weights = dict(base_model.state_dict())
    rows = len(weights[EMBEDDING])
    kept = min(rows, ids.text_vocab_size) if base_entries is None else base_entries
    check_vocabulary(kept, rows=rows)

    for name, source in ((HEAD, EMBEDDING if config.tie_word_embeddings else HEAD), (EMBEDDING, EMBEDDING)):
        generator = torch_generator(seed, "new rows", source) if new_token_init == "random" else None
        weights[name] = _extend_rows(weights[source], kept=kept, total=ids.vocab_size, generator=generator)
    new_config: PreTrainedConfig = copy.deepcopy(config)
    base_name, tied = base_model.name_or_path or "", bool(config.tie_word_embeddings)
    # With an inserted qk-norm the config still names the architecture that it was inserted into.
    architecture = (config.architectures or [type(base_model).__name__])[0]
    base = {"name": base_name, "architecture": architecture, "entries": kept, "tied": tied}
    new_config.um3 = {"base": base | {"license": _license_of(base_name)}}  # for the export and the model card
    new_config.vocab_size = ids.vocab_size
    new_config.tie_word_embeddings = False
    new_config.bos_token_id, new_config.eos_token_id = ids.bos_id, ids.eos_id
    new_config.pad_token_id = None
    return set_generation_defaults(assemble_model(type(base_model), new_config, weights), ids=ids)


def assemble_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model that uses these tensors without a copy."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # The rotary table is not a parameter, so it is still on the meta device: build it again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights[EMBEDDING].device)
    return model


def set_generation_defaults(model: PreTrainedModel, *, ids: UnifiedVocabulary) -> PreTrainedModel:
    """Set the special ids for `generate()` and the image sampling defaults, which it ignores; returns the model."""
    # The padding id is in the generation config only. In the model's config it would freeze that row, which is in use
    # if the tokenizer pads with its end of text.
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=ids.pad_id, image_sampling=dict(IMAGE_SAMPLING)
    )
    return model


def _extend_rows(rows_VD: Tensor, *, kept: int, total: int, generator: torch.Generator | None) -> Tensor:
    """The first `kept` rows unchanged, then new ones up to `total`: their mean, or with a generator random."""
    kept_VD = rows_VD[:kept]
    if generator is None:
        # In parts: a float64 copy of 128,256 rows of width 2,048 would take 2 GiB.
        sums_D = [part_VD.double().sum(0) for part_VD in kept_VD.split(ROWS_AT_ONCE)]
        new_VD = (torch.stack(sums_D).sum(0) / kept).expand(total - kept, -1)
    else:
        new_VD = torch.randn(total - kept, rows_VD.shape[1], generator=generator).to(kept_VD.device) * kept_VD.std()
    return torch.cat([kept_VD, new_VD.to(rows_VD)])


def _license_of(path_or_hub_id: str) -> str:
    """The licence in the metadata of a model's card; empty if there is none."""
    if is_gguf(path_or_hub_id):
        return gguf_license(path_or_hub_id)
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        card = cached_file(path_or_hub_id, "README.md", **quiet) if path_or_hub_id else None
        return str(ModelCard.load(card, ignore_metadata_errors=True).data.license or "") if card else ""
    except (OSError, ValueError):
        return ""
