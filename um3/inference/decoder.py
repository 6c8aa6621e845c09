"""Fast decoding for stock Llama, Qwen2 and Qwen3 models: prefill each prompt once, then one token per sequence a step.

`FastDecoder` runs the model's own weights without transformers' layers between them. Products of a layer that read the
same input are merged into one; on a CPU their weights are copied into oneDNN's fastest layout. `DecodingBatch` holds
the key-value cache of a batch, reserved once. Each prompt is prefilled alone and each sequence's cache starts at
position 0, so a sequence does not depend on the others in its batch. Only the rounding of attention's products can
change, with the number of positions that attention reads.

Shapes: R sequences, N sequences or positions, T positions of a prompt, D width, H query heads, G key-value heads,
K head dimension, C reserved positions, W positions that attention reads, V entries.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from tokenizer import onednn
from um3.core.errors import UserError
from um3.model.visual_parts import DepthHead

SUPPORTED = ("llama", "qwen2", "qwen3")
WINDOW = 64
"""Attention reads a multiple of this many positions, so kernels and recorded graphs see few different lengths."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries (N, H, K), keys (N, G, K), values (N, G, K)) -> (N, H * K)."""


class PackedLinear:
    """x (N, D) -> x W^T + b (N, V), for the rows of one plain linear layer or of several concatenated ones."""

    def __init__(self, *linears: nn.Linear, rows: slice = slice(None), packed: bool = True):
        for linear in linears:
            if type(linear) is not nn.Linear:
                raise UserError(f"sampling needs plain linear layers, not {type(linear).__name__}; merge or convert it")
        weights = [linear.weight.detach()[rows] for linear in linears]
        weight_VD = torch.cat(weights) if len(weights) > 1 else weights[0]
        # Of the layers that are merged, stock models have a bias in all or in none.
        self.bias_V = torch.cat([linear.bias[rows] for linear in linears]) if linears[0].bias is not None else None
        # On every processor: the packed layout suits few rows, and no row depends on how many others there are.
        self.uses_onednn = onednn.supports(weight_VD, weight_VD)
        self.weight_VD = onednn.pack(weight_VD) if packed and self.uses_onednn else weight_VD

    def __call__(self, x_ND: Tensor) -> Tensor:
        if not self.uses_onednn:
            return F.linear(x_ND, self.weight_VD, self.bias_V)
        if len(x_ND) == 1:
            # A single row has a kernel of its own, which rounds differently.
            return onednn.linear(x_ND.expand(2, -1).contiguous(), self.weight_VD, self.bias_V)[:1]
        return onednn.linear(x_ND, self.weight_VD, self.bias_V)


