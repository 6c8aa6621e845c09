"""Model FLOPs of one image, by module from the sizes of a config.

Counted are the matrix products that the model's mathematics asks for, 2 operations for each multiply-add, the scores
and values of attention included (whole, also where causal); not norms, activations, rotations, the loss and the
optimizer. A backward pass is 2 forward passes. A second forward pass (gradient caching, activation checkpointing) is a
way to save memory and counts nothing. Every part is taken to be trained that its stage trains by default.

Legend: T tokens, N patches, D width, F MLP width.
"""

from typing import NamedTuple

from tokenizer.configuration import QLIPConfig
from tokenizer.layers import TowerConfig
from train.config import Stage2Config

FORWARD_AND_BACKWARD = 3


class QLIPFlops(NamedTuple):
    """Forward passes of one image with its caption, FLOP."""

    encoder: int
    bottleneck: int
    decoder: int
    text: int
    """The text tower and both projections."""

    @property
    def stage1(self) -> int:
        """Everything, forward and backward."""
        return FORWARD_AND_BACKWARD * sum(self)

    @property
    def stage2(self) -> int:
        """The frozen encoder forward, bottleneck and decoder forward and backward."""
        return self.encoder + FORWARD_AND_BACKWARD * (self.bottleneck + self.decoder)


def qlip_flops(config: QLIPConfig, *, text_tokens: int) -> QLIPFlops:
    """The forward passes of QLIP's parts on one image and a caption of `text_tokens`."""
    vision, decoder, text = config.vision_tower, config.decoder_tower, config.text_tower
    patches = (vision.image_size // vision.patch_size) ** 2
    values = vision.num_channels * vision.patch_size**2
    width, bits = vision.hidden_size, (vision.quantizer_cfg or {}).get("embed_dim", 28)
    width_post = vision.hidden_size_post_q or width
    inner = decoder.intermediate_size
    return QLIPFlops(
        encoder=2 * patches * values * width + _layers(vision, tokens=1 + patches),
        bottleneck=2 * patches * (width * (width + bits) + width_post * (bits + width_post)),
        decoder=_layers(decoder, tokens=patches) + 2 * patches * inner * (decoder.hidden_size + values),
        text=_layers(text, tokens=text_tokens) + 2 * (width + text.hidden_size) * config.projection_dim,
    )


def _layers(config: TowerConfig, *, tokens: int) -> int:
    """A stack of blocks: q, k, v and output (4 D^2), scores and values (2 T D), and the MLP (2 or, gated, 3 D F)."""
    width = config.hidden_size
    matrices = 3 if getattr(config, "swiglu", False) else 2
    per_token = 4 * width**2 + 2 * tokens * width + matrices * width * config.intermediate_size
    return 2 * config.num_hidden_layers * tokens * per_token


def judge_flops(config: Stage2Config, *, image_size: int) -> dict[str, int]:
    """Stage 2's other networks, forward and backward as far as a step needs it, of one image (FLOP).

    Counted by torch on tensors without data, since their shapes are many and have no formula of their own.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tokenizer.discriminator import build_discriminator
    from tokenizer.perceptual import VGG16_PLAN, PerceptualDistance, random_feature_distance

    weights, shape = config.loss, config.discriminator
    drawn_BCHW = torch.empty(1, 3, image_size, image_size, device="meta", requires_grad=True)
    real_BCHW = torch.empty(1, 3, image_size, image_size, device="meta")
    found = {"perceptual": 0, "discriminator": 0}
    if weights.perceptual > 0:
        lpips = bool(config.perceptual.backbone)
        distance = PerceptualDistance(plan=VGG16_PLAN, name="lpips_vgg") if lpips else random_feature_distance()
        distance.requires_grad_(False).to("meta")
        with FlopCounterMode(display=False) as counter:
            distance(drawn_BCHW, real_BCHW).backward()
        found["perceptual"] = counter.get_total_flops()
    if weights.adversarial > 0:
        judge = build_discriminator(
            shape.kind, channels=shape.channels, num_layers=shape.num_layers, image_size=image_size
        ).to("meta")
        with FlopCounterMode(display=False) as counter:
            judge.requires_grad_(False)
            judge(drawn_BCHW).sum().backward()
            judge.requires_grad_(True)
            (judge(real_BCHW).sum() + judge(drawn_BCHW.detach()).sum()).backward()
            if weights.r1 > 0:
                given_BCHW = drawn_BCHW * 1.0  # the counter's hooks take no leaf here
                (slope_BCHW,) = torch.autograd.grad(judge(given_BCHW).sum(), given_BCHW, create_graph=True)
                slope_BCHW.square().sum().backward()
        found["discriminator"] = counter.get_total_flops()
    return found
