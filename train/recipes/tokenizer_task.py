"""What stages 1 and 2 share: the model, the batches of images, the data state, and the finished QLIP folder."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_mix.batches.image_batches import ImageBatch, ImageBatches
from data_mix.prefetch import Prefetch
from data_mix.samples import ImageSource
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from train.checkpoint import full_weights
from train.engine import precision_of
from train.loop import Task
from train.recipes.image_validation import ImageValidation
from train.settings.tokenizer import Stage1Config, Stage2Config
from um3.core.distributed import is_main, rank, world_size
from um3.core.files import atomic_folder
from um3.core.metrics import NO_SAMPLES

logger = logging.getLogger(__name__)

SHOWN_KEYS = 8


class TokenizerTask(Task[Stage1Config | Stage2Config]):
    """Base of `Stage1Task` and `Stage2Task`, which set `objective`: QLIP and its losses."""

    unit = "images"

    def __init__(
        self,
        config: Stage1Config | Stage2Config,
        *,
        qlip: QLIPModel,
        processor: QLIPProcessor,
        sources: list[ImageSource],
    ):
        self.config, self.qlip, self.processor = config, qlip, processor
        self.tokens_per_sample = qlip.num_patches
        # DeepSpeed broadcasts parameters as bytes, which it cannot do with the 0-dimensional logit scale.
        qlip.logit_scale.data = qlip.logit_scale.data.reshape(1)
        if config.engine.activation_checkpointing:
            qlip.gradient_checkpointing_enable()
        self.data = ImageBatches(
            sources,
            weights=[source.weight for source in config.data.sources],
            batch_size=config.loop.batch_size,
            seed=config.loop.seed,
            rank=rank(),
            world_size=world_size(),
            caption=config.data.caption,
            augment=config.data.augment,
        )
        logger.info("%s", self.data.describe(num_steps=config.loop.max_steps))
        self.batches: Prefetch[ImageBatch] = Prefetch(self.data, num_steps=config.loop.max_steps)
        self.skipped, self._not_summed = Counter[str](), Counter[str]()
        self.validation = ImageValidation(config, processor=processor) if config.validation.every_steps else None

    def build_engines(self) -> dict[str, Any]:
        frozen = {name: weight for name, weight in self.qlip.named_parameters() if not weight.requires_grad}
        # bf16-true rounds frozen weights too, but the saved model has them as they were.
        rounds = precision_of(self.config.engine) == "bf16-true"
        self._frozen = {name: weight.detach().cpu().clone() for name, weight in frozen.items()} if rounds else {}
        return super().build_engines()

    def skipped_metrics(self, skipped: Mapping[tuple[str, str], int], *, step: int) -> dict[str, float]:
        """Count a batch's skipped samples; return those of the run as metrics of a logged step (a collective call)."""
        for (source, reason), count in skipped.items():
            self._not_summed[f"data/skipped/{source}/{reason}".replace(" ", "_")] += count
        if not self.config.loop.is_logged(step + 1):
            return {}
        return {key: float(count) for key, count in self._all_skipped().items()}

    def _all_skipped(self) -> Counter[str]:
        """The skipped samples of the run on all ranks (a collective call)."""
        of_ranks = [self._not_summed] * world_size()
        if world_size() > 1:
            torch.distributed.all_gather_object(of_ranks, self._not_summed)
        self.skipped, self._not_summed = sum(of_ranks, self.skipped), Counter()
        return self.skipped

    def evaluate(self, step: int) -> dict[str, float]:
        validation, loop = self.validation, self.config.loop
        if validation is None or (step % self.config.validation.every_steps and step != loop.max_steps):
            self.shown = NO_SAMPLES
            return {}
        values = validation.measure(self.engine, micro_images=self.micro_batch_size)
        self.shown = validation.shown
        return values

    def fingerprints(self) -> dict[str, str]:
        return self.data.fingerprints()

    def state(self, step: int) -> dict[str, Any]:
        return {"seed": self.config.loop.seed, "step": step, "skipped": self._all_skipped()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Only counts: batches are a function of (seed, step), and the run was compared before."""
        self.skipped = Counter(state.get("skipped", {}))

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        trained = {name.removeprefix("qlip."): tensor for name, tensor in full_weights(self.engine).items()}
        fingerprint = save_tokenizer(
            folder / "model", qlip=self.qlip, processor=self.processor, weights=self._frozen | trained
        )
        return {"fingerprint": fingerprint, "skipped": self._all_skipped()}


def save_tokenizer(folder: Path, *, qlip: QLIPModel, processor: QLIPProcessor, weights: dict[str, torch.Tensor]) -> str:
    """Write a QLIP folder with the trained `weights` on rank 0; return its fingerprint there, and "" elsewhere."""
    if not is_main():
        return ""
    qlip.logit_scale.data = qlip.logit_scale.data.reshape(())  # as in the released layout
    state = qlip.float().state_dict()
    for name, tensor in weights.items():
        state[name].copy_(tensor.reshape(state[name].shape))
    with atomic_folder(folder) as partial:
        qlip.save_pretrained(partial)
        processor.save_pretrained(partial)
    return qlip.fingerprint()


def described(batch: ImageBatch) -> str:
    """The sources and first keys of a batch, for the message about a non-finite loss."""
    keys = ", ".join(batch.keys[:SHOWN_KEYS])
    if len(batch.keys) > SHOWN_KEYS:
        keys += f" and {len(batch.keys) - SHOWN_KEYS} more"
    return f"images of {', '.join(sorted(set(batch.sources)))}: {keys}"
