"""The plan of LlamaGen's training: every caption at its greatest length, and the text encoder at its full size.

The encoder's own activations are not counted: they are freed before the model's forward pass begins.

Legend: B images, T caption positions, C width of the caption features, P ids of an image.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, T5Config, T5EncoderModel

from downstream.llamagen.modeling import LlamaGen
from downstream.llamagen.text_encoder import keep_layers
from tokenizer.configuration import QLIPConfig, read_qlip_config
from tokenizer.modeling import QLIPModel
from train.plan.plan import CAPTION_TOKENS, Plan, sizes
from train.recipes.llamagen import LlamaGenObjective, model_config
from train.settings.llamagen import LlamaGenTrainingConfig
from um3.core.hub import load_pretrained

KNOWN_ENCODERS = {
    "google/flan-t5-xl": dict(
        vocab_size=32_128, d_model=2048, d_ff=5120, d_kv=64, num_heads=32, num_layers=24, feed_forward_proj="gated-gelu"
    )
}
"""Sizes of text encoders that need no access to the hub."""


class LlamaGenPlan(Plan):
    """The plan of a LlamaGen config."""

    config: LlamaGenTrainingConfig

    def build(self) -> None:
        """Build model and text encoder on the meta device."""
        qlip, text = _qlip(self.config.visual_tokenizer), self.config.resolved_text_encoder()
        self.encoder: nn.Module
        if text.kind == "t5":
            known: Any = KNOWN_ENCODERS.get(text.name)
            t5 = T5Config(**known) if known else load_pretrained(AutoConfig, text.name, kind="T5 text encoder")
            with torch.device("meta"):
                self.encoder = T5EncoderModel(t5)
            self.num_caption, width = text.max_tokens, t5.d_model
            layers, attention_width = t5.num_layers, t5.num_heads * t5.d_kv
        else:
            reader = _qlip(text.name)
            self.encoder, tower = reader.text_model, reader.config.text_tower
            self.num_caption, width = min(text.max_tokens, tower.max_position_embeddings), tower.hidden_size
            layers, attention_width = tower.num_hidden_layers, tower.hidden_size
        keep_layers(self.encoder, text.num_layers)
        # The text encoder's weights, in bf16 on a GPU.
        self.beside_bytes = (4.0 if self.on_cpu else 2.0) * sum(map(torch.numel, self.encoder.parameters()))
        self.encoder_width = attention_width * (layers if text.num_layers < 0 else text.num_layers)
        self.shape = model_config(
            self.config.model,
            bits=qlip.num_bits,
            num_patches=qlip.num_patches,
            caption_width=width,
            max_caption_tokens=self.num_caption,
        )
        self.objective, _ = self.traced()
        self.head = self.objective.model.output.weight.numel()

    def traced(self) -> tuple[nn.Module, nn.Module]:
        """Another objective on the meta device, and its last norm, which ends the layers."""
        with torch.device("meta"):
            objective = LlamaGenObjective(LlamaGen(self.shape), chunk_tokens=self.config.chunk_tokens)
        return objective, objective.model.norm

    def micro_batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(features, their mask, ids, dropped) of `size` images."""
        features_BTC = torch.zeros(size, self.num_caption, self.shape.caption_width)
        mask_BT = torch.ones(size, self.num_caption, dtype=torch.bool)
        ids_BP = torch.zeros(size, self.shape.image_tokens, dtype=torch.long)
        return features_BTC, mask_BT, ids_BP, torch.zeros(size, dtype=torch.bool)

    def step_tokens(self) -> tuple[float, float]:
        """Positions of a step, and those without padding if a caption has CAPTION_TOKENS tokens."""
        images, ids = self.config.loop.batch_size, self.shape.num_patches * self.shape.positions_per_patch - 1
        return images * float(ids + self.num_caption), images * float(ids + min(CAPTION_TOKENS, self.num_caption))

    def step_flops(self, *, checkpointing: bool) -> tuple[float, float]:
        """Model FLOPs of a step, and FLOPs of what is computed twice."""
        images, shape, model = self.config.loop.batch_size, self.shape, self.objective.model
        positions, _ = self.step_tokens()
        layers = sum(sizes(model.layers.parameters())[0])
        body = 2.0 * layers * positions
        body += 4.0 * shape.num_hidden_layers * shape.hidden_size * positions**2 / images
        if shape.prediction == "depth":
            depth = 2.0 * sum(sizes(model.depth.parameters())[0])
            depth += 4.0 * shape.depth_layers * shape.hidden_size * shape.subtokens
            body += images * shape.image_tokens * depth
        first, second = (layer.weight.numel() for layer in model.cls_embedding.cap_proj.children())
        captions = images * self.num_caption
        # The captions' features have no gradient.
        prefix = 2.0 * captions * (2 * first + 3 * second)
        head = 2.0 * images * shape.image_tokens * shape.hidden_size * shape.slot_size
        return 3 * (body + head) + prefix + self._encoder_flops(captions), head + (body if checkpointing else 0)

    def _encoder_flops(self, captions: float) -> float:
        """FLOPs of the text encoder's forward pass over this number of tokens."""
        tables = {table for part in self.encoder.modules() if isinstance(part, nn.Embedding) for table in [part.weight]}
        matrices = sum(weight.numel() for weight in self.encoder.parameters() if weight.dim() > 1)
        matrices -= sum(map(torch.numel, tables))
        return captions * (2.0 * matrices + 4.0 * self.encoder_width * self.num_caption)


def _qlip(folder: str) -> QLIPModel:
    """A QLIP on the meta device; QLIP-B-16-256, the default, if the folder is not available."""
    config = read_qlip_config(Path(folder)) if (Path(folder) / "config.json").is_file() else QLIPConfig()
    with torch.device("meta"):
        return QLIPModel(config)
