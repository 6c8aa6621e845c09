"""Turning an existing Llama or Qwen into UM3: visual rows, an untied head, query-key normalisation.

Shapes: B batch, T positions, V entries, D width, K head dimension, X vectors of one head.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import SafetensorError
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
from um3.core.progress import track
from um3.core.seeds import torch_generator
from um3.model.configuration import NewTokenInit
from um3.model.text_tokenizer import add_image_tokens, encode_texts, num_entries, read_text_tokenizer
from um3.model.vocabulary import UnifiedVocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SUPPORTED_BASES = ("llama", "qwen2", "qwen3")
# What Qwen3's layer has in common with Llama's and Qwen2's; the rest of its config keeps the defaults.
SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
)
ROWS_AT_ONCE = 8192


def read_base_config(path_or_hub_id: str) -> PreTrainedConfig:
    """The config of a language model that UM3 can extend, without its weights.

    Raises:
        UserError: nothing there, a UM3, another architecture, no causal language model, or quantised weights.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_hub_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loadable(path_or_hub_id, error) from None
    if config.model_type not in SUPPORTED_BASES:
        known = ", ".join(SUPPORTED_BASES)
        raise UserError(f"base '{path_or_hub_id}' is a '{config.model_type}' model; UM3 extends one of: {known}")
    if getattr(config, "um3", None) is not None:
        raise UserError(f"'{path_or_hub_id}' is a UM3 already; train on from its folder with model.base_model=FOLDER")
    architecture = next(iter(config.architectures or []), "")
    if architecture and not architecture.endswith("ForCausalLM"):
        raise UserError(f"base '{path_or_hub_id}' is a {architecture}, no causal language model (...ForCausalLM)")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"base '{path_or_hub_id}' has quantised weights; give the model they were made from")
    return config


def load_base(path_or_hub_id: str) -> PreTrainedModel:
    """Load a Llama or Qwen language model in float32 from a folder or the hub.

    Raises:
        UserError: what `read_base_config` refuses, or weights that are missing or damaged.
    """
    read_base_config(path_or_hub_id)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_hub_id, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(path_or_hub_id, error) from None
    base, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights of base '{path_or_hub_id}' lack '{missing[0]}' and {len(missing) - 1} more; fetch them again"
        )
    return cast(PreTrainedModel, base)


def load_base_tokenizer(path_or_hub_id: str) -> tuple[PreTrainedTokenizerBase, int]:
    """A base's tokenizer with UM3's marks and without a chat template, and the number of entries it came with.

    Raises:
        UserError: there is no tokenizer at that place.
    """
    tokenizer = read_text_tokenizer(path_or_hub_id)
    if not encode_texts(["a"], tokenizer=tokenizer)[0]:  # transformers makes an empty one where there are no files
        raise UserError(f"no text tokenizer at '{path_or_hub_id}' (it makes no tokens of a text); give the base's own")
    entries = num_entries(tokenizer)
    tokenizer.chat_template = None  # UM3's prompts are plain rows (um3.model.sequences)
    return add_image_tokens(tokenizer), entries


def check_vocabulary(entries: int, *, rows: int) -> None:
    """UserError if a tokenizer of so many entries is not that of a base with so many rows."""
    if entries > rows:
        raise UserError(
            f"the text tokenizer has {entries:,} entries, but the base only {rows:,} rows for them; "
            "give the tokenizer the base was trained with"
        )


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
    """Add the rows of `ids` to a base and, with `qk_norm`, query-key normalisation. The body's tensors are shared.

    The first `base_entries` rows are kept: those of the base's own tokenizer (None: all there is room for); a padded
    tail is cut. New input and output rows are the mean of them (section 4 of the paper), or normal with their
    standard deviation; the output head is untied. Gains of an inserted normalisation are `fit_gains`', or ones.

    Raises:
        UserError: `qk_norm` is off for a base that has it, or on for one whose layer Qwen3 cannot express; a
            tokenizer with more entries than the base has rows.
    """
    config = base_model.config
    if config.model_type == "qwen3" and not qk_norm:
        raise UserError("the base has query-key normalisation; set qk_norm=true")
    weights = dict(base_model.state_dict())
    rows = len(weights[EMBEDDING])
    kept = min(rows, ids.text_vocab_size) if base_entries is None else base_entries
    check_vocabulary(kept, rows=rows)

    def extended(name: str) -> Tensor:
        generator = torch_generator(seed, "new rows", name)
        return _extend_rows(
            weights[name], kept=kept, total=ids.vocab_size, new_token_init=new_token_init, generator=generator
        )

    weights[HEAD] = extended(EMBEDDING if config.tie_word_embeddings else HEAD)
    weights[EMBEDDING] = extended(EMBEDDING)
    new_config: PreTrainedConfig = copy.deepcopy(config)
    model_class = type(base_model)
    if inserts_qk_norm(config, qk_norm=qk_norm):
        weights |= _qk_norm_weights(base_model, gains=gains or {})
        new_config, model_class = _qwen3_config(config), Qwen3ForCausalLM
    new_config.um3 = {"base": _facts(base_model, entries=kept)}
    new_config.vocab_size = ids.vocab_size
    new_config.tie_word_embeddings = False
    new_config.bos_token_id, new_config.eos_token_id = ids.bos_id, ids.eos_id
    new_config.pad_token_id = None
    return set_generation_defaults(assemble_model(model_class, new_config, weights), ids=ids)


def assemble_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model around these very tensors, none copied; tied if the config says so."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # The rotary table is no parameter, so loading left it on the meta device: build it again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights[EMBEDDING].device)
    return model


