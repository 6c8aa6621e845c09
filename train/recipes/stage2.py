"""Stage 2: the frozen encoder's codes, drawn better (paper section 3; SPEC section 1).

The text tower is not used, the encoder is frozen; bottleneck and decoder (or only what `trained` names) train on

    loss = a_r * MSE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_p * perceptual + a_g * adversarial

A perceptual or adversarial term of weight 0 needs no network. With `loop.micro_batch_size` set, a step adds up the
gradients of several micro-batches; of its terms only H(E[Q]) is no mean over images: it is taken of one micro-batch of
every rank.

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
from tokenizer.losses import discriminator_loss, generator_loss
from tokenizer.modeling import QLIPModel
from tokenizer.perceptual import PerceptualDistance, build_perceptual_distance
from tokenizer.quantizer import codebook_entropy
from train.checkpoint import full_weights
from train.config import Stage2Config
from train.engine import autocast, build_engine, split_batch, step_engine
from train.loop import check_finite
from train.optim import schedule_factor, set_learning_rate
from train.recipes.tokenizer_setup import (
    described,
    flatten_scalars,
    image_batches,
    open_sources,
    save_tokenizer,
    skipped_metrics,
    train_only,
)
from um3.core.distributed import device, gather_with_gradient, mean_over_ranks
from um3.core.errors import UserError
from um3.core.seeds import seed_everything

TRAINABLE = ("qlip.vision_model.quant_embed", "qlip.vision_decoder")


def build_task(config: Stage2Config) -> "Stage2Task":
    """The recipe as the loop runs it."""
    return Stage2Task(config)


class Autoencoder(nn.Module):
    """QLIP's reconstruction path; the encoder runs without gradient memory."""

    def __init__(self, qlip: QLIPModel, *, trainable: Sequence[str] = TRAINABLE):
        super().__init__()
        self.qlip = qlip
        if strangers := [prefix for prefix in trainable if not prefix.startswith(TRAINABLE)]:
            raise UserError(f"trainable: stage 2 cannot train '{strangers[0]}'; of {' and '.join(TRAINABLE)} only")
        train_only(self, trainable)

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images -> (reconstructions, entropy term of all ranks' images)."""
        with torch.no_grad():
            hidden_BTD = self.qlip.vision_model(pixels_BCHW)
        quantizer = self.qlip.vision_model.quantizer
        found = self.qlip.vision_model.quantize(hidden_BTD, entropy=True)
        mean_GK = gather_with_gradient(found.mean_GK[None]).mean(0)
        penalty = quantizer.penalty(found.sample_entropy, codebook_entropy(mean_GK))
        return self.qlip.decode_quantized(found.quantized_BNL.to(hidden_BTD.dtype)), penalty


class Stage2Task:
    """Two engines: the autoencoder's and the discriminator's, each with its own optimizer."""

    unit = "images"

    def __init__(self, config: Stage2Config):
        self.config = config
        self.qlip, self.processor = load(config.init_from)
        self.qlip.float().train()
        flatten_scalars(self.qlip)
        if config.engine.activation_checkpointing:
            self.qlip.gradient_checkpointing_enable()
        sources = open_sources(config.data, size=self.processor.image_size, seed=config.loop.seed)
        self.batches = image_batches(sources, data=config.data, loop=config.loop)
        self.autoencoder = Autoencoder(self.qlip, trainable=config.trainable)
        self.distance: PerceptualDistance | None = None
        if config.loss.perceptual > 0:
            perceptual = config.perceptual
            distance = build_perceptual_distance(backbone=perceptual.backbone, heads=perceptual.heads)
            self.distance = distance.to(device())
        self.discriminator: nn.Module | None = None
        if config.loss.adversarial > 0:
            seed_everything(config.loop.seed, "discriminator weights")
            self.discriminator = build_discriminator(**vars(config.discriminator), image_size=self.processor.image_size)
        self.skipped: dict[str, int] = {}

    def modules(self) -> dict[str, nn.Module]:
        judge = {} if self.discriminator is None else {"discriminator": self.discriminator}
        return {"model": self.autoencoder, **judge}

    def build_engines(self) -> dict[str, Any]:
        config = self.config
        self.micro_images, accumulation = split_batch(config.loop)
        batch: dict[str, Any] = {"micro_batch_size": self.micro_images, "accumulation_steps": accumulation}
        self.generator = build_engine(self.autoencoder, optimizer=config.optimizer, engine=config.engine, **batch)
        if self.discriminator is None:
            return {"model": self.generator}
        # It judges outside its engine too, so its weights are whole on every rank.
        stage: Literal[0, 1, 2, 3] = min(config.engine.zero_stage, 2)
        whole = replace(config.engine, zero_stage=stage)
        self.critic = build_engine(self.discriminator, optimizer=config.discriminator_optimizer, engine=whole, **batch)
        return {"model": self.generator, "discriminator": self.critic}

    def train_step(self, step: int) -> dict[str, float]:
        config, total = self.config, self.config.loop.max_steps
        batch = self.batches.batch(step)
        source = described(batch)
        factor = schedule_factor(step, max_steps=total, config=config.optimizer)
        set_learning_rate(self.generator.optimizer, factor=factor)
        if self.discriminator is not None:
            critic_factor = schedule_factor(step, max_steps=total, config=config.discriminator_optimizer)
            set_learning_rate(self.critic.optimizer, factor=critic_factor)
        found: list[dict[str, float]] = []
        for images_BHWC in batch.images_BHWC.split(self.micro_images):
            pixels_BCHW = self.processor.pixels(images_BHWC.to(device()))
            values, drawn_BCHW = self._generator_step(pixels_BCHW, step=step, source=source)
            if self.discriminator is not None:
                values |= self._critic_step(self.discriminator, pixels_BCHW, drawn_BCHW, source=source)
            found.append(values)
        means = {name: fmean(values[name] for values in found) for name in found[0]}
        values = mean_over_ranks(means | {"optim/grad_norm": found[-1]["optim/grad_norm"]})
        values |= {"optim/lr": config.optimizer.lr * factor}
        return values | skipped_metrics(self.skipped, batch.skipped)

    def _generator_step(
        self, pixels_BCHW: torch.Tensor, *, step: int, source: str
    ) -> tuple[dict[str, float], torch.Tensor]:
        weights = self.config.loss
        judge = self.discriminator if step >= weights.adversarial_start_step else None
        with autocast(self.config.engine):
            drawn_BCHW, entropy = self.generator(pixels_BCHW)
            drawn_BCHW = drawn_BCHW.float()
            terms = {"mse": F.mse_loss(drawn_BCHW, pixels_BCHW), "entropy": entropy}
            if self.distance is not None:
                terms["perceptual"] = self.distance(self._signed(drawn_BCHW), self._signed(pixels_BCHW))
            if judge is not None:
                # The discriminator only judges here: its own engine must not see these gradients.
                judge.requires_grad_(False)
                logits = judge(self._signed(drawn_BCHW))
                judge.requires_grad_(True)
                terms["adversarial"] = generator_loss(logits, kind=weights.adversarial_kind)
        weighted = {name: getattr(weights, name) * term for name, term in terms.items()}
        loss = torch.stack(list(weighted.values())).sum()
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values["train/loss"] = float(loss.detach())
        check_finite(values, source=source)
        values |= {f"weighted/{name}": float(term.detach()) for name, term in weighted.items()}
        self.generator.backward(loss)
        values["optim/grad_norm"] = step_engine(self.generator)
        return values, drawn_BCHW.detach()

    def _critic_step(
        self, discriminator: nn.Module, pixels_BCHW: torch.Tensor, drawn_BCHW: torch.Tensor, *, source: str
    ) -> dict[str, float]:
        weights, signed_BCHW = self.config.loss, self._signed(pixels_BCHW)
        with autocast(self.config.engine):
            real = self.critic(signed_BCHW)
            fake = self.critic(self._signed(drawn_BCHW))
            loss = discriminator_loss(real, fake, kind=weights.adversarial_kind)
        values = {"train/discriminator": float(loss.detach())}
        if weights.r1 > 0:
            penalty = _slope(discriminator, signed_BCHW)
            loss = loss + weights.r1 / 2 * penalty
            values["train/r1"] = float(penalty.detach())
        values |= {"train/logit_real": float(real.detach().mean()), "train/logit_fake": float(fake.detach().mean())}
        check_finite(values, source=source)
        self.critic.backward(loss)
        step_engine(self.critic)
        return values

    def _signed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pixels -> [-1, 1], what the perceptual network and the discriminator take."""
        return self.processor.unit_range(pixels_BCHW) * 2 - 1

    def state(self, step: int) -> dict[str, Any]:
        return {"seed": self.config.loop.seed, "step": step}

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing to refuse: batches are a function of (seed, step), and the config was compared already."""

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        weights = {name.removeprefix("qlip."): tensor for name, tensor in full_weights(self.generator).items()}
        fingerprint = save_tokenizer(folder / "model", qlip=self.qlip, processor=self.processor, weights=weights)
        perceptual = self.distance.name if self.distance else "none"
        return {"fingerprint": fingerprint, "skipped": self.skipped, "perceptual": perceptual}


def _slope(discriminator: nn.Module, signed_BCHW: torch.Tensor) -> torch.Tensor:
    """E |grad D|^2 on real images. Past the engine, which takes every gradient through it for a training step."""
    signed_BCHW = signed_BCHW.requires_grad_()
    (slope_BCHW,) = torch.autograd.grad(discriminator(signed_BCHW).sum(), signed_BCHW, create_graph=True)
    return slope_BCHW.square().sum(dim=(1, 2, 3)).mean()
