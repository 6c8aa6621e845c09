"""A stock Llama, Qwen2 or Qwen3 as sampling needs it: every prompt read once, then one id a row at a time.

The model's own weights without transformers' layers between them. The products of a layer that read the same input
are one; on a CPU their weights are laid out as oneDNN reads them fastest, a copy that lives as long as the `Body`.
Keys and values go into room reserved once. A prompt is read alone, whatever else is in the batch, and every row's
keys begin at place 0: a row's numbers do not depend on its neighbours. What is left is the rounding of attention's
products, which can change with the number of keys looked at.

Shapes: R rows, N rows or positions, T positions of a prompt, D width, H query heads, G key-value heads,
K width of a head, C reserved places, W places looked at, V entries.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from um3.core import onednn
from um3.core.errors import UserError

SUPPORTED = ("llama", "qwen2", "qwen3")
WINDOW = 64
"""Attention looks at a multiple of this many places: few lengths for kernels and recorded graphs to know."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries (N, H, K), keys (N, G, K), values (N, G, K)) -> (N, H * K)."""


class Product:
    """x (N, D) -> x W^T + b (N, V), for the rows of one weight or of several, one after the other.

    Raises:
        UserError: a layer that is more than its weight (an adapter, a quantised one).
    """

    def __init__(self, *linears: nn.Linear, rows: slice = slice(None), packed: bool = True):
        for linear in linears:
            if type(linear) is not nn.Linear:
                raise UserError(
                    f"sampling reads plain weights, not a {type(linear).__name__}; merge or convert it first"
                )
        weights = [linear.weight.detach()[rows] for linear in linears]
        weight_VD = torch.cat(weights) if len(weights) > 1 else weights[0]
        has_bias = any(linear.bias is not None for linear in linears)
        self.bias_V = torch.cat([_bias_of(linear)[rows] for linear in linears]) if has_bias else None
        self.is_onednns = onednn.serves(weight_VD, weight_VD)
        self.weight_VD = onednn.pack(weight_VD) if packed and self.is_onednns else weight_VD

    def __call__(self, x_ND: Tensor) -> Tensor:
        if not self.is_onednns:
            return F.linear(x_ND, self.weight_VD, self.bias_V)
        if len(x_ND) == 1:
            # One row alone has a kernel of its own, which rounds otherwise than that for several.
            return onednn.linear(x_ND.expand(2, -1).contiguous(), self.weight_VD, self.bias_V)[:1]
        return onednn.linear(x_ND, self.weight_VD, self.bias_V)


