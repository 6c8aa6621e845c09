"""Extend a Llama or Qwen to a UM3: add visual rows, untie the head, insert query-key normalisation.

Shapes: B batch, T positions, V entries, D width, K head dimension, X vectors of one head.
"""

import copy
from collections.abc import Mapping, Sequence
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
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import cached_file

from um3.core.errors import UserError
from um3.core.hub import load_pretrained, model_folder
from um3.core.progress import track
from um3.core.seeds import torch_generator
from um3.model.configuration import IMAGE_SAMPLING, NewTokenInit
from um3.model.text_tokenizer import add_image_tokens, num_entries, read_text_tokenizer
from um3.model.vocabulary import UnifiedVocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SUPPORTED_BASES = ("llama", "qwen2", "qwen3")
# The config fields that Qwen3 shares with Llama and Qwen2; its other fields keep their defaults.
SHARED_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    "attention_dropout",
)
ROWS_AT_ONCE = 8192


def read_base_config(path_or_hub_id: str) -> PreTrainedConfig:
    """The config of a language model that UM3 can extend (UserError for any other); downloads no weights."""
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
    """Load a Llama or Qwen in float32 from a folder or the hub; UserError for another model or unusable weights."""
    read_base_config(path_or_hub_id)
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
    """A base's tokenizer with UM3's special tokens and without a chat template, and its original number of entries."""
    tokenizer = read_text_tokenizer(path_or_hub_id)
    entries = num_entries(tokenizer)
    tokenizer.chat_template = None  # UM3's prompts are plain sequences (um3.model.sequences)
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
    qk_norm: bool,
    base_entries: int | None = None,
    gains: Mapping[str, Tensor] | None = None,
    new_token_init: NewTokenInit = "mean",
    seed: int = 0,
) -> PreTrainedModel:
    """Add the rows of `ids` to a base and, with `qk_norm`, query-key normalisation. The layers' tensors are shared.

    The first `base_entries` rows are kept: those of the base's own tokenizer (None: as many as fit); padding rows after
    them are dropped. New input and output rows are the mean of the kept ones (section 4 of the paper), or normal with
    their standard deviation; the output head is untied. `gains` of an inserted normalisation (`fit_gains`) default to
    ones. UserError: `qk_norm` is off for a base that has it, or on for one whose layer Qwen3 cannot express; the
    tokenizer has more entries than the base has rows.
    """
    config = base_model.config
    if config.model_type == "qwen3" and not qk_norm:
        raise UserError("the base has query-key normalisation; set model.qk_norm=true")
    weights = dict(base_model.state_dict())
    rows = len(weights[EMBEDDING])
    kept = min(rows, ids.text_vocab_size) if base_entries is None else base_entries
    check_vocabulary(kept, rows=rows)

    for name, source in ((HEAD, EMBEDDING if config.tie_word_embeddings else HEAD), (EMBEDDING, EMBEDDING)):
        generator = torch_generator(seed, "new rows", source) if new_token_init == "random" else None
        weights[name] = _extend_rows(weights[source], kept=kept, total=ids.vocab_size, generator=generator)
    new_config: PreTrainedConfig = copy.deepcopy(config)
    model_class = type(base_model)
    if inserts_qk_norm(config, qk_norm=qk_norm):
        weights |= _qk_norm_weights(base_model, gains=gains or {})
        new_config, model_class = _qwen3_config(config), Qwen3ForCausalLM
    base_name, tied = base_model.name_or_path or "", bool(config.tie_word_embeddings)
    base = {"name": base_name, "architecture": type(base_model).__name__, "entries": kept, "tied": tied}
    new_config.um3 = {"base": base | {"license": _license_of(base_name)}}  # for the export and the model card
    new_config.vocab_size = ids.vocab_size
    new_config.tie_word_embeddings = False
    new_config.bos_token_id, new_config.eos_token_id = ids.bos_id, ids.eos_id
    new_config.pad_token_id = None
    return set_generation_defaults(assemble_model(model_class, new_config, weights), ids=ids)


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


def inserts_qk_norm(config: PreTrainedConfig, *, qk_norm: bool) -> bool:
    """Whether extending a base with this config inserts query-key normalisation."""
    return qk_norm and config.model_type != "qwen3"


@torch.no_grad()
def fit_gains(base_model: PreTrainedModel, *, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """Least-squares gains of an inserted normalisation, (K,) each by parameter name, on batches of ids (B, T).

    Per layer and head dimension: the g that minimises sum (x - g * x / rms(x))^2 over the queries (keys) x. With
    n = x / rms(x) that is g = sum(n^2 * rms) / sum(n^2), a mean of rms weighted by the dimension's share. One gain
    serves all heads and positions; training has to learn the differences between them.
    """
    head_dim, eps = _head_dim(base_model.config), base_model.config.rms_norm_eps
    sums: dict[str, Tensor] = {}
    hooks = []

    def collect(key: str, output_BTD: Tensor) -> None:
        x_XK = output_BTD.double().reshape(-1, head_dim)
        rms_X1 = (x_XK.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        share_XK = (x_XK / rms_X1).pow(2)
        sums[key] = sums.get(key, 0) + torch.stack([(share_XK * rms_X1).sum(0), share_XK.sum(0)])

    for name, module in base_model.named_modules():
        if name.endswith((".q_proj", ".k_proj")):
            key = name.removesuffix("proj") + "norm.weight"
            hooks.append(module.register_forward_hook(lambda _m, _i, output, key=key: collect(key, output)))
    try:
        for input_ids_BT in track(calibration, total=len(calibration), label="fitting qk-norm", unit="batches"):
            base_model.model(input_ids=input_ids_BT.to(base_model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: (above_K / below_K.clamp(min=eps)).to(base_model.dtype) for key, (above_K, below_K) in sums.items()}


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
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        card = cached_file(path_or_hub_id, "README.md", **quiet) if path_or_hub_id else None
        return str(ModelCard.load(card, ignore_metadata_errors=True).data.license or "") if card else ""
    except (OSError, ValueError):
        return ""


def _qwen3_config(config: PreTrainedConfig) -> Qwen3Config:
    if getattr(config, "mlp_bias", False):
        raise UserError("the base has MLP biases, which the Qwen3 layer does not support; set model.qk_norm=false")
    if getattr(config, "use_sliding_window", False):
        raise UserError("the base uses sliding-window attention; UM3 needs full attention, choose another base")
    return Qwen3Config(
        **{name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS},
        head_dim=_head_dim(config),
        attention_bias=config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False)),
    )


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _qk_norm_weights(base_model: PreTrainedModel, *, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that Qwen3 has and the base lacks: the gains, and for Qwen2 a zero bias of the output projection."""
    config, like = base_model.config, base_model.model.embed_tokens.weight
    layers = [f"model.layers.{layer}.self_attn" for layer in range(config.num_hidden_layers)]
    names, ones_K = (
        [f"{layer}.{part}_norm.weight" for layer in layers for part in "qk"],
        like.new_ones(_head_dim(config)),
    )
    weights = {name: gains.get(name, ones_K).to(like, copy=True) for name in names}
    if config.model_type == "qwen2":
        weights |= {f"{layer}.o_proj.bias": like.new_zeros(config.hidden_size) for layer in layers}
    return weights
