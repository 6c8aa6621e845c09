"""Insert query-key normalisation into a Llama or Qwen2, so that it computes almost what it computed before.

RMS normalisation divides a head's query by its own norm, which differs from token to token and head to head, while the
gain that follows is one vector for all heads. What it loses can be kept: one dimension of every head is given up to
hold a constant so large that each query has nearly the same norm. The gain removes that dimension again and restores
the others. Most language models barely notice the loss of the weakest of 64 dimensions.

Shapes: B batch, T positions, D width, K head dimension, H heads, X positions, A = D + 1 (a 1 for biases).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from um3.core.errors import UserError
from um3.core.progress import track
from um3.model.extend import assemble_model

# The config fields that Qwen3 shares with Llama and Qwen2; its other fields keep their defaults.
SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_parameters", "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
MARGIN = 4.0
"""Common norm of all heads, in units of the largest head's. The larger, the closer to the base, and the later the
normalisation limits a norm that grows in training."""
MAX_ERROR = 0.1
"""Largest mean square error of the constant that a layer's inputs can express without a bias. In a language model with
trained weights it is about 0.001; random weights have no such direction."""
RIDGE = 1e-5


def inserts_qk_norm(config: PreTrainedConfig, *, qk_norm: bool) -> bool:
    """Whether a model with this base needs the insertion; UserError if the base has qk-norm and `qk_norm` is off."""
    if config.model_type == "qwen3" and not qk_norm:
        raise UserError("the base has query-key normalisation; set qk_norm=true")
    return qk_norm and config.model_type != "qwen3"


def insert_qk_norm(base: PreTrainedModel, fitted: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The base as a Qwen3 with query-key normalisation, with the tensors of `fit_qk_norm` (None: gains of 1).

    All other tensors are shared with the base. UserError for a base whose layers Qwen3 cannot express.
    """
    config = base.config
    if getattr(config, "mlp_bias", False):
        raise UserError("the base has MLP biases, which the Qwen3 layer does not support; set qk_norm=false")
    if getattr(config, "use_sliding_window", False):
        raise UserError("the base uses sliding-window attention; UM3 needs full attention, choose another base")
    weights: dict[str, Tensor] = dict(base.state_dict())
    like, head_dim = base.model.embed_tokens.weight, _head_dim(config)
    has_biases = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn"
        weights |= {f"{prefix}.{part}_norm.weight": like.new_ones(head_dim) for part in "qk"}
        if has_biases:  # Qwen2 has none at the output projection
            weights.setdefault(f"{prefix}.o_proj.bias", like.new_zeros(config.hidden_size))
    weights |= {name: tensor.to(like, copy=True) for name, tensor in (fitted or {}).items()}
    shared = {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS}
    new_config = Qwen3Config(**shared, head_dim=head_dim, attention_bias=has_biases)
    new_config.architectures = config.architectures or [type(base).__name__]
    model = assemble_model(Qwen3ForCausalLM, new_config, weights)
    model.name_or_path = base.name_or_path
    return model


@torch.no_grad()
def fit_qk_norm(base: PreTrainedModel, *, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """Projections and gains by parameter name, fitted to batches of ids (B, T), with at least D positions in all.

    Only the second moments of each layer's inputs are needed. The dimension that is given up is the one with the least
    energy in the attention scores.
    """
    layers = [layer.self_attn for layer in base.model.layers]
    moments = [torch.zeros(1)] * len(layers)

    def collect(index: int, inputs_BTD: Tensor) -> None:
        inputs_XD = inputs_BTD.flatten(0, -2).float()
        inputs_XA = torch.cat([inputs_XD, torch.ones_like(inputs_XD[:, :1])], 1)
        moments[index] = moments[index].to(inputs_XA) + inputs_XA.T @ inputs_XA

    hooks = [
        attention.q_proj.register_forward_pre_hook(lambda _m, inputs, index=index: collect(index, inputs[0]))
        for index, attention in enumerate(layers)
    ]
    try:
        for input_ids_BT in track(calibration, total=len(calibration), label="fitting qk-norm", unit="batches"):
            base.model(input_ids=input_ids_BT.to(base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    head_dim = _head_dim(base.config)
    fitted: dict[str, Tensor] = {}
    for index, attention in enumerate(layers):
        tensors = _fit_layer(attention, (moments[index] / moments[index][-1, -1]).double(), head_dim=head_dim)
        fitted |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in tensors.items()}
    return fitted


def _fit_layer(attention: Any, moments_AA: Tensor, *, head_dim: int) -> dict[str, Tensor]:
    """New projections and gains of a layer whose inputs, with a 1 at the end, have these second moments."""
    projections: dict[str, nn.Linear] = {"q": attention.q_proj, "k": attention.k_proj}
    energies = {part: _energies(projections[part], moments_AA).unflatten(0, (-1, head_dim)) for part in "qk"}
    constant_A, error = _constant(moments_AA, has_bias=attention.q_proj.bias is not None)
    groups_HK = energies["q"].unflatten(0, (len(energies["k"]), -1)).sum(1)
    weakest = int((groups_HK * energies["k"]).sum(0).argmin())
    tensors: dict[str, Tensor] = {}
    for part, projection in projections.items():
        energy_HK = energies[part]
        if error > MAX_ERROR:  # one gain, with which the mean square of all heads is kept
            tensors[f"{part}_norm.weight"] = energy_HK.mean().sqrt().expand(head_dim)
            continue
        energy_HK[:, weakest] = 0
        norms_H = energy_HK.sum(1)
        common = MARGIN**2 * norms_H.max()
        rows_HA = (common - norms_H).sqrt()[:, None] * constant_A
        weight_HKD = projection.weight.detach().unflatten(0, (-1, head_dim)).clone()
        weight_HKD[:, weakest] = rows_HA[:, :-1].to(weight_HKD)
        tensors[f"{part}_proj.weight"] = weight_HKD.flatten(0, 1)
        if projection.bias is not None:
            bias_HK = projection.bias.detach().unflatten(0, (-1, head_dim)).clone()
            bias_HK[:, weakest] = rows_HA[:, -1].to(bias_HK)
            tensors[f"{part}_proj.bias"] = bias_HK.flatten()
        gain_K = (common / head_dim).sqrt().repeat(head_dim)
        gain_K[weakest] = 0
        tensors[f"{part}_norm.weight"] = gain_K
    return {name: tensor.to(attention.q_proj.weight, copy=True) for name, tensor in tensors.items()}


def _energies(projection: nn.Linear, moments_AA: Tensor) -> Tensor:
    """Mean square of every output of a projection."""
    bias = torch.zeros_like(projection.weight[:, 0]) if projection.bias is None else projection.bias
    weight_OA = torch.cat([projection.weight, bias[:, None]], 1).to(moments_AA)
    return ((weight_OA @ moments_AA) * weight_OA).sum(1)


def _constant(moments_AA: Tensor, *, has_bias: bool) -> tuple[Tensor, float]:
    """A row whose product with the inputs is nearly 1, or with a bias exactly, and its mean square error."""
    row_A = torch.zeros_like(moments_AA[0])
    if has_bias:
        row_A[-1] = 1
        return row_A, 0.0
    second_DD, mean_D = moments_AA[:-1, :-1], moments_AA[:-1, -1]
    ridge = RIDGE * second_DD.diagonal().mean()
    row_A[:-1] = torch.linalg.solve(second_DD + ridge * torch.eye(len(mean_D)).to(second_DD), mean_D)
    return row_A, float(1 - 2 * row_A[:-1] @ mean_D + row_A[:-1] @ second_DD @ row_A[:-1])


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
