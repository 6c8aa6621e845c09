"""Stage 1: reconstruction and text alignment together (paper section 3; SPEC section 1).

    loss = a_r * MSE + a_a * InfoNCE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_z * ||sg(zhat) - z||^2

Legend: B images of this rank, H, W pixels, C channels, T text tokens.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import load
from tokenizer.losses import info_nce
from tokenizer.modeling import QLIPModel
from train.checkpoint import full_weights
from train.config import Stage1Config
from train.engine import autocast, build_engine, step_engine
from train.loop import check_finite
from train.optim import schedule_factor, set_learning_rate
from train.tokenizer_setup import (
    flatten_scalars,
    image_batches,
    new_tokenizer,
    open_sources,
    save_tokenizer,
    skipped_metrics,
)
from um3.core.distributed import device, mean_over_ranks, world_size

MAX_LOGIT_SCALE = math.log(100.0)


def build_task(config: Stage1Config) -> "Stage1Task":
    """The recipe as the loop runs it."""
    return Stage1Task(config)


class Stage1Objective(nn.Module):
    """QLIP with its raw stage-1 loss terms as output, so that one engine call covers both towers."""

    def __init__(self, qlip: QLIPModel):
        super().__init__()
        self.qlip = qlip

    def forward(self, pixels_BCHW: torch.Tensor, input_ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.qlip(pixels_BCHW, input_ids_BT)
        contrastive = info_nce(output.image_embeds, output.text_embeds, logit_scale=self.qlip.logit_scale.exp())
        return {
            "mse": F.mse_loss(output.reconstructions.float(), pixels_BCHW),
            "contrastive": contrastive.loss,
            "entropy": output.quantizer_loss,
            "commitment": output.commitment,
            "accuracy": contrastive.accuracy,
        }


class Stage1Task:
    """One optimizer, one batch, no accumulation: the contrastive term needs the whole batch at once."""

    unit = "images"

    def __init__(self, config: Stage1Config):
        self.config = config
        model = config.model
        if model.start:
            self.qlip, self.processor = load(model.start)
            self.qlip.train()
            size = self.processor.image_size
        else:
            size = model.image_size
        sources = open_sources(config.data, size=size, seed=config.loop.seed)
        if not model.start:
            self.qlip, self.processor = new_tokenizer(model, config.text, sources=sources, seed=config.loop.seed)
        flatten_scalars(self.qlip)
        if config.engine.activation_checkpointing:
            self.qlip.gradient_checkpointing_enable()
        self.batches = image_batches(sources, data=config.data, loop=config.loop)
        self.objective = Stage1Objective(self.qlip)
        self.skipped: dict[str, int] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.objective}

    def build_engines(self) -> dict[str, Any]:
        config = self.config
        self.engine = build_engine(
            self.objective,
            optimizer=config.optimizer,
            engine=config.engine,
            micro_batch_size=config.loop.batch_size // world_size(),
        )
        return {"model": self.engine}

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        batch = self.batches.batch(step)
        pixels_BCHW = self.processor.pixels(batch.images_BHWC).to(device())
        input_ids_BT = self.processor.text(batch.captions)["input_ids"].to(device())
        factor = schedule_factor(step, total_steps=config.loop.total_steps, config=config.optimizer)
        set_learning_rate(self.engine.optimizer, factor=factor)
        with autocast(config.engine):
            terms = self.engine(pixels_BCHW, input_ids_BT)
        weights = config.loss
        loss = (
            weights.mse * terms["mse"]
            + weights.contrastive * terms["contrastive"]
            + weights.entropy * terms["entropy"]
            + weights.commitment * terms["commitment"]
        )
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values["train/loss"] = float(loss.detach())
        check_finite(values, source="images of " + ", ".join(sorted(set(batch.sources))))
        self.engine.backward(loss)
        norm = step_engine(self.engine)
        with torch.no_grad():
            self.qlip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        values = mean_over_ranks(values)
        values |= {"optim/lr": config.optimizer.lr * factor, "optim/grad_norm": norm}
        return values | skipped_metrics(self.skipped, batch.skipped)

    def state(self, step: int) -> dict[str, Any]:
        return {"seed": self.config.loop.seed, "step": step}

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing to refuse: batches are a function of (seed, step), and the config was compared already."""

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        weights = {name.removeprefix("qlip."): tensor for name, tensor in full_weights(self.engine).items()}
        fingerprint = save_tokenizer(folder / "model", qlip=self.qlip, processor=self.processor, weights=weights)
        return {"fingerprint": fingerprint, "skipped": self.skipped}
