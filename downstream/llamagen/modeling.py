"""LlamaGen for text-to-image: caption features as a prefix, then the ids of the image's codes in raster order.

The layout is that of the released checkpoints, name by name (arXiv:2406.06525; docs/llamagen.md). Input is the prefix
and all ids but the last; the hidden states from the last prefix position on predict the ids. With `prediction: depth`
a patch is one position, the sum of its ids' embeddings, and the depth head predicts its ids from the sequence
[state, embedding of id 1, ..., embedding of id S - 1] (arXiv:2203.01941).

Legend: B batch, T caption positions, N patches, S sub-tokens of a patch, V ids of a sub-token, P = N * S ids of an
image, L = T + P - 1 positions (depth: T + N - 1), D width, C width of the caption features, E heads, G key-value heads,
H head width, M = B * N patches of a batch.
"""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from downstream.llamagen.configuration import LlamaGenConfig
from um3.core.hub import load_pretrained, model_folder


class CaptionProjection(nn.Module):
    """Caption features (B, T, C) -> prefix embeddings (B, T, D)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_width, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, features_BTC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features_BTC), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """The projection, and the features that stand for no caption: drawn once, never trained."""

    uncond_embedding: Tensor

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.register_buffer("uncond_embedding", torch.zeros(config.max_caption_tokens, config.caption_width))

    def forward(self, features_BTC: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        if dropped_B is not None:
            unconditional_TC = self.uncond_embedding[-features_BTC.shape[1] :].to(features_BTC.dtype)
            features_BTC = torch.where(dropped_B[:, None, None], unconditional_TC, features_BTC)
        return self.cap_proj(features_BTC)


class Attention(nn.Module):
    """Causal self-attention with one product for queries, keys and values."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        width, head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.wqkv = nn.Linear(width, sum(self.heads) * head_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def project(self, x_BLD: Tensor, rotary_LHH: Tensor | None) -> list[Tensor]:
        """Queries (B, E, L, H), keys and values (B, G, L, H); queries and keys are rotated in float32."""
        projected = self.wqkv(x_BLD).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        queries, keys, values = projected.split(self.heads, dim=1)
        if rotary_LHH is None:
            return [queries, keys, values]
        return [rotate(queries, rotary_LHH), rotate(keys, rotary_LHH), values]

    def forward(self, x_BLD: Tensor, rotary_LHH: Tensor | None, mask_B1LL: Tensor | None) -> Tensor:
        """No rotation and no mask: the depth head, where a position sees the earlier ones."""
        queries, keys, values = self.project(x_BLD, rotary_LHH)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask_B1LL, is_causal=mask_B1LL is None,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )  # fmt: skip
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, rotary_LHH: Tensor | None = None, mask_B1LL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD), rotary_LHH, mask_B1LL))
        return x_BLD + self.dropout(self.feed_forward(self.ffn_norm(x_BLD)))