class _Layer:
    def __init__(self, layer: Any, *, config: Any):
        attention, mlp = layer.self_attn, layer.mlp
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = PackedLinear(attention.o_proj)
        self.gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj)
        # Not the layer's own: Liger's MLPs, in a training run that evaluates, have none.
        self.activation = ACT2FN[config.hidden_act]
        self.qk_gain: Tensor | None = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm] * num_heads + [attention.k_norm] * num_kv_heads
            self.qk_gain = torch.stack([norm.weight for norm in norms])
            self.qk_epsilon = attention.q_norm.variance_epsilon

    def project(self, x_ND: Tensor, *, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries, keys and values (N, heads, K); queries and keys are normalised and rotated."""
        projected = self.qkv(_normalise(x_ND, self.input_norm)).unflatten(-1, (sum(self.heads), -1))
        qk, values_NGK = projected.split([sum(self.heads[:2]), self.heads[2]], dim=1)
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, qk.shape[-1:], None, self.qk_epsilon) * self.qk_gain
        cos_N1K, sin_N1K = rotary
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos_N1K + torch.cat([-second, first], dim=-1) * sin_N1K
        return [*qk.split(self.heads[:2], dim=1), values_NGK]

    def mlp(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(_normalise(x_ND, self.mlp_norm)).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


def versions(weights: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Equal for the same weights as long as none was moved or changed; an edit through `.data` is not noticed.

    Keep the weights as long as you compare: another tensor could take the place of one in memory.
    """
    return [(id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


class FastDecoder:
    """The layers and head of a stock model without sliding windows; its hidden states are those of the model's own."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, *, depth: DepthHead | None = None):
        config, stock = model.config, cast(Any, model)
        if config.model_type not in SUPPORTED:
            raise UserError(f"sampling supports models of type {', '.join(SUPPORTED)}, not '{config.model_type}'")
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise UserError("sampling needs full attention; set use_sliding_window to false in the model's config.json")
        self.config, self.device, self.dtype = config, model.device, model.dtype
        self.num_kv_heads = config.num_key_value_heads
        self.table, self._rotary, self._norm = stock.model.embed_tokens, stock.model.rotary_emb, stock.model.norm
        self.depth = depth
        self.depth_layers = [] if depth is None else [_Layer(layer, config=config) for layer in depth.layers]
        self._head = stock.lm_head
        self._layers = [_Layer(layer, config=config) for layer in stock.model.layers]
        self.num_layers, self.head_dim = len(self._layers), stock.model.layers[0].self_attn.head_dim
        self._heads: dict[tuple[int, int, bool], PackedLinear] = {}
        self._weights = self._weights_of(model)
        self._versions = versions(self._weights)

    def is_current(self, model: PreTrainedModel) -> bool:
        """False after weights of the model or its depth head were replaced, moved or changed."""
        return self._versions == versions(self._weights_of(model))

    def _weights_of(self, model: PreTrainedModel) -> list[Tensor]:
        return [*model.parameters(), *(self.depth.parameters() if self.depth is not None else ())]

    def embed(self, ids_N: Tensor) -> Tensor:
        """Embeddings (N, D); with a depth head, an image's ids stand for whole patches."""
        return self.table(ids_N) if self.depth is None else self.depth.embed(ids_N, table=self.table).sum(-2)

    def head(self, start: int, end: int, *, packed: bool = True) -> PackedLinear:
        """The output head for the entries from `start` to `end` - 1; not `packed` where a copy would cost too much."""
        key = (start, end, packed)
        if key not in self._heads:
            self._heads[key] = PackedLinear(self._head, rows=slice(start, end), packed=packed)
        return self._heads[key]

    def prefill(self, ids_T: Tensor, *, store: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Hidden states (T, D) of one sequence; `store` receives every layer's keys and values (G, T, K)."""

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            q_HTK, k_GTK, v_GTK = (heads.transpose(0, 1) for heads in (q_THK, k_TGK, v_TGK))
            if store is not None:
                store(layer, k_GTK, v_GTK)
            attended_1HTK = F.scaled_dot_product_attention(
                q_HTK[None], k_GTK[None], v_GTK[None], is_causal=True, enable_gqa=len(k_GTK) < len(q_HTK)
            )
            return attended_1HTK[0].transpose(0, 1).flatten(1)

        ids_T = ids_T.to(self.device)
        return self.forward(ids_T, positions_N=torch.arange(len(ids_T), device=self.device), attend=attend)

    def forward(self, ids_N: Tensor, *, positions_N: Tensor, attend: Attend) -> Tensor:
        """Hidden states (N, D), normalised for the head."""
        x_ND = self.embed(ids_N)
        cos_1NK, sin_1NK = self._rotary(x_ND, positions_N.unsqueeze(0))
        rotary = cos_1NK[0].unsqueeze(1), sin_1NK[0].unsqueeze(1)
        for index, layer in enumerate(self._layers):
            x_ND = x_ND + layer.out(attend(index, *layer.project(x_ND, rotary=rotary)))
            x_ND = x_ND + layer.mlp(x_ND)
        return _normalise(x_ND, self._norm)


class DecodingBatch:
    """A batch of sequences with its key-value cache; `start` fills it with prompts, `step` appends a token to each.

    All its tensors keep their place in memory, also from one batch of prompts to the next.
    """

    def __init__(self, decoder: FastDecoder, *, num_sequences: int, capacity: int):
        self.decoder, self.longest = decoder, 0
        # Zeros, because attention multiplies unused positions by 0, which only gives 0 for finite numbers. This layout
        # suits a CPU's products with the few queries of a head; others make late steps of an image a fifth slower.
        sizes = (2, decoder.num_layers, num_sequences, decoder.num_kv_heads, capacity * decoder.head_dim)
        self.cache = torch.zeros(sizes, dtype=decoder.dtype, device=decoder.device)
        self.keys = self.cache[0].unflatten(-1, (capacity, decoder.head_dim))
        self.values = self.cache[1].unflatten(-1, (decoder.head_dim, capacity))
        self.sequences_R = torch.arange(num_sequences, device=decoder.device)
        self.lengths_R = torch.zeros_like(self.sequences_R)

    def start(self, prompts: Sequence[Tensor]) -> Tensor:
        """Prefill every distinct prompt once, for all its sequences; hidden states (R, D) at the last tokens."""
        self.cache.zero_()
        self.longest = max(len(prompt) for prompt in prompts)
        self.lengths_R.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        indices_of: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            indices_of.setdefault(tuple(prompt.tolist()), []).append(index)
        hidden: dict[int, Tensor] = {}
        for token_ids, indices in indices_of.items():

            def store(layer: int, k_GTK: Tensor, v_GTK: Tensor, indices: list[int] = indices) -> None:
                self.keys[layer, indices, :, : k_GTK.shape[1]] = k_GTK
                self.values[layer, indices, :, :, : v_GTK.shape[1]] = v_GTK.transpose(1, 2)

            hidden |= dict.fromkeys(indices, self.decoder.prefill(torch.tensor(token_ids), store=store)[-1])
        return torch.stack([hidden[index] for index in range(len(prompts))])

    def window(self, num_new: int) -> int:
        """Number of positions that the step which appends the `num_new`-th token reads."""
        return whole_windows(self.longest + num_new)

    def step(self, ids_R: Tensor, *, window: int) -> Tensor:
        """Append a token to every sequence; hidden states (R, D) after it. A CUDA graph can record it."""
        unused_RW = torch.arange(window, device=ids_R.device) > self.lengths_R.unsqueeze(1)
        bias_RW = torch.zeros(unused_RW.shape, device=ids_R.device).masked_fill_(unused_RW, float("-inf"))
        bias_R11W = bias_RW[:, None, None]

        def attend(layer: int, q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor) -> Tensor:
            keys_RGCK, values_RGKC = self.keys[layer], self.values[layer]
            keys_RGCK[self.sequences_R, :, self.lengths_R] = k_RGK
            values_RGKC[self.sequences_R, :, :, self.lengths_R] = v_RGK
            q_RGQK = q_RHK.unflatten(1, (self.decoder.num_kv_heads, -1)) * q_RHK.shape[-1] ** -0.5
            scores_RGWQ = torch.matmul(keys_RGCK[:, :, :window], q_RGQK.transpose(2, 3))
            shares_RGQW = (scores_RGWQ.transpose(2, 3).contiguous().float() + bias_R11W).softmax(-1).to(v_RGK.dtype)
            attended_RGKQ = torch.matmul(values_RGKC[..., :window], shares_RGQW.transpose(2, 3))
            return attended_RGKQ.transpose(2, 3).flatten(1)

        hidden_RD = self.decoder.forward(ids_R, positions_N=self.lengths_R, attend=attend)
        self.lengths_R += 1
        return hidden_RD


class DepthDecoder:
    """The depth head for a batch of sequences, with a cache that starts over at every patch."""

    def __init__(self, decoder: FastDecoder, *, num_sequences: int):
        depth = cast(DepthHead, decoder.depth)
        self.layers, self.norm = decoder.depth_layers, depth.norm
        sizes = (2, len(self.layers), num_sequences, decoder.num_kv_heads, depth.ids.subtokens, decoder.head_dim)
        self.cache = torch.zeros(sizes, dtype=decoder.dtype, device=decoder.device)
        ones_11K = self.cache.new_ones(1, 1, decoder.head_dim)
        self.unrotated = ones_11K, torch.zeros_like(ones_11K)

    def step(self, x_RD: Tensor, *, subtoken: int) -> Tensor:
        """States (R, D) that predict a sub-token, from the patch's state or the previous sub-token's embedding."""
        for index, layer in enumerate(self.layers):
            q_RHK, k_RGK, v_RGK = layer.project(x_RD, rotary=self.unrotated)
            keys_RGSK, values_RGSK = self.cache[:, index, :, :, : subtoken + 1]
            keys_RGSK[:, :, subtoken], values_RGSK[:, :, subtoken] = k_RGK, v_RGK
            attended_RH1K = F.scaled_dot_product_attention(
                q_RHK.unsqueeze(2), keys_RGSK, values_RGSK, enable_gqa=k_RGK.shape[1] < q_RHK.shape[1]
            )
            x_RD = x_RD + layer.out(attended_RH1K.flatten(1))
            x_RD = x_RD + layer.mlp(x_RD)
        return _normalise(x_RD, self.norm)


def check_room(prompts: Sequence[Tensor], *, num_new: int, limit: int) -> None:
    """Raise UserError for the first prompt that leaves no room for `num_new` tokens in the model's context."""
    for index, prompt in enumerate(prompts):
        if len(prompt) + num_new > limit:
            raise UserError(
                f"prompt {index + 1} of {len(prompt):,} tokens leaves no room for {num_new:,} more in the model's "
                f"context of {limit:,}; shorten the prompt",
                parameter="prompt",
            )


def whole_windows(positions: int) -> int:
    """`positions`, rounded up to a multiple of WINDOW."""
    return -(-positions // WINDOW) * WINDOW


def _normalise(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
