"""UM3 as a stock language model: a fresh one, or an existing Llama or Qwen with visual rows added.

With query-key normalisation the architecture is transformers' Qwen3ForCausalLM, without it LlamaForCausalLM
(or the base's own): no modeling code of ours, so transformers, vLLM and lm-eval load a checkpoint as it is.

Shapes: B batch, T positions, V entries, D width, H heads, K head dimension.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from um3.core.errors import UserError
from um3.core.files import atomic_folder
from um3.ids import IdSpace

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QLIP_FOLDER = "qlip"
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


@dataclass
class ModelConfig:
    """The language model. With `base` (a folder or hub id) only `qk_norm` matters, the sizes are the base's."""

    base: str = ""
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 32
    intermediate_size: int = 512
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 512
    qk_norm: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")


class ParameterCounts(NamedTuple):
    """Parameters by part; a tied output head counts as 0."""

    text_rows_in: int
    text_rows_out: int
    visual_rows_in: int
    visual_rows_out: int
    body: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)


class LoadedModel(NamedTuple):
    """A UM3 folder in memory, without its visual tokenizer."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    ids: IdSpace
    fingerprint: str


def build_model(config: ModelConfig, *, ids: IdSpace, calibration: Sequence[Tensor] = ()) -> PreTrainedModel:
    """The model a config asks for: its base extended (`calibration`: see `extend_model`), or fresh weights.

    Works under `torch.device("meta")` for counting parameters.
    """
    if config.base:
        return extend_model(load_base(config.base), ids=ids, qk_norm=config.qk_norm, calibration=calibration)
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
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
    }
    if config.qk_norm:
        return _finish(Qwen3ForCausalLM(Qwen3Config(**sizes)), ids=ids)
    return _finish(LlamaForCausalLM(LlamaConfig(**sizes)), ids=ids)


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
    return _finish(model, ids=ids)


def count_parameters(model: PreTrainedModel, *, ids: IdSpace) -> ParameterCounts:
    """Parameters by part; also on the meta device."""
    width, tied = model.config.hidden_size, model.config.tie_word_embeddings
    text, visual = ids.text_vocab_size * width, ids.visual_vocab_size * width
    total = sum(parameter.numel() for parameter in model.parameters())
    out = (0, 0) if tied else (text, visual)
    return ParameterCounts(
        text_rows_in=text,
        text_rows_out=out[0],
        visual_rows_in=visual,
        visual_rows_out=out[1],
        body=total - text - visual - sum(out),
    )


def save_model(
    folder: str | Path,
    *,
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    ids: IdSpace,
    qlip_folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a stock Hugging Face folder with the visual tokenizer in `qlip/`, whole or not at all.

    `state_dict` replaces the model's own tensors (gathered from a sharded run). config.json carries the id space
    and the visual tokenizer's fingerprint under "um3"; other software passes over that key.
    """
    import tokenizer

    qlip, processor = tokenizer.load(qlip_folder)
    with atomic_folder(folder) as partial:
        model.config.um3 = ids.to_dict() | {"tokenizer_fingerprint": qlip.fingerprint()}
        model.save_pretrained(partial, state_dict=state_dict)
        text_tokenizer.save_pretrained(partial)
        qlip.save_pretrained(partial / QLIP_FOLDER)
        processor.save_pretrained(partial / QLIP_FOLDER)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load what `save_model` wrote, in eval mode.

    Raises:
        UserError: no such folder, or a model that is no UM3.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make demo or pass --model with the folder of a trained one")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        text_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {' '.join(str(error).strip().split(chr(10))[0].split())}") from None
    model.to(torch.device(device))  # type: ignore[arg-type]
    stored = getattr(model.config, "um3", None)
    if stored is None:
        raise UserError(
            f"{folder} holds a {model.config.model_type} model that is no UM3 (no 'um3' in its config.json)"
        )
    return LoadedModel(
        model=model.eval(),
        text_tokenizer=text_tokenizer,
        ids=IdSpace.from_dict(stored),
        fingerprint=str(stored["tokenizer_fingerprint"]),
    )


def _finish(model: PreTrainedModel, *, ids: IdSpace) -> PreTrainedModel:
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