class LlamaGen(PreTrainedModel):
    """The released text-to-image model, for `subtokens` ids a patch; `depth` are the layers of the depth head."""

    config_class = LlamaGenConfig
    config: LlamaGenConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        num_rows = config.subtokens * config.slot_size
        self.cls_embedding = CaptionEmbedding(config)
        self.tok_embeddings = nn.Embedding(num_rows, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if config.prediction == "depth":
            self.depth = nn.ModuleList(Block(config) for _ in range(config.depth_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, num_rows, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Linear and embedding weights are normal, gains 1, the output head 0 (so the first loss is ln V)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.zeros_(module.weight) if module is self.output else nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, CaptionEmbedding):
            nn.init.normal_(module.uncond_embedding, std=module.uncond_embedding.shape[-1] ** -0.5)

    def embed_ids(self, ids_BP: Tensor, *, start: int = 0) -> Tensor:
        """Embeddings (B, P, D) of ids below V whose first stands at index `start` of the image."""
        slots_P = (torch.arange(ids_BP.shape[1], device=ids_BP.device) + start) % self.config.subtokens
        return self.tok_embeddings(ids_BP + slots_P * self.config.slot_size)

    def forward(
        self,
        *,
        features_BTC: Tensor,
        caption_mask_BT: Tensor,
        ids_BP: Tensor,
        dropped_B: Tensor | None = None,
    ) -> Tensor:
        """The hidden states (B, P, D) that predict each id of `ids_BP`, which are below V.

        Captions are padded on the left to any common length. `dropped_B` marks samples whose features, padding
        included, are replaced by the unconditional ones.
        """
        prefix_BTD = self.cls_embedding(features_BTC, dropped_B)
        num_caption = prefix_BTD.shape[1]
        depth, subtokens = self.config.prediction == "depth", self.config.subtokens
        ids_BPD = self.embed_ids(ids_BP if depth else ids_BP[:, :-1])
        image_BLD = ids_BPD.unflatten(1, (-1, subtokens))[:, :-1].sum(2) if depth else ids_BPD
        x_BLD = self.dropout(torch.cat([prefix_BTD, image_BLD], dim=1))
        rotary_LHH = rotary_table(self.config, num_caption=num_caption, device=x_BLD.device)[: x_BLD.shape[1]]
        mask_B1LL = attention_mask(caption_mask_BT, num_positions=x_BLD.shape[1])
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotary_LHH, mask_B1LL)
        if not depth:
            return cast(Tensor, self.norm(x_BLD))[:, num_caption - 1 :]
        states_MD = x_BLD[:, num_caption - 1 :].flatten(0, 1)
        x_MSD = torch.cat([states_MD[:, None], ids_BPD.reshape(-1, subtokens, ids_BPD.shape[-1])[:, :-1]], dim=1)
        for layer in self.depth:
            x_MSD = layer(x_MSD)
        return cast(Tensor, self.norm(x_MSD)).view(ids_BPD.shape)

    def head(self, slot: int) -> Tensor:
        """The output rows (V, D) of one sub-token."""
        return self.output.weight[slot * self.config.slot_size :][: self.config.slot_size]

    def logits(self, hidden_BPD: Tensor) -> Tensor:
        """All logits (B, P, V) in float32: for tests and small images."""
        subtokens = self.config.subtokens
        by_slot = [F.linear(hidden_BPD[:, slot::subtokens], self.head(slot)).float() for slot in range(subtokens)]
        return torch.stack(by_slot, dim=2).flatten(1, 2)


def load_llamagen(path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None) -> LlamaGen:
    """Load a folder that `save_pretrained` wrote, or a hub id; UserError for another model or damaged weights."""
    folder = model_folder(path_or_hub_id, kind="LlamaGen")
    config = load_pretrained(LlamaGenConfig, folder, kind="LlamaGen")
    options: dict[str, Any] = {"config": config, "dtype": dtype, "kind": "LlamaGen", "strict": True}
    return cast(LlamaGen, load_pretrained(LlamaGen, folder, **options)).eval()


def rotary_table(config: LlamaGenConfig, *, num_caption: int, device: torch.device | None = None) -> Tensor:
    """cos and sin (T + image positions, H / 2, 2): the patch's row turns the first half of a head's pairs, its column
    the second half. An image of S positions a patch is a grid S times as wide. The caption's rows are 0, or the
    identity (cos 1, sin 0)."""
    bands = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(bands, device=device).float() / bands)
    places_P = torch.arange(config.num_patches * config.positions_per_patch, device=device)
    width = config.grid * config.positions_per_patch
    axes_P2 = torch.stack([places_P // width, places_P % width], dim=-1)
    angles_PH = (axes_P2[..., None] * frequencies).flatten(1)
    table_PHH = torch.stack([angles_PH.cos(), angles_PH.sin()], dim=-1)
    prefix = table_PHH.new_zeros(num_caption, *table_PHH.shape[1:])
    prefix[..., 0] = float(config.prefix_rotation == "identity")
    return torch.cat([prefix, table_PHH])


def rotate(x_BELH: Tensor, table_LHH: Tensor) -> Tensor:
    """Turn each pair of neighbouring dimensions by its angle, in float32."""
    even, odd = x_BELH.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_LHH.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BELH.dtype)


def attention_mask(caption_mask_BT: Tensor, *, num_positions: int) -> Tensor:
    """True where a query sees a key, (B, 1, L, L): causal, without the caption's padding; a position sees itself."""
    num_image = num_positions - caption_mask_BT.shape[1]
    keys_BL = F.pad(caption_mask_BT.bool(), (0, num_image), value=True)
    positions_L = torch.arange(num_positions, device=keys_BL.device)
    causal_LL = positions_L[:, None] >= positions_L
    return ((keys_BL[:, None, None] & causal_LL) | (positions_L[:, None] == positions_L)).contiguous()
