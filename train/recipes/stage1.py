"""Stage 1: reconstruction and text alignment together (paper section 3; SPEC section 1).

    loss = a_r * MSE + a_a * InfoNCE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_z * ||sg(zhat) - z||^2

Two terms belong to the global batch as a whole and are no mean over images: InfoNCE, and the entropy H(E[Q]) of the
mean soft code. What they need of an image is small: two embeddings and its share of the mean. With
`loop.micro_batch_size` set, a first pass without gradient computes that for every micro-batch, the two terms give its
gradient, and a second pass carries it on into the model (gradient caching, Gao et al. 2021, arXiv:2101.06983). So the
gradient is that of the whole batch on any number of devices, for one more forward pass and a micro-batch's memory.

Legend: B images of a micro-batch, M micro-batches of this rank, P projection, G groups of K states, H, W pixels, C
channels, T text tokens.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data_mix.batches.image_batches import ImageBatch
from tokenizer import load
from tokenizer.losses import info_nce
from tokenizer.modeling import QLIPModel
from tokenizer.quantizer import codebook_entropy
from train.checkpoint import full_weights
from train.config import Stage1Config
from train.engine import autocast, build_engine, split_batch, step_engine
from train.loop import check_finite
from train.optim import schedule_factor, set_learning_rate
from train.recipes.tokenizer_setup import (
    described,
    flatten_scalars,
    image_batches,
    new_tokenizer,
    open_sources,
    save_tokenizer,
    skipped_metrics,
    train_only,
)
from um3.core.distributed import device, gather_with_gradient, mean_over_ranks, sum_over_ranks, world_size
from um3.core.errors import UserError

MAX_LOGIT_SCALE = math.log(100.0)


def build_task(config: Stage1Config) -> "Stage1Task":
    """The recipe as the loop runs it."""
    return Stage1Task(config)


class Shared(NamedTuple):
    """What the terms of the whole batch need of a micro-batch."""

    image_embeds_BP: torch.Tensor
    text_embeds_BP: torch.Tensor
    soft_code_GK: torch.Tensor
    logit_scale: torch.Tensor


class Stage1Objective(nn.Module):
    """QLIP on a micro-batch, in one engine call for both towers: its `Shared`, and the raw terms that are means."""

    def __init__(self, qlip: QLIPModel, *, bottleneck: bool = True):
        super().__init__()
        self.qlip, self.bottleneck = qlip, bottleneck

    def forward(self, pixels_BCHW: torch.Tensor, input_ids_BT: torch.Tensor) -> tuple[Shared, dict[str, torch.Tensor]]:
        output = self.qlip(pixels_BCHW, input_ids_BT, bottleneck=self.bottleneck)
        quantizer = self.qlip.vision_model.quantizer
        shared = Shared(
            output.image_embeds.float(), output.text_embeds.float(), output.soft_code, self.qlip.logit_scale.exp()
        )
        return shared, {
            "mse": F.mse_loss(output.reconstructions.float(), pixels_BCHW),
            "entropy": quantizer.penalty(output.sample_entropy, torch.zeros_like(output.sample_entropy)),
            "commitment": output.commitment,
        }


class Stage1Task:
    """One optimizer; the loss of the global batch, however many micro-batches and ranks it is cut into."""

    unit = "images"

    def __init__(self, config: Stage1Config):
        self.config = config
        model = config.model
        if model.init_from:
            self.qlip, self.processor = load(model.init_from)
            self.qlip.float().train()
            size = self.processor.image_size
        else:
            size = model.image_size
        sources = open_sources(config.data, size=size, seed=config.loop.seed)
        if not model.init_from:
            self.qlip, self.processor = new_tokenizer(model, config.text, sources=sources, seed=config.loop.seed)
        flatten_scalars(self.qlip)
        if config.engine.activation_checkpointing:
            self.qlip.gradient_checkpointing_enable()
        self.batches = image_batches(sources, data=config.data, loop=config.loop)
        self.objective = Stage1Objective(self.qlip, bottleneck=config.bottleneck == "bsq")
        if config.trainable:
            train_only(self.objective, config.trainable)
        if config.bottleneck == "identity":
            self.qlip.vision_model.quant_embed.requires_grad_(False)
            self.qlip.vision_model.quant_embed_post.requires_grad_(False)
        if config.gradient_norms and not all(weight.requires_grad for weight in self._last_mlp()):
            raise UserError("gradient_norms looks at the encoder's last MLP, which `trained` leaves out")
        self.skipped: dict[str, int] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.objective}

    def build_engines(self) -> dict[str, Any]:
        config = self.config
        self.micro_images, self.accumulation = split_batch(config.loop)
        self.engine = build_engine(
            self.objective,
            optimizer=config.optimizer,
            engine=config.engine,
            micro_batch_size=self.micro_images,
            accumulation_steps=self.accumulation,
        )
        return {"model": self.engine}

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        batch = self.batches.batch(step)
        factor = schedule_factor(step, max_steps=config.loop.max_steps, config=config.optimizer)
        set_learning_rate(self.engine.optimizer, factor=factor)
        norms = self._gradient_norms(batch) if config.gradient_norms and config.loop.is_logged(step + 1) else {}
        starts = range(0, len(batch.captions), self.micro_images)
        with torch.set_grad_enabled(len(starts) == 1):
            outputs = [self._forward(batch, start=start) for start in starts]
        parts = zip(*(shared for shared, _ in outputs), strict=True)
        shared = Shared(*(torch.stack(part).detach().requires_grad_() for part in parts))
        means = {name: torch.stack([terms[name] for _, terms in outputs]).detach().mean() for name in outputs[0][1]}
        of_batch, accuracy = self._batch_terms(shared)
        terms = means | of_batch | {"entropy": means["entropy"] + of_batch["entropy"]}
        loss = self._weighted(terms)
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values |= {"train/loss": float(loss.detach()), "train/accuracy": float(accuracy)}
        check_finite(values, source=described(batch))
        values |= {f"weighted/{name}": getattr(config.loss, name) * values[f"train/{name}"] for name in terms}
        gradients = torch.autograd.grad(loss, list(shared))
        for number, start in enumerate(starts):
            ours, terms = outputs[0] if len(starts) == 1 else self._forward(batch, start=start)
            # The engine takes the mean over micro-batches, but these gradients are those of the sum.
            carried = [(part * gradient[number]).sum() for part, gradient in zip(ours, gradients, strict=True)]
            self.engine.backward(self._weighted(terms) + len(starts) * sum(carried))
            norm = step_engine(self.engine)
        with torch.no_grad():
            self.qlip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        values = mean_over_ranks(values) | norms
        values |= {"optim/lr": config.optimizer.lr * factor, "optim/grad_norm": norm}
        return values | skipped_metrics(self.skipped, batch.skipped)

    def _weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([getattr(self.config.loss, name) * term for name, term in terms.items()]).sum()

    def _forward(
        self, batch: ImageBatch, *, start: int, past_engine: bool = False
    ) -> tuple[Shared, dict[str, torch.Tensor]]:
        """The micro-batch whose first image is `start`."""
        rows = slice(start, start + self.micro_images)
        pixels_BCHW = self.processor.pixels(batch.images_BHWC[rows].to(device()))  # a GPU makes them floats itself
        input_ids_BT = self.processor.text(batch.captions[rows])["input_ids"].to(device())
        with autocast(self.config.engine):
            return (self.objective if past_engine else self.engine)(pixels_BCHW, input_ids_BT)

    def _last_mlp(self) -> list[nn.Parameter]:
        last: Any = self.qlip.vision_model.encoder.layers[-1]
        return list(last.mlp.parameters())

    def _gradient_norms(self, batch: ImageBatch) -> dict[str, float]:
        """Norm of the gradient of each loss, without its weight, in the encoder's last MLP (paper, Figure 5).

        Of the first micro-batch of every rank; past the engine, which takes a gradient for a training step.
        """
        shared, terms = self._forward(batch, start=0, past_engine=True)
        of_batch, _ = self._batch_terms(Shared(*(part[None] for part in shared)))
        norms = {}
        for name, term in {"contrastive": of_batch["contrastive"], "mse": terms["mse"]}.items():
            gradients = torch.autograd.grad(term, self._last_mlp(), retain_graph=True)
            flat = sum_over_ranks(torch.cat([gradient.flatten().float() for gradient in gradients])) / world_size()
            norms[f"gradients/{name}"] = float(flat.norm())
        return norms

    def _batch_terms(self, shared: Shared) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The raw terms of the global batch, and the retrieval accuracy; `shared` has a leading dimension M."""
        contrastive = info_nce(
            shared.image_embeds_BP.flatten(0, 1),
            shared.text_embeds_BP.flatten(0, 1),
            logit_scale=shared.logit_scale.mean(),
        )
        mean_GK = gather_with_gradient(shared.soft_code_GK.mean(0, keepdim=True)).mean(0)
        codebook = codebook_entropy(mean_GK)
        penalty = self.qlip.vision_model.quantizer.penalty(torch.zeros_like(codebook), codebook)
        return {"contrastive": contrastive.loss, "entropy": penalty}, contrastive.accuracy

    def state(self, step: int) -> dict[str, Any]:
        return {"seed": self.config.loop.seed, "step": step}

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing to refuse: batches are a function of (seed, step), and the config was compared already."""

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        weights = {name.removeprefix("qlip."): tensor for name, tensor in full_weights(self.engine).items()}
        fingerprint = save_tokenizer(folder / "model", qlip=self.qlip, processor=self.processor, weights=weights)
        return {"fingerprint": fingerprint, "skipped": self.skipped}
