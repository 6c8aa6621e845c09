"""Stage 1: train the tokenizer for reconstruction and text alignment together (paper section 3; SPEC section 1).

    loss = a_r * MSE + a_a * InfoNCE + a_q * (E[H(Q)] - gamma * H(E[Q])) + a_z * ||sg(zhat) - z||^2

The weights are `Stage1LossConfig`; InfoNCE is in tokenizer/losses.py, the entropies are in tokenizer/quantizer.py. With
`model.quantizer=vq` there are no entropies; a codebook is found by k-means before the first step and moves after every
step (`VectorQuantizer`).

Two terms are functions of the whole global batch, not means over images: InfoNCE, and the entropy H(E[Q]) of the
mean soft code. Of each image they need little: two embeddings, and its share of the mean. With
`loop.micro_batch_size` set, a first pass without gradient computes these for every micro-batch, the two terms give
the gradient with respect to them, and a second pass backpropagates it into the model (gradient caching, Gao et al.
2021, arXiv:2101.06983). So the gradient is that of the whole batch on any number of devices, for one more forward
pass and a micro-batch's memory.

Legend: B images of a micro-batch, M micro-batches of this rank, P projection, G groups of K states, H, W pixels, C
channels, T text tokens, L dimensions of a quantized vector.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data_mix.batches.image_batches import ImageBatch
from tokenizer import load
from tokenizer.losses import info_nce
from tokenizer.modeling import QLIPModel
from tokenizer.quantizer import VectorQuantizer, codebook_entropy
from train.engine import autocast, limit_parameter, precision_of, step_engine
from train.loop import check_finite
from train.recipes.tokenizer_setup import new_tokenizer, open_sources, train_only
from train.recipes.tokenizer_task import TokenizerTask, described
from train.settings.tokenizer import CodebookConfig, Stage1Config
from um3.core.distributed import device, gather_with_gradient, mean_over_ranks, rank, sum_over_ranks, world_size
from um3.core.errors import UserError
from um3.core.seeds import torch_generator
from um3.model.text_tokenizer import vocabulary_digest

MAX_LOGIT_SCALE = math.log(100.0)


class BatchInputs(NamedTuple):
    """What the terms of the whole batch need of a micro-batch."""

    image_embeds_BP: torch.Tensor
    text_embeds_BP: torch.Tensor
    soft_code_GK: torch.Tensor
    logit_scale: torch.Tensor


Outputs = tuple[BatchInputs, dict[str, torch.Tensor], torch.Tensor | None]
"""What `Stage1Objective` returns of a micro-batch."""


class Stage1Objective(nn.Module):
    """QLIP on a micro-batch, both towers in one engine call: its `BatchInputs`, the loss terms that are means, and what
    the quantizer got (None without one)."""

    def __init__(self, qlip: QLIPModel, *, bottleneck: bool = True):
        super().__init__()
        self.qlip, self.bottleneck = qlip, bottleneck

    def forward(self, pixels_BCHW: torch.Tensor, input_ids_BT: torch.Tensor, validates: bool = False) -> Any:
        """`Outputs`; if it `validates`: reconstructions, image embeddings times the logit scale, text embeddings."""
        output = self.qlip(pixels_BCHW, input_ids_BT, bottleneck=self.bottleneck)
        if validates:
            return output.reconstructions, output.image_embeds * self.qlip.logit_scale.exp(), output.text_embeds
        quantizer = self.qlip.vision_model.quantizer
        batch_inputs = BatchInputs(
            output.image_embeds.float(), output.text_embeds.float(), output.soft_code, self.qlip.logit_scale.exp()
        )
        return (
            batch_inputs,
            {
                "mse": F.mse_loss(output.reconstructions.float(), pixels_BCHW),
                "entropy": quantizer.penalty(output.sample_entropy, torch.zeros_like(output.sample_entropy)),
                "commitment": output.commitment,
            },
            output.quantizer_input,
        )


class Stage1Task(TokenizerTask):
    """One optimizer; the loss is that of the global batch, however many micro-batches and ranks share it."""

    config: Stage1Config

    def __init__(self, config: Stage1Config):
        model = config.model
        if model.init_from:
            qlip, processor = load(model.init_from)
            qlip.float().train()
            sources = open_sources(config.data, size=processor.image_size, seed=config.loop.seed)
        else:
            sources = open_sources(config.data, size=model.image_size, seed=config.loop.seed)
            cache = Path(config.loop.output_dir) / "cache"
            qlip, processor = new_tokenizer(model, config.text, sources=sources, seed=config.loop.seed, cache=cache)
        super().__init__(config, qlip=qlip, processor=processor, sources=sources)
        self.objective = Stage1Objective(self.qlip, bottleneck=config.bottleneck == "quantizer")
        if config.trainable:
            train_only(self.objective, config.trainable)
        if config.bottleneck == "identity":
            self.qlip.vision_model.quant_embed.requires_grad_(False)
            self.qlip.vision_model.quant_embed_post.requires_grad_(False)
        if config.gradient_norms and not all(weight.requires_grad for weight in self._last_mlp()):
            raise UserError("gradient_norms needs the encoder's last MLP to train; add it to `trainable`")
        self.codebook = self._trained_codebook()

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        if self.codebook is not None and self.codebook.is_empty:
            self._initialise(self.codebook)
        batch = self.batches.batch(step)
        learning_rate = self.set_rate(self.engine, config.optimizer, step=step)
        norms = self._gradient_norms(batch) if config.gradient_norms and config.loop.is_logged(step + 1) else {}
        starts = range(0, len(batch.captions), self.micro_batch_size)
        with torch.set_grad_enabled(len(starts) == 1):
            outputs = [self._forward(batch, start=start) for start in starts]
        parts = zip(*(batch_inputs for batch_inputs, _, _ in outputs), strict=True)
        leaves = BatchInputs(*(torch.stack(part).detach().requires_grad_() for part in parts))
        means = {name: torch.stack([terms[name] for _, terms, _ in outputs]).detach().mean() for name in outputs[0][1]}
        of_batch, accuracy = self._batch_terms(leaves)
        terms = means | of_batch | {"entropy": means["entropy"] + of_batch["entropy"]}
        loss = self._weighted(terms)
        values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
        values |= {"train/loss": float(loss.detach()), "train/accuracy": float(accuracy)}
        check_finite(values, source=described(batch))
        values |= {f"weighted/{name}": getattr(config.loss, name) * values[f"train/{name}"] for name in terms}
        gradients = torch.autograd.grad(loss, list(leaves))
        for number, start in enumerate(starts):
            batch_inputs, terms, _ = outputs[0] if len(starts) == 1 else self._forward(batch, start=start)
            # The engine averages over micro-batches, but these gradients belong to the whole batch: hence len(starts).
            pairs = zip(batch_inputs, gradients, strict=True)
            of_batch_loss = sum((part * gradient[number]).sum() for part, gradient in pairs)
            self.engine.backward(self._weighted(terms) + len(starts) * of_batch_loss)
            norm = step_engine(self.engine)
        limit_parameter(self.engine, self.qlip.logit_scale, maximum=MAX_LOGIT_SCALE)
        values = mean_over_ranks(values) | norms | {"optim/lr": learning_rate, "optim/grad_norm": norm}
        if self.codebook is not None:
            options = {"decay": config.codebook.decay, "revive_below": config.codebook.revive_below}
            generator = torch_generator(config.loop.seed, "codebook", step, rank())
            values |= self.codebook.update(_vectors(outputs), **options, generator=generator)
        return values | self.skipped_metrics(batch.skipped, step=step)

    def _trained_codebook(self) -> VectorQuantizer | None:
        """The codebook that this run trains, if any; UserError for settings that do not fit one."""
        config, quantizer = self.config, self.qlip.vision_model.quantizer
        if not isinstance(quantizer, VectorQuantizer):
            if config.codebook != CodebookConfig():
                raise UserError("the settings in `codebook` are for model.quantizer=vq; leave them out for bsq")
            return None
        refused = [
            (config.loss.entropy > 0, "a vq has no entropy loss; set loss.entropy=0"),
            (precision_of(config.engine) == "bf16-true", "a codebook is float32; set engine.precision=bf16-mixed"),
            (config.optimizer.ema_decay > 0, "a codebook has no average; set optimizer.ema_decay=0"),
        ]
        for applies, message in refused:
            if applies:
                raise UserError(f"model.quantizer=vq: {message}")
        before = [w for name, w in self.qlip.vision_model.named_parameters() if not name.startswith("quant_embed_post")]
        return quantizer if self.objective.bottleneck and any(weight.requires_grad for weight in before) else None

    def _initialise(self, codebook: VectorQuantizer) -> None:
        """Find the codebook by k-means of the first images' vectors."""
        loop, config, num_patches = self.config.loop, self.config.codebook, self.qlip.num_patches
        needed = config.kmeans_vectors * len(codebook.codebook)
        micro_batches = (
            (batch, start)
            for batch in map(self.data.batch, itertools.count())
            for start in range(0, len(batch.captions), self.micro_batch_size)
        )
        count = math.ceil(needed / (world_size() * self.micro_batch_size * num_patches))
        with torch.no_grad():
            outputs = [self._forward(batch, start=start) for batch, start in itertools.islice(micro_batches, count)]
        codebook.initialise(
            _vectors(outputs),
            step_vectors=loop.batch_size * num_patches,
            iterations=config.kmeans_iterations,
            generator=torch_generator(loop.seed, "codebook", rank()),
        )

    def _weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([getattr(self.config.loss, name) * term for name, term in terms.items()]).sum()

    def _forward(self, batch: ImageBatch, *, start: int, with_engine: bool = True) -> Outputs:
        """The objective on the micro-batch whose first image is `start`."""
        chosen = slice(start, start + self.micro_batch_size)
        pixels_BCHW = self.processor.pixels(batch.images_BHWC[chosen].to(device()))  # bytes to floats on the GPU
        input_ids_BT = self.processor.text(batch.captions[chosen])["input_ids"].to(device())
        with autocast(self.config.engine):
            return (self.engine if with_engine else self.objective)(pixels_BCHW, input_ids_BT)

    def _last_mlp(self) -> list[nn.Parameter]:
        last_layer: Any = self.qlip.vision_model.encoder.layers[-1]
        return list(last_layer.mlp.parameters())

    def _gradient_norms(self, batch: ImageBatch) -> dict[str, float]:
        """Norm of each unweighted loss's gradient in the encoder's last MLP (paper, Figure 5).

        Computed on the first micro-batch of every rank, without the engine, which would take it for a training step.
        """
        batch_inputs, terms, _ = self._forward(batch, start=0, with_engine=False)
        of_batch, _ = self._batch_terms(BatchInputs(*(part[None] for part in batch_inputs)))
        norms = {}
        for name, term in {"contrastive": of_batch["contrastive"], "mse": terms["mse"]}.items():
            gradients = torch.autograd.grad(term, self._last_mlp(), retain_graph=True)
            flat = sum_over_ranks(torch.cat([gradient.flatten().float() for gradient in gradients])) / world_size()
            norms[f"gradients/{name}"] = float(flat.norm())
        return norms

    def _batch_terms(self, inputs: BatchInputs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The unweighted terms of the global batch, and the retrieval accuracy; `inputs` have a leading dimension M."""
        contrastive = info_nce(
            inputs.image_embeds_BP.flatten(0, 1),
            inputs.text_embeds_BP.flatten(0, 1),
            logit_scale=inputs.logit_scale.mean(),
        )
        mean_GK = gather_with_gradient(inputs.soft_code_GK.mean(0, keepdim=True)).mean(0)
        codebook = codebook_entropy(mean_GK)
        penalty = self.qlip.vision_model.quantizer.penalty(torch.zeros_like(codebook), codebook)
        return {"contrastive": contrastive.loss, "entropy": penalty}, contrastive.accuracy

    def fingerprints(self) -> dict[str, str]:
        return super().fingerprints() | {"vocabulary": vocabulary_digest(self.processor.text_tokenizer)}


def _vectors(outputs: Sequence[Outputs]) -> torch.Tensor:
    """The vectors (M, L) that the quantizer got of all micro-batches."""
    return torch.cat([vectors.flatten(0, 1) for _, _, vectors in outputs if vectors is not None])


build_task = Stage1Task
