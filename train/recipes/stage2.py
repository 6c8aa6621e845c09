"""Stage 2: fine-tune the bottleneck and decoder of a frozen encoder (paper section 3; SPEC section 1).

    loss = a_r * MSE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_p * perceptual + a_g * adversarial

The weights are `Stage2LossConfig`. The GAN loss: its formulas are in tokenizer/losses.py (`generator_loss`,
`discriminator_loss`), `_generator_step` and `_discriminator_step` below use them, the networks are in
tokenizer/discriminator.py.

The text tower is not used. A perceptual or adversarial term of weight 0 builds no network. With
`loop.micro_batch_size` set, a step accumulates the gradients of several micro-batches; H(E[Q]) is then that of one
micro-batch of every rank.

Legend: B images of a micro-batch, H, W pixels, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import load
from tokenizer.discriminator import build_discriminator
from tokenizer.losses import PerceptualDistance, build_perceptual_distance, discriminator_loss, generator_loss
from tokenizer.modeling import QLIPModel
from tokenizer.quantizer import VectorQuantizer, codebook_entropy
from train.engine import autocast, build_engine, step_engine
from train.loop import check_finite
from train.recipes.tokenizer_setup import open_sources, train_only
from train.recipes.tokenizer_task import TokenizerTask, described
from train.settings.tokenizer import Stage2Config
from um3.core.distributed import device, gather_with_gradient, mean_over_ranks
from um3.core.errors import UserError
from um3.core.seeds import seed_everything

TRAINABLE = ("qlip.vision_model.quant_embed", "qlip.vision_decoder")


class Autoencoder(nn.Module):
    """QLIP's reconstruction path; the encoder stores no activations for a backward pass."""

    def __init__(self, qlip: QLIPModel, *, trainable: Sequence[str] = TRAINABLE):
        super().__init__()
        self.qlip = qlip
        for prefix in trainable:
            if not prefix.startswith(TRAINABLE):
                raise UserError(f"trainable: stage 2 cannot train '{prefix}'; use parts of {' and '.join(TRAINABLE)}")
        train_only(self, trainable)

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images -> (reconstructions, entropy term over the images of all ranks)."""
        with torch.no_grad():
            hidden_BTD = self.qlip.vision_model(pixels_BCHW)
        quantizer = self.qlip.vision_model.quantizer
        quantized = self.qlip.vision_model.quantize(hidden_BTD, entropy=True)
        mean_GK = gather_with_gradient(quantized.mean_GK[None]).mean(0)
        penalty = quantizer.penalty(quantized.sample_entropy, codebook_entropy(mean_GK))
        return self.qlip.decode_quantized(quantized.quantized_BNL.to(hidden_BTD.dtype)), penalty


class Stage2Task(TokenizerTask):
    """Two engines, the autoencoder's and the discriminator's, each with its own optimizer."""

    config: Stage2Config

    def __init__(self, config: Stage2Config):
        qlip, processor = load(config.init_from)
        qlip.float().train()
        sources = open_sources(config.data, size=processor.image_size, seed=config.loop.seed)
        super().__init__(config, qlip=qlip, processor=processor, sources=sources)
        self.objective = Autoencoder(self.qlip, trainable=config.trainable)
        if isinstance(self.qlip.vision_model.quantizer, VectorQuantizer):
            self._check_vq()
        self.distance: PerceptualDistance | None = None
        if config.loss.perceptual > 0:
            self.distance = build_perceptual_distance(**vars(config.perceptual)).to(device())
        self.discriminator: nn.Module | None = None
        if config.loss.adversarial > 0:
            seed_everything(config.loop.seed, "discriminator weights")
            self.discriminator = build_discriminator(**vars(config.discriminator), image_size=processor.image_size)

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() | ({} if self.discriminator is None else {"discriminator": self.discriminator})

    def build_engines(self) -> dict[str, Any]:
        engines, config = super().build_engines(), self.config
        if self.discriminator is None:
            return engines
        # The generator step calls the discriminator without its engine, so its weights must be whole: no ZeRO 3.
        stage: Literal[0, 1, 2, 3] = min(config.engine.zero_stage, 2)
        options, engine = config.discriminator_optimizer, replace(config.engine, zero_stage=stage)
        self.discriminator_engine = build_engine(self.discriminator, optimizer=options, engine=engine, loop=config.loop)
        return engines | {"discriminator": self.discriminator_engine}

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        batch = self.batches.batch(step)
        source = described(batch)
        learning_rate = self.set_rate(self.engine, config.optimizer, step=step)
        if self.discriminator is not None:
            self.set_rate(self.discriminator_engine, config.discriminator_optimizer, step=step)
        micro_values: list[dict[str, float]] = []
        for images_BHWC in batch.images_BHWC.split(self.micro_batch_size):
            pixels_BCHW = self.processor.pixels(images_BHWC.to(device()))
            values, reconstructed_BCHW = self._generator_step(pixels_BCHW, step=step, source=source)
            if self.discriminator is not None:
                values |= self._discriminator_step(
                    self.discriminator, real_BCHW=pixels_BCHW, fake_BCHW=reconstructed_BCHW, source=source
                )
            micro_values.append(values)
        means = {name: fmean(values[name] for values in micro_values) for name in micro_values[0]}
        values = mean_over_ranks(means | {"optim/grad_norm": micro_values[-1]["optim/grad_norm"]})
        return values | {"optim/lr": learning_rate} | self.skipped_metrics(batch.skipped, step=step)

    def _generator_step(
        self, pixels_BCHW: torch.Tensor, *, step: int, source: str
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Metrics and reconstructions (without gradient) of one micro-batch."""
        weights = self.config.loss
        discriminator = self.discriminator if step >= weights.adversarial_start_step else None
        with autocast(self.config.engine):
            reconstructed_BCHW, entropy = self.engine(pixels_BCHW)
            reconstructed_BCHW = reconstructed_BCHW.float()
            terms = {"mse": F.mse_loss(reconstructed_BCHW, pixels_BCHW), "entropy": entropy}
            if self.distance is not None:
                terms["perceptual"] = self.distance(self._signed(reconstructed_BCHW), self._signed(pixels_BCHW))
            if discriminator is not None:
                # The discriminator's own engine must not see these gradients.
                discriminator.requires_grad_(False)
                logits = discriminator(self._signed(reconstructed_BCHW))
                discriminator.requires_grad_(True)
                terms["adversarial"] = generator_loss(logits, kind=weights.adversarial_kind)
        weighted = {name: getattr(weights, name) * term for name, term in terms.items()}
        loss = torch.stack(list(weighted.values())).sum()
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values["train/loss"] = float(loss.detach())
        check_finite(values, source=source)
        values |= {f"weighted/{name}": float(term.detach()) for name, term in weighted.items()}
        self.engine.backward(loss)
        values["optim/grad_norm"] = step_engine(self.engine)
        return values, reconstructed_BCHW.detach()

    def _discriminator_step(
        self, discriminator: nn.Module, *, real_BCHW: torch.Tensor, fake_BCHW: torch.Tensor, source: str
    ) -> dict[str, float]:
        weights, signed_BCHW = self.config.loss, self._signed(real_BCHW)
        with autocast(self.config.engine):
            real_logits = self.discriminator_engine(signed_BCHW)
            fake_logits = self.discriminator_engine(self._signed(fake_BCHW))
            loss = discriminator_loss(real_logits, fake_logits, kind=weights.adversarial_kind)
        values = {"train/discriminator": float(loss.detach())}
        if weights.r1 > 0:
            penalty = _r1_penalty(discriminator, signed_BCHW)
            loss = loss + weights.r1 / 2 * penalty
            values["train/r1"] = float(penalty.detach())
        values["train/logit_real"] = float(real_logits.detach().mean())
        values["train/logit_fake"] = float(fake_logits.detach().mean())
        check_finite(values, source=source)
        self.discriminator_engine.backward(loss)
        step_engine(self.discriminator_engine)
        return values

    def _signed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pixels -> [-1, 1], the range of the perceptual network and the discriminator."""
        return self.processor.unit_range(pixels_BCHW) * 2 - 1

    def _check_vq(self) -> None:
        """UserError for settings that do not fit a fixed codebook."""
        if any(weight.requires_grad for weight in self.qlip.vision_model.quant_embed.parameters()):
            parts = "[qlip.vision_model.quant_embed_post,qlip.vision_decoder]"
            raise UserError(f"stage 2 keeps the codebook and the codes of a vq; set trainable={parts}")
        if self.config.loss.entropy:
            raise UserError("a vq has no entropy loss; set loss.entropy=0")

    def finish(self, folder: Path) -> dict[str, Any]:
        return super().finish(folder) | {"perceptual": self.distance.name if self.distance else "none"}


def _r1_penalty(discriminator: nn.Module, signed_BCHW: torch.Tensor) -> torch.Tensor:
    """E |grad D|^2 on real images, computed without the engine, which would take it for a training step."""
    signed_BCHW = signed_BCHW.requires_grad_()
    (gradient_BCHW,) = torch.autograd.grad(discriminator(signed_BCHW).sum(), signed_BCHW, create_graph=True)
    return gradient_BCHW.square().sum(dim=(1, 2, 3)).mean()


build_task = Stage2Task
