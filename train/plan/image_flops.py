"""Model FLOPs of one image in stages 1 and 2 and encoding, counted by torch's FlopCounterMode on tensors without data.

Counted are matrix products, convolutions and attention (written out, so that torch counts it), 2 operations for each
multiply-add. A second forward pass (gradient caching, activation checkpointing) saves memory and does not count.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenizer.configuration import QLIPConfig
from tokenizer.discriminator import build_discriminator
from tokenizer.losses import VGG16_PLAN, PerceptualDistance, random_feature_distance
from tokenizer.modeling import QLIPModel
from train.settings.tokenizer import Stage2Config


def encode_flops(config: QLIPConfig) -> int:
    """FLOP of encoding one image."""
    # With gradient, because torch does not count oneDNN's products.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        qlip, pixels_BCHW = _fake_qlip(config)
        qlip.encode(pixels_BCHW)
    return int(counter.get_total_flops())


def stage1_flops(config: QLIPConfig, *, text_tokens: int) -> dict[str, int]:
    """FLOP of one image with a caption of `text_tokens` tokens, forward and backward through all of QLIP."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        qlip, pixels_BCHW = _fake_qlip(config)
        input_ids_BT = torch.ones(1, text_tokens, dtype=torch.long)
        output = qlip(pixels_BCHW, input_ids_BT)
        (output.reconstructions.sum() + output.image_embeds.sum() + output.text_embeds.sum()).backward()
    return {"qlip": counter.get_total_flops()}


def stage2_flops(qlip_config: QLIPConfig, config: Stage2Config) -> dict[str, int]:
    """FLOP of one image by network: the frozen encoder forward, everything else forward and backward."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        qlip, pixels_BCHW = _fake_qlip(qlip_config)
        hidden_BTD = qlip.vision_model(pixels_BCHW).detach()
        quantized = qlip.vision_model.quantize(hidden_BTD, entropy=True).quantized_BNL
        qlip.decode_quantized(quantized).sum().backward()
    flops = {"qlip": counter.get_total_flops(), "perceptual": 0, "discriminator": 0}
    vision = qlip_config.vision_tower
    pixels_BCHW = torch.empty(1, 3, vision.image_size, vision.image_size, device="meta")
    fake_BCHW = torch.empty_like(pixels_BCHW, requires_grad=True)
    if config.loss.perceptual > 0:
        lpips = bool(config.perceptual.backbone)
        distance = PerceptualDistance(plan=VGG16_PLAN, name="lpips_vgg") if lpips else random_feature_distance()
        distance.requires_grad_(False).to("meta")
        with FlopCounterMode(display=False) as counter:
            distance(fake_BCHW, pixels_BCHW).backward()
        flops["perceptual"] = counter.get_total_flops()
    if config.loss.adversarial > 0:
        discriminator = build_discriminator(**vars(config.discriminator), image_size=vision.image_size).to("meta")
        with FlopCounterMode(display=False) as counter:
            discriminator.requires_grad_(False)
            discriminator(fake_BCHW).sum().backward()
            discriminator.requires_grad_(True)
            (discriminator(pixels_BCHW).sum() + discriminator(fake_BCHW.detach()).sum()).backward()
            if config.loss.r1 > 0:
                real_BCHW = fake_BCHW * 1.0  # the counter's hooks do not accept a leaf here
                (gradient_BCHW,) = torch.autograd.grad(discriminator(real_BCHW).sum(), real_BCHW, create_graph=True)
                gradient_BCHW.square().sum().backward()
        flops["discriminator"] = counter.get_total_flops()
    return flops


def _fake_qlip(config: QLIPConfig) -> tuple[QLIPModel, torch.Tensor]:
    vision = config.vision_tower
    return QLIPModel(config), torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
