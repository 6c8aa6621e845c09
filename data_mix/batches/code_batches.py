"""Batches of coded images with captions, for text-to-image alone (LlamaGen).

The samples of a step are a function of (seed, step), planned for the global batch; each rank reads its own part.

Legend: B samples of this rank, N patches of an image.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_mix.batches.config import CodeDataConfig
from data_mix.codes.shards import CodedSample, open_code_sources
from data_mix.order import SampleOrder, check_state, fixed_counts, rank_positions
from data_mix.samples import usable
from um3.core.errors import UserError
from um3.core.seeds import derive_seed


class CodeBatch(NamedTuple):
    """`codes_BN` int64, a caption each, and `dropped_B` bool: samples that train without their caption."""

    codes_BN: Tensor
    captions: list[str]
    dropped_B: Tensor
    sources: list[str]


class CodeBatches:
    """The batches by step. The share of each source is exact to within one sample after every step.

    num_patches: codes of an image, N. bits: of a code.
    """

    def __init__(
        self,
        config: CodeDataConfig,
        *,
        batch_size: int,
        seed: int,
        fingerprint: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """UserError: no codes, codes of another tokenizer, an unknown source, a batch that ranks cannot share."""
        self.config, self.seed = config, seed
        self.positions = rank_positions(batch_size, rank=rank, world_size=world_size)
        self.images = open_code_sources(config.codes, split="train", expected_fingerprint=fingerprint)
        first = next(iter(self.images.values()))
        self.num_patches, self.bits = first.num_patches, first.bits
        weights = config.image_weights or {name: float(len(source)) for name, source in self.images.items()}
        if unknown := sorted(weights.keys() - self.images.keys()):
            raise UserError(f"data.image_weights names the unknown source '{unknown[0]}'; known: {list(self.images)}")
        self.names = sorted(weights)
        shares = [weights[name] for name in self.names]
        self.counts = fixed_counts(shares, batch_size=batch_size, of=str(self.names))
        self.orders = {name: SampleOrder(len(self.images[name]), seed=seed, name=name) for name in self.names}

    def batch(self, step: int) -> CodeBatch:
        """This rank's part of the batch of `step`."""
        draws = self.counts.draws(step, self.positions)
        samples = [self._read(self.names[number], draw) for number, draw in draws]
        captions, dropped = [], []
        for position, sample in zip(self.positions, samples, strict=True):
            draw = derive_seed(self.seed, "caption", step, position)
            of_image = sample.captions_in(self.config.codes)
            captions.append(of_image[draw % len(of_image) if self.config.caption == "random" else 0])
            dropped.append(derive_seed(self.seed, "caption_dropout", step, position))
        return CodeBatch(
            torch.stack([sample.codes_N for sample in samples]),
            captions,
            torch.tensor([draw < self.config.caption_dropout * 2**63 for draw in dropped]),
            [self.names[number] for number, _ in draws],
        )

    def fingerprints(self) -> dict[str, str]:
        """Hash of the codes and captions of each source."""
        return {f"images/{name}": self.images[name].digest for name in self.names}

    def state(self, step: int) -> dict[str, Any]:
        """The state for a checkpoint of `step`, to verify that a resumed run reads the same samples."""
        draws = dict(zip(self.names, self.counts.before(step), strict=True))
        return {"seed": self.seed, "step": step, "draws": draws, "fingerprints": self.fingerprints()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """UserError if a checkpoint's `state` is not that of these sources and this config at the same step."""
        check_state(state, expected=self.state(int(state["step"])), keys=("seed", "draws", "fingerprints"))

    def _read(self, name: str, draw: int) -> CodedSample:
        """The sample of a draw, or the next one of its source whose shard can be read."""
        # There is one: CodeShards raises UserError if less than half of a source can be read.
        return next(usable(self.images[name].__getitem__, self.orders[name].substitutes(draw)))
