"""Stage 2: the frozen encoder's codes, drawn better (paper section 3; SPEC section 1).

The text tower is not used, the encoder is frozen; bottleneck and decoder train on

    loss = a_r * MSE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_p * perceptual + a_g * adversarial

Legend: B images of this rank, H, W pixels, C channels.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import load
from tokenizer.discriminator import PatchDiscriminator
from tokenizer.losses import discriminator_loss, generator_loss
from tokenizer.modeling import QLIPModel
from tokenizer.perceptual import build_perceptual_distance
from train.checkpoint import full_weights
from train.config import Stage2Config
from train.engine import autocast, build_engine, step_engine
from train.loop import check_finite
from train.optim import schedule_factor, set_learning_rate
from train.tokenizer_setup import flatten_scalars, image_batches, open_sources, save_tokenizer, skipped_metrics
from um3.core.distributed import device, mean_over_ranks, world_size
from um3.core.seeds import seed_everything

TRAINED = ("vision_model.quant_embed.", "vision_model.quant_embed_post.", "vision_decoder.")


def build_task(config: Stage2Config) -> "Stage2Task":
    """The recipe as the loop runs it."""
    return Stage2Task(config)


class Autoencoder(nn.Module):
    """QLIP's reconstruction path; the encoder runs without gradient memory."""

    def __init__(self, qlip: QLIPModel):
        super().__init__()
        self.qlip = qlip
        qlip.requires_grad_(False)
        for name, parameter in qlip.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED))

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images -> (reconstructions, entropy term)."""
        with torch.no_grad():
            hidden_BTD = self.qlip.vision_model(pixels_BCHW)
        quantizer = self.qlip.vision_model.quantize(hidden_BTD, entropy=True)
        return self.qlip.decode_quantized(quantizer.quantized_BNL.to(hidden_BTD.dtype)), quantizer.loss


class Stage2Task:
    """Two engines: the autoencoder's and the discriminator's, each with its own optimizer."""

    unit = "images"

    def __init__(self, config: Stage2Config):
        self.config = config
        self.qlip, self.processor = load(config.tokenizer)
        self.qlip.train()
        flatten_scalars(self.qlip)
        if config.engine.activation_checkpointing:
            self.qlip.gradient_checkpointing_enable()
        sources = open_sources(config.data, size=self.processor.image_size, seed=config.loop.seed)
        self.batches = image_batches(sources, data=config.data, loop=config.loop)
        self.autoencoder = Autoencoder(self.qlip)
        perceptual = config.perceptual
        self.distance = build_perceptual_distance(backbone=perceptual.backbone, heads=perceptual.heads).to(device())
        seed_everything(config.loop.seed, "discriminator weights")
        shape = config.discriminator
        self.discriminator = PatchDiscriminator(channels=shape.channels, num_layers=shape.num_layers)
        self.skipped: dict[str, int] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.autoencoder, "discriminator": self.discriminator}

    def build_engines(self) -> dict[str, Any]:
        config = self.config
        shared: dict[str, Any] = {"engine": config.engine, "micro_batch_size": config.loop.batch_size // world_size()}
        self.generator = build_engine(self.autoencoder, optimizer=config.optimizer, **shared)
        self.critic = build_engine(self.discriminator, optimizer=config.discriminator_optimizer, **shared)
        return {"model": self.generator, "discriminator": self.critic}

    def train_step(self, step: int) -> dict[str, float]:
        config, total = self.config, self.config.loop.total_steps
        batch = self.batches.batch(step)
        pixels_BCHW = self.processor.pixels(batch.images_BHWC).to(device())
        source = "images of " + ", ".join(sorted(set(batch.sources)))
        factor = schedule_factor(step, total_steps=total, config=config.optimizer)
        set_learning_rate(self.generator.optimizer, factor=factor)
        critic_factor = schedule_factor(step, total_steps=total, config=config.discriminator_optimizer)
        set_learning_rate(self.critic.optimizer, factor=critic_factor)
        values, reconstructions_BCHW = self._generator_step(pixels_BCHW, step=step, source=source)
        values |= self._critic_step(pixels_BCHW, reconstructions_BCHW, source=source)
        values = mean_over_ranks(values)
        values |= {"optim/lr": config.optimizer.lr * factor}
        return values | skipped_metrics(self.skipped, batch.skipped)

    def _generator_step(
        self, pixels_BCHW: torch.Tensor, *, step: int, source: str
    ) -> tuple[dict[str, float], torch.Tensor]:
        weights = self.config.loss
        listens = weights.adversarial > 0 and step >= weights.adversarial_start_step
        with autocast(self.config.engine):
            drawn_BCHW, entropy = self.generator(pixels_BCHW)
            terms = {"mse": F.mse_loss(drawn_BCHW.float(), pixels_BCHW), "entropy": entropy}
            terms["perceptual"] = self.distance(self._signed(drawn_BCHW), self._signed(pixels_BCHW))
            if listens:
                # The discriminator only judges here: its own engine must not see these gradients.
                self.discriminator.requires_grad_(False)
                logits = self.discriminator(self._signed(drawn_BCHW))
                self.discriminator.requires_grad_(True)
                terms["adversarial"] = generator_loss(logits, kind=weights.adversarial_kind)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), start=pixels_BCHW.new_zeros(()))
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values["train/loss"] = float(loss.detach())
        check_finite(values, source=source)
        self.generator.backward(loss)
        values["optim/grad_norm"] = step_engine(self.generator)
        return values, drawn_BCHW.detach()

    def _critic_step(self, pixels_BCHW: torch.Tensor, drawn_BCHW: torch.Tensor, *, source: str) -> dict[str, float]:
        if self.config.loss.adversarial == 0:
            return {}
        with autocast(self.config.engine):
            real = self.critic(self._signed(pixels_BCHW))
            fake = self.critic(self._signed(drawn_BCHW))
            loss = discriminator_loss(real, fake, kind=self.config.loss.adversarial_kind)
        values = {"train/discriminator": float(loss.detach())}
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
        return {"fingerprint": fingerprint, "skipped": self.skipped, "perceptual": self.distance.name}