def _bias_of(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


class _Layer:
    def __init__(self, layer: Any, *, num_heads: int, num_kv_heads: int, activation: Callable[[Tensor], Tensor]):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product(attention.o_proj)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)
        self.down = Product(mlp.down_proj)
        self.activation = activation
        self.qk_gain: Tensor | None = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm] * num_heads + [attention.k_norm] * num_kv_heads
            self.qk_gain = torch.stack([norm.weight for norm in norms])
            self.qk_epsilon = attention.q_norm.variance_epsilon

    def project(self, x_ND: Tensor, *, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries, keys and values (N, heads, K) of normalised and, but for the values, rotated heads."""
        projected = self.qkv(_normalise(x_ND, self.input_norm)).unflatten(-1, (sum(self.heads), -1))
        qk, values_NGK = projected.split([sum(self.heads[:2]), self.heads[2]], dim=1)
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, qk.shape[-1:], None, self.qk_epsilon) * self.qk_gain
        cos_N1K, sin_N1K = rotary
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos_N1K + torch.cat([-second, first], dim=-1) * sin_N1K
        return [*qk.split(self.heads[:2], dim=1), values_NGK]

    def think(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(_normalise(x_ND, self.mlp_norm)).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Body:
    """The decoder of a stock model with its head; the same hidden states as the model's own forward.

    Raises:
        UserError: another architecture, or layers that look at a sliding window.
    """

    def __init__(self, model: PreTrainedModel):
        config, stock = model.config, cast(Any, model)
        if config.model_type not in SUPPORTED:
            raise UserError(f"sampling knows models of type {', '.join(SUPPORTED)}, not '{config.model_type}'")
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise UserError(
                "sampling knows no sliding-window attention; set use_sliding_window to false in config.json"
            )
        self.config, self.device, self.dtype = config, model.device, model.dtype
        self.num_kv_heads = config.num_key_value_heads
        self._embed, self._rotary, self._norm = stock.model.embed_tokens, stock.model.rotary_emb, stock.model.norm
        self._head = stock.lm_head
        # Of the config: once Liger is in use, in a training run that evaluates, new MLPs keep none to be read.
        activation = ACT2FN[config.hidden_act]
        heads = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
        self._layers = [_Layer(layer, **heads, activation=activation) for layer in stock.model.layers]
        self.num_layers, self.head_width = len(self._layers), stock.model.layers[0].self_attn.head_dim

    def head(self, rows: slice, *, packed: bool = True) -> Product:
        """The output head for some of its entries; not `packed` where a copy would cost more than it gives."""
        return Product(self._head, rows=rows, packed=packed)

    def read(self, ids_T: Tensor, *, keep: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Hidden states (T, D) of one sequence; `keep` is given every layer's keys and values (G, T, K)."""

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            q_HTK, k_GTK, v_GTK = (each.transpose(0, 1) for each in (q_THK, k_TGK, v_TGK))
            if keep is not None:
                keep(layer, k_GTK, v_GTK)
            found = F.scaled_dot_product_attention(
                q_HTK[None], k_GTK[None], v_GTK[None], is_causal=True, enable_gqa=len(k_GTK) < len(q_HTK)
            )
            return found[0].transpose(0, 1).flatten(1)

        ids_T = ids_T.to(self.device)
        return self.forward(ids_T, positions_N=torch.arange(len(ids_T), device=self.device), attend=attend)

    def forward(self, ids_N: Tensor, *, positions_N: Tensor, attend: Attend) -> Tensor:
        """Hidden states (N, D), normalised for the head."""
        x_ND = self._embed(ids_N)
        cos_1NK, sin_1NK = self._rotary(x_ND, positions_N.unsqueeze(0))
        rotary = cos_1NK[0].unsqueeze(1), sin_1NK[0].unsqueeze(1)
        for index, layer in enumerate(self._layers):
            x_ND = x_ND + layer.out(attend(index, *layer.project(x_ND, rotary=rotary)))
            x_ND = x_ND + layer.think(x_ND)
        return _normalise(x_ND, self._norm)


class Decoder:
    """Rows that begin with `prompts` and grow by one id a step.

    Raises:
        UserError: a prompt that leaves no room for `num_new` ids.
    """

    def __init__(self, body: Body, *, prompts: Sequence[Tensor], num_new: int):
        check_room(prompts, num_new=num_new, limit=body.config.max_position_embeddings)
        self.body, self.prompts = body, prompts
        self.longest = max(len(prompt) for prompt in prompts)
        self.capacity = _whole_windows(self.longest + num_new)
        rows, heads = len(prompts), body.num_kv_heads
        # Zeros: what is not looked at yet is multiplied by 0, and nothing but a number gives 0 then. The two lie as a
        # CPU multiplies them fastest with the few queries of a head; else a step takes a fifth longer late in an image.
        sizes = (2, body.num_layers, rows, heads, self.capacity * body.head_width)
        places = torch.zeros(sizes, dtype=body.dtype, device=body.device)
        self.keys = places[0].unflatten(-1, (self.capacity, body.head_width))
        self.values = places[1].unflatten(-1, (body.head_width, self.capacity))
        self.rows_R = torch.arange(rows, device=body.device)
        self.lengths_R = torch.tensor([len(prompt) for prompt in prompts], device=body.device)

    def prefill(self) -> Tensor:
        """Read every distinct prompt once, for all rows that begin with it; hidden states (R, D) at their last ids."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            rows_of.setdefault(tuple(prompt.tolist()), []).append(row)
        hidden_RD: Tensor | None = None
        for token_ids, rows in rows_of.items():

            def keep(layer: int, k_GTK: Tensor, v_GTK: Tensor, rows: list[int] = rows) -> None:
                self.keys[layer, rows, :, : k_GTK.shape[1]] = k_GTK
                self.values[layer, rows, :, :, : v_GTK.shape[1]] = v_GTK.transpose(1, 2)

            last_D = self.body.read(torch.tensor(token_ids), keep=keep)[-1]
            if hidden_RD is None:
                hidden_RD = last_D.new_empty(len(self.prompts), len(last_D))
            hidden_RD[rows] = last_D
        assert hidden_RD is not None, "there is always a prompt"
        return hidden_RD

    def window(self, num_new: int) -> int:
        """Places that the step which appends the `num_new`-th id looks at."""
        return _whole_windows(self.longest + num_new)

    def step(self, ids_R: Tensor, *, window: int) -> Tensor:
        """Append an id to every row; hidden states (R, D) after it. Nothing but tensors changes: it can be recorded."""
        places_W = torch.arange(window, device=ids_R.device)
        unseen_RW = places_W > self.lengths_R.unsqueeze(1)
        bias_R11W = torch.zeros(unseen_RW.shape, device=ids_R.device).masked_fill_(unseen_RW, float("-inf"))[
            :, None, None
        ]

        def attend(layer: int, q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor) -> Tensor:
            keys_RGCK, values_RGKC = self.keys[layer], self.values[layer]
            keys_RGCK[self.rows_R, :, self.lengths_R] = k_RGK
            values_RGKC[self.rows_R, :, :, self.lengths_R] = v_RGK
            q_RGQK = q_RHK.unflatten(1, (self.body.num_kv_heads, -1)) * q_RHK.shape[-1] ** -0.5
            scores_RGWQ = torch.matmul(keys_RGCK[:, :, :window], q_RGQK.transpose(2, 3))
            shares_RGQW = (scores_RGWQ.transpose(2, 3).contiguous().float() + bias_R11W).softmax(-1).to(v_RGK.dtype)
            found_RGKQ = torch.matmul(values_RGKC[..., :window], shares_RGQW.transpose(2, 3))
            return found_RGKQ.transpose(2, 3).flatten(1)

        hidden_RD = self.body.forward(ids_R, positions_N=self.lengths_R, attend=attend)
        self.lengths_R += 1
        return hidden_RD


def check_room(prompts: Sequence[Tensor], *, num_new: int, limit: int) -> None:
    """Refuse a prompt with which `num_new` more ids exceed the model's context.

    Raises:
        UserError: names the prompt.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) + num_new > limit:
            raise UserError(
                f"prompt {index + 1} of {len(prompt):,} tokens leaves no room for {num_new:,} more in the model's "
                f"context of {limit:,}; shorten the prompt"
            )


def _whole_windows(places: int) -> int:
    return -(-places // WINDOW) * WINDOW


def _normalise(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
