"""Sampling of LlamaGen's images with a key-value cache.

With `prefix_rotation: zero`, rotated queries and keys of the caption are zero vectors. So every image position gives
each of the n caption tokens the score 0, and the caption is exactly one key of score ln(n) with the mean of its values:
the cache holds one entry for it instead of one a token. With `prediction: depth` the transformer runs once a patch; the
depth head runs once an id, with a cache of its own that starts over at each patch.

Legend: R sequences (samples, twice as many under guidance), T caption positions, P ids of an image, D width, V ids of a
sub-token, E heads, G key-value heads, H head width, K cached positions.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.llamagen.modeling import Block, LlamaGen, attention_mask, rotary_table, rotate
from um3.inference.decoder import PackedLinear, versions, whole_windows
from um3.inference.generate import FREE, LOGITS, SampledImages, check_finite, choose
from um3.inference.sampling_params import Sampling


class _Layer:
    """A layer's products on packed weights."""

    def __init__(self, block: Block):
        attention, mlp = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.heads = attention.heads
        self.wqkv, self.wo = PackedLinear(attention.wqkv), PackedLinear(attention.wo)
        self.w13, self.w2 = PackedLinear(mlp.w1, mlp.w3), PackedLinear(mlp.w2)

    def project(self, x_RD: Tensor, rotary_HH: Tensor | None) -> list[Tensor]:
        """Queries (R, E, H), keys and values (R, G, H); queries and keys rotated unless `rotary_HH` is None."""
        projected = self.wqkv(self.attention_norm(x_RD)).unflatten(-1, (sum(self.heads), -1))
        queries, keys, values = projected.split(self.heads, dim=1)
        if rotary_HH is None:
            return [queries, keys, values]
        return [rotate(queries, rotary_HH), rotate(keys, rotary_HH), values]

    def mlp(self, x_RD: Tensor) -> Tensor:
        gate, up = self.w13(self.ffn_norm(x_RD)).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Decoder:
    """One model's weights, laid out for sampling."""

    @torch.no_grad()
    def __init__(self, model: LlamaGen):
        self.model, self.config = model, model.config
        self.layers = [_Layer(cast(Block, block)) for block in model.layers]
        self.depth = [_Layer(cast(Block, block)) for block in getattr(model, "depth", ())]
        slots = range(self.config.subtokens)
        size = self.config.slot_size
        self.heads = [PackedLinear(model.output, rows=slice(slot * size, (slot + 1) * size)) for slot in slots]
        self._weights = list(model.parameters())
        self._versions = versions(self._weights)

    @property
    def is_current(self) -> bool:
        """False after weights of the model were replaced, moved or changed."""
        return self._versions == versions(self.model.parameters())

    @torch.inference_mode()
    def images(
        self,
        *,
        features_BTC: Tensor,
        caption_mask_BT: Tensor,
        sampling: Sampling,
        uniforms_BP: Tensor,
        kept_BP: Tensor | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> SampledImages:
        """Sample one image a caption: ids (B, P) below V, and each image's log-probability without guidance, in nats.

        `uniforms_BP` in [0, 1) are the only source of randomness. `kept_BP` gives ids to keep, and FREE at positions to
        sample. `watch` receives the ids so far (positions, B) after every position.
        """
        num_samples, num_ids = uniforms_BP.shape
        dropped_R = torch.zeros(num_samples, dtype=torch.bool, device=features_BTC.device)
        if sampling.guided:
            # The unconditional half has the caption's mask, as in training.
            features_BTC, caption_mask_BT = features_BTC.repeat(2, 1, 1), caption_mask_BT.repeat(2, 1)
            dropped_R = torch.cat([dropped_R, ~dropped_R])
        scales_P, ids = sampling.scales(num_ids), list[Tensor]()
        logprobs_B, highest_B = features_BTC.new_zeros(2, num_samples, dtype=torch.float32)
        cache = _Cache(self, features_BTC=features_BTC, caption_mask_BT=caption_mask_BT, dropped_B=dropped_R)
        for position in range(num_ids):
            hidden_RD = cache.step(ids[-1].repeat(len(dropped_R) // num_samples)) if ids else cache.hidden_RD
            logits_BV = conditional_BV = self.heads[position % self.config.subtokens](hidden_RD).float()
            if sampling.guided:
                conditional_BV, unconditional_BV = logits_BV.chunk(2)
                logits_BV = unconditional_BV + scales_P[position] * (conditional_BV - unconditional_BV)
            highest_B += logits_BV.amax(-1)  # not finite once a logit was NaN; asking at every position waits for it
            if position == 0:
                check_finite(highest_B, what=LOGITS)  # before the work
            ids_B = choose(logits_BV, sampling=sampling, uniforms_B=uniforms_BP[:, position])
            if kept_BP is not None:
                kept_B = kept_BP[:, position].to(ids_B.device)
                ids_B = torch.where(kept_B == FREE, ids_B, kept_B)
            ids.append(ids_B)
            if watch is not None:
                watch(torch.stack(ids))
            logprobs_B += conditional_BV.log_softmax(-1).gather(-1, ids[-1][:, None])[:, 0]
        check_finite(highest_B, what=LOGITS)
        return SampledImages(torch.stack(ids, dim=1), logprobs=logprobs_B)


class _Cache:
    """Keys and values of a batch: `hidden_RD` predicts the first id, `step` appends one id to every sequence."""

    def __init__(self, decoder: Decoder, *, features_BTC: Tensor, caption_mask_BT: Tensor, dropped_B: Tensor):
        self.decoder, config, model = decoder, decoder.config, decoder.model
        self.mask_BT, self.folds = caption_mask_BT.bool(), config.prefix_rotation == "zero"
        num_rows, num_caption = features_BTC.shape[:2]
        self.num_prefix, self.num_ids = 1 if self.folds else num_caption, 0
        self.rotary_LHH = rotary_table(config, num_caption=num_caption, device=features_BTC.device)
        head_width = config.hidden_size // config.num_attention_heads
        capacity = whole_windows(self.num_prefix + config.num_patches * config.positions_per_patch)
        shape = (2, len(decoder.layers), num_rows, config.num_key_value_heads, capacity, head_width)
        self.cache = features_BTC.new_zeros(shape, dtype=model.dtype)
        self.depth_cache = self.cache.new_zeros(2, len(decoder.depth), *shape[2:4], config.subtokens, head_width)
        self.patch_RD = self.cache.new_zeros(num_rows, config.hidden_size)
        self.bias_RK = features_BTC.new_full((num_rows, capacity), float("-inf"), dtype=torch.float32)
        counts_B = self.mask_BT.sum(-1)
        if self.folds:
            # The last caption position sees itself also where there is no caption token.
            self.bias_RK[:, 0] = counts_B.clamp(min=1).log()
        else:
            self.bias_RK[:, :num_caption].masked_fill_(self.mask_BT, 0.0)
        x_BTD = model.cls_embedding(features_BTC.to(model.dtype), dropped_B)
        mask_B1TT = attention_mask(caption_mask_BT, num_positions=num_caption)
        for index, layer in enumerate(model.layers):
            block = cast(Block, layer)
            attention = block.attention
            _, *keys_values = attention.project(block.attention_norm(x_BTD), self.rotary_LHH[:num_caption])
            self._store_prefix(index, *keys_values)
            x_BTD = block(x_BTD, self.rotary_LHH[:num_caption], mask_B1TT)
        self.hidden_RD = self._predict(x_BTD[:, -1])

    def _store_prefix(self, layer: int, keys_BGTH: Tensor, values_BGTH: Tensor) -> None:
        if self.folds:
            weights_BT = self.mask_BT / self.mask_BT.sum(-1, keepdim=True).clamp(min=1)
            values_BGTH = torch.einsum("bgth,bt->bgh", values_BGTH, weights_BT.to(values_BGTH.dtype))[:, :, None]
            keys_BGTH = torch.zeros_like(values_BGTH)
        self.cache[0, layer, :, :, : self.num_prefix] = keys_BGTH
        self.cache[1, layer, :, :, : self.num_prefix] = values_BGTH

    def step(self, ids_R: Tensor) -> Tensor:
        """Append an id to every sequence; the hidden states (R, D) after it, which predict the next id."""
        x_RD = self.decoder.model.embed_ids(ids_R[:, None], start=self.num_ids)[:, 0]
        self.num_ids += 1
        if self.decoder.depth:
            self.patch_RD += x_RD
            if self.num_ids % self.decoder.config.subtokens:
                return self._predict(x_RD)
            x_RD = self.patch_RD.clone()
            self.patch_RD.zero_()
        positions = self.num_ids * self.decoder.config.positions_per_patch // self.decoder.config.subtokens
        place = self.num_prefix + positions - 1
        self.bias_RK[:, place] = 0.0
        window = whole_windows(place + 1)
        x_RD = _attend(
            x_RD,
            layers=self.decoder.layers,
            cache=self.cache[..., :window, :],
            place=place,
            rotary_HH=self.rotary_LHH[self.mask_BT.shape[1] + positions - 1],
            bias_R11K=self.bias_RK[:, None, None, :window].to(x_RD.dtype),
        )
        return self._predict(x_RD)

    def _predict(self, x_RD: Tensor) -> Tensor:
        """The normalised states that predict the next id, from a position's state or, in a patch, the last id's row."""
        if self.decoder.depth:
            slot = self.num_ids % self.decoder.config.subtokens
            x_RD = _attend(x_RD, layers=self.decoder.depth, cache=self.depth_cache[..., : slot + 1, :], place=slot)
        return cast(Tensor, self.decoder.model.norm(x_RD))


def _attend(
    x_RD: Tensor,
    *,
    layers: Sequence[_Layer],
    cache: Tensor,
    place: int,
    rotary_HH: Tensor | None = None,
    bias_R11K: Tensor | None = None,
) -> Tensor:
    """States (R, D) after the layers, of a position at `place` of the cache (2, layers, R, G, K, H)."""
    for index, layer in enumerate(layers):
        queries_REH, keys_RGH, values_RGH = layer.project(x_RD, rotary_HH)
        keys_RGKH, values_RGKH = cache[:, index]
        keys_RGKH[:, :, place], values_RGKH[:, :, place] = keys_RGH, values_RGH
        mixed = F.scaled_dot_product_attention(
            queries_REH.unsqueeze(2),
            keys_RGKH,
            values_RGKH,
            attn_mask=bias_R11K,
            enable_gqa=len(set(layer.heads)) > 1,
        )
        x_RD = x_RD + layer.wo(mixed.flatten(1))
        x_RD = x_RD + layer.mlp(x_RD)
    return x_RD
