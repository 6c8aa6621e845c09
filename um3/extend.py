"""Turning an existing Llama or Qwen into UM3: visual rows, an untied head, query-key normalisation.

Shapes: B batch, T positions, V entries, D width, K head dimension, X vectors of one head.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from um3.core.errors import UserError
from um3.ids import IdSpace

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


def load_base(path_or_hub_id: str) -> PreTrainedModel:
    """Load a Llama or Qwen language model in float32 from a folder or the hub.

    Raises:
        UserError: nothing loadable there, or another architecture.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(path_or_hub_id, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).strip().split("\n")[0].split())
        raise UserError(
            f"cannot load the base model '{path_or_hub_id}' ({reason}); give a folder or a hub id"
        ) from None
    if base.config.model_type not in SUPPORTED_BASES:
        known = ", ".join(SUPPORTED_BASES)
        raise UserError(f"base '{path_or_hub_id}' is a '{base.config.model_type}' model; UM3 extends one of: {known}")
    return base


def extend_model(
    base_model: PreTrainedModel, *, ids: IdSpace, qk_norm: bool, calibration: Sequence[Tensor] = ()
) -> PreTrainedModel:
    """Add the rows of `ids` to a base and, with `qk_norm`, query-key normalisation. The body's tensors are shared.

    Text rows are kept. New input and output rows are the mean of the text rows (section 4 of the paper); the
    output head is untied. Gains of an inserted normalisation are fitted to the queries and keys the base computes
    on the `calibration` batches (input ids (B, T)), or are ones without any.

    Raises:
        UserError: `qk_norm` is off for a base that has it, or on for one whose layer Qwen3 cannot express.
    """
    config = base_model.config
    has_qk_norm = config.model_type == "qwen3"
    if has_qk_norm and not qk_norm:
        raise UserError("the base has query-key normalisation; set qk_norm=true")
    weights = dict(base_model.state_dict())
    weights[HEAD] = _extend_rows(weights[EMBEDDING if config.tie_word_embeddings else HEAD], ids=ids)
    weights[EMBEDDING] = _extend_rows(weights[EMBEDDING], ids=ids)
    new_config: PreTrainedConfig = copy.deepcopy(config)
    model_class = type(base_model)
    if qk_norm and not has_qk_norm:
        weights |= _qk_norm_weights(base_model, calibration=calibration)
        new_config, model_class = _qwen3_config(config), Qwen3ForCausalLM
    new_config.vocab_size = ids.vocab_size
    new_config.tie_word_embeddings = False
    new_config.bos_token_id, new_config.eos_token_id = ids.bos_id, ids.eos_id
    new_config.pad_token_id = None
    with torch.device("meta"):
        model = model_class(new_config)
    model.load_state_dict(weights, strict=True, assign=True)
    # The rotary table is no parameter, so loading left it on the meta device: build it again.
    model.model.rotary_emb = type(model.model.rotary_emb)(new_config).to(weights[EMBEDDING].device)
    return set_generation_defaults(model, ids=ids)


def set_generation_defaults(model: PreTrainedModel, *, ids: IdSpace) -> PreTrainedModel:
    """Give `generate()` the special ids; returns the model."""
    # The padding entry goes to generation only: in the model's config it would freeze that row, which for a
    # tokenizer that pads with its end of text is a row in use.
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=ids.pad_id
    )
    return model


def _extend_rows(rows_VD: Tensor, *, ids: IdSpace) -> Tensor:
    """Rows for the whole id space: the base's text rows (a padded tail is cut), the mean of them everywhere else."""
    kept = min(len(rows_VD), ids.text_vocab_size)
    new = [mark for mark in (ids.begin_of_image_id, ids.end_of_image_id) if mark < kept]
    total_D = rows_VD[:kept].sum(0, dtype=torch.float64)
    for mark in new:
        total_D = total_D - rows_VD[mark]
    mean_D = (total_D / (kept - len(new))).to(rows_VD.dtype)
    extended_VD = mean_D.repeat(ids.vocab_size, 1)
    extended_VD[:kept] = rows_VD[:kept]
    for mark in new:
        extended_VD[mark] = mean_D
    return extended_VD


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


def _qk_norm_weights(base_model: PreTrainedModel, *, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors Qwen3 has and the base lacks: the gains, and a zero bias where only q, k and v have one."""
    config, like = base_model.config, base_model.model.embed_tokens.weight
    gains = _fit_gains(base_model, calibration=calibration)
    weights = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for part in ("q", "k"):
            ones_K = torch.ones(_head_dim(config), dtype=like.dtype, device=like.device)
            weights[f"{prefix}{part}_norm.weight"] = gains.get((layer, part), ones_K)
        if config.model_type == "qwen2":
            weights[f"{prefix}o_proj.bias"] = like.new_zeros(config.hidden_size)
    return weights


@torch.no_grad()
def _fit_gains(base_model: PreTrainedModel, *, calibration: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
    """Least-squares gains: per layer and head dimension the g that minimises sum (x - g * x / rms(x))^2.

    With n = x / rms(x) that is g = sum(n^2 * rms) / sum(n^2): a mean of rms weighted by the dimension's share. One
    gain serves all heads and positions, so what differs between them is lost and left to training.
    """
    head_dim, eps = _head_dim(base_model.config), base_model.config.rms_norm_eps
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    hooks = []

    def collect(key: tuple[int, str], output_BTD: Tensor) -> None:
        x_XK = output_BTD.double().reshape(-1, head_dim)
        rms_X1 = (x_XK.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        share_XK = (x_XK / rms_X1).pow(2)
        above_K, below_K = sums.get(key, (0.0, 0.0))
        sums[key] = (above_K + (share_XK * rms_X1).sum(0), below_K + share_XK.sum(0))

    for index, layer in enumerate(base_model.model.layers):
        for part, projection in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj)):
            key = (index, part)
            hooks.append(projection.register_forward_hook(lambda _m, _i, output, key=key: collect(key, output)))
    try:
        for input_ids_BT in calibration:
            base_model.model(input_ids=input_ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = base_model.dtype
    return {key: (above_K / below_K.clamp(min=eps)).to(dtype) for key, (above_K, below_K) in sums.items()}
