"""The layers of QLIP's three towers: rotary tables, attention, MLPs, blocks.

Attribute names are those of the released checkpoints.
Legend: B batch, T tokens, N patches, D width, E heads, H head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tokenizer import onednn
from tokenizer.configuration import QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig

TowerConfig = QLIPTextConfig | QLIPVisionConfig | QLIPDecoderConfig
ROPE_THETA = 10000.0


class Linear(nn.Linear):
    """nn.Linear that uses oneDNN without gradient, where that is faster than torch's choice."""

    def forward(self, x: Tensor) -> Tensor:
        is_training = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        if is_training or torch.compiler.is_compiling() or not onednn.serves(x, self.weight):
            return super().forward(x)
        return onednn.linear(x, self.weight, self.bias)


class RotaryEmbedding2D(nn.Module):
    """EVA-02's 2-D rotary tables: half of each head rotates with the row, half with the column.

    Positions are scaled to a grid of `pretrained_grid` patches a side, so that a finer grid interpolates.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, *, head_dim: int, grid: int, pretrained_grid: int):
        super().__init__()
        frequency = ROPE_THETA ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        position = torch.arange(grid).float() / grid * pretrained_grid
        angle = torch.outer(position, frequency).repeat_interleave(2, dim=-1)
        rows, columns = angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)
        angle_NH = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", angle_NH.cos())
        self.register_buffer("freqs_sin", angle_NH.sin())

    def forward(self, x_BETH: Tensor) -> Tensor:
        """Rotate the last N tokens; tokens before them (a class token) are unchanged."""
        num_prefix = x_BETH.shape[2] - self.freqs_cos.shape[0]
        prefix, patches = x_BETH[:, :, :num_prefix], x_BETH[:, :, num_prefix:]
        even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([-odd, even], dim=-1).flatten(-2)
        patches = (patches * self.freqs_cos + rotated * self.freqs_sin).to(x_BETH.dtype)
        return torch.cat([prefix, patches], dim=2) if num_prefix else patches


def build_rope(config: TowerConfig) -> nn.Module:
    """The rotary tables of a visual tower; the identity if its config has none."""
    if isinstance(config, QLIPTextConfig) or not config.rope:
        return nn.Identity()
    return RotaryEmbedding2D(
        head_dim=config.hidden_size // config.num_attention_heads,
        grid=config.image_size // config.patch_size,
        pretrained_grid=config.rope_pretrained_grid,
    )


def sub_norm(config: TowerConfig, width: int) -> nn.Module:
    """EVA-02's LayerNorm inside attention and MLP; the identity for a tower without it."""
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if getattr(config, "subln", False) else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention with optional rotary embedding, sub-LayerNorm and k without bias."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.causal = isinstance(config, QLIPTextConfig)
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width, bias=getattr(config, "k_bias", True))
        self.v_proj = Linear(width, width)
        self.inner_attn_ln = sub_norm(config, width)
        self.out_proj = Linear(width, width)
        self.rope = build_rope(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            projection(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=self.causal)
        return self.out_proj(self.inner_attn_ln(mixed.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """silu(w1 x) * (w2 x) -> optional LayerNorm -> w3."""

    def __init__(self, config: QLIPVisionConfig | QLIPDecoderConfig):
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size)
        self.w2 = Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = sub_norm(config, config.intermediate_size)
        self.w3 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x_BTD)) * self.w2(x_BTD)))


class MLP(nn.Module):
    """fc1 -> activation -> optional LayerNorm -> fc2."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.ffn_ln = sub_norm(config, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(self.activation(self.fc1(x_BTD))))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if not isinstance(config, QLIPTextConfig) and config.swiglu else MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))


class Encoder(nn.Module):
    """A stack of blocks."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by transformers' gradient_checkpointing_enable

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x_BTD: Tensor) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x_BTD = self._gradient_checkpointing_func(layer.__call__, x_BTD)
            else:
                x_BTD = layer(x_BTD)
        return x_BTD