def set_generation_defaults(model: PreTrainedModel, *, ids: UnifiedVocabulary) -> PreTrainedModel:
    """Give `generate()` the special ids; returns the model."""
    # The padding entry goes to generation only: in the model's config it would freeze that row, which for a
    # tokenizer that pads with its end of text is a row in use.
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=ids.pad_id
    )
    return model


def inserts_qk_norm(config: PreTrainedConfig, *, qk_norm: bool) -> bool:
    """Whether extending a base with this config adds a normalisation that it lacks."""
    return qk_norm and config.model_type != "qwen3"


@torch.no_grad()
def fit_gains(base_model: PreTrainedModel, *, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """Least-squares gains of an inserted normalisation, (K,) each by parameter name, on batches of ids (B, T).

    Per layer and head dimension the g that minimises sum (x - g * x / rms(x))^2 over the queries (keys) x. With
    n = x / rms(x) that is g = sum(n^2 * rms) / sum(n^2): a mean of rms weighted by the dimension's share. One
    gain serves all heads and positions, so what differs between them is lost and left to training.
    """
    head_dim, eps = _head_dim(base_model.config), base_model.config.rms_norm_eps
    sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    hooks = []

    def collect(key: str, output_BTD: Tensor) -> None:
        x_XK = output_BTD.double().reshape(-1, head_dim)
        rms_X1 = (x_XK.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        share_XK = (x_XK / rms_X1).pow(2)
        above_K, below_K = sums.get(key, (0.0, 0.0))
        sums[key] = (above_K + (share_XK * rms_X1).sum(0), below_K + share_XK.sum(0))

    for index, layer in enumerate(base_model.model.layers):
        for part, projection in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj)):
            key = _gain_name(index, part)
            hooks.append(projection.register_forward_hook(lambda _m, _i, output, key=key: collect(key, output)))
    try:
        for input_ids_BT in track(calibration, total=len(calibration), label="fitting qk-norm", unit="rows"):
            base_model.model(input_ids=input_ids_BT.to(base_model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = base_model.dtype
    return {
        key: (above_K / torch.as_tensor(below_K).clamp(min=eps)).to(dtype) for key, (above_K, below_K) in sums.items()
    }


def _extend_rows(
    rows_VD: Tensor, *, kept: int, total: int, new_token_init: NewTokenInit, generator: torch.Generator
) -> Tensor:
    """`total` rows: the first `kept` as they are, then new ones."""
    kept_VD = rows_VD[:kept]
    extended_VD = rows_VD.new_empty(total, rows_VD.shape[1])
    extended_VD[:kept] = kept_VD
    if new_token_init == "mean":
        # In parts: a double copy of 128,256 rows of width 2,048 would take 2 GiB.
        sums_D = [part_VD.double().sum(0) for part_VD in kept_VD.split(ROWS_AT_ONCE)]
        extended_VD[kept:] = (torch.stack(sums_D).sum(0) / kept).to(rows_VD.dtype)
    else:
        noise_VD = torch.randn(total - kept, rows_VD.shape[1], generator=generator)
        extended_VD[kept:] = noise_VD.to(rows_VD.device) * kept_VD.std()
    return extended_VD


def _facts(base_model: PreTrainedModel, *, entries: int) -> dict[str, Any]:
    """What export and the model card must know of a base; kept in config.json under um3.base."""
    name = base_model.name_or_path or ""
    return {
        "name": name,
        "architecture": type(base_model).__name__,
        "entries": entries,
        "tied": bool(base_model.config.tie_word_embeddings),
        "license": _license_of(name),
    }


def _license_of(path_or_hub_id: str) -> str:
    """The licence that a model's card names in its first lines; empty where it names none."""
    import yaml

    if not path_or_hub_id:
        return ""
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        card = cached_file(path_or_hub_id, "README.md", **quiet)
        parts = open(card, encoding="utf-8").read().split("---\n", 2) if card else []
        values = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    return str(values.get("license") or "") if isinstance(values, dict) else ""


def _not_loadable(path_or_hub_id: str, error: Exception) -> UserError:
    reason = " ".join(str(error).strip().split("\n")[0].split())
    return UserError(f"cannot load the base model '{path_or_hub_id}' ({reason}); give a folder or a hub id")


def _qwen3_config(config: PreTrainedConfig) -> Qwen3Config:
    if getattr(config, "mlp_bias", False):
        raise UserError("the base has biases in its MLP, which the Qwen3 layer cannot hold; set qk_norm=false")
    if getattr(config, "use_sliding_window", False):
        raise UserError("the base uses sliding-window attention; UM3 rows need full attention, choose another base")
    return Qwen3Config(
        **{name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS},
        head_dim=_head_dim(config),
        attention_bias=_has_bias(config),
    )


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _has_bias(config: PreTrainedConfig) -> bool:
    return config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))


def _gain_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}_norm.weight"


def _qk_norm_weights(base_model: PreTrainedModel, *, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors Qwen3 has and the base lacks: the gains, and a zero bias where only q, k and v have one."""
    config, like = base_model.config, base_model.model.embed_tokens.weight
    weights = {}
    for layer in range(config.num_hidden_layers):
        for part in ("q", "k"):
            ones_K = torch.ones(_head_dim(config), dtype=like.dtype, device=like.device)
            name = _gain_name(layer, part)
            weights[name] = gains.get(name, ones_K).to(like)
        if config.model_type == "qwen2":
            weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = like.new_zeros(config.hidden_size)
    return weights
