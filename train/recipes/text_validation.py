"""Text validation during UM3's training: the loss on validation text, compared with the loss before the first step.

A language model that learns images forgets text; the paper's calm-down exists for that reason. The loss is measured
on the same sequences every time, logged, and reported as an alarm if it rises above a limit.

Legend: B sequences of a micro-batch, T tokens of a sequence.
"""

import itertools
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_mix.batches.packing import lay_out, micro_batches
from data_mix.batches.token_stream import sequences_of_sources
from train.engine import autocast, split_batch
from train.settings.um3 import UM3Config
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.errors import UserError
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TextValidation:
    """This rank's share of the validation sequences, and the loss over all of them before the first step, once
    measured."""

    def __init__(self, config: UM3Config, *, ids: UnifiedVocabulary, text_tokenizer: "PreTrainedTokenizerBase"):
        self.config = config
        data, sources = config.data, config.text_validation.texts or config.data.texts
        num_sequences = config.text_validation.num_sequences
        if not sources or num_sequences < max(len(sources), world_size()):
            raise UserError(
                f"text_validation.num_sequences={num_sequences} with {len(sources)} text sources and {world_size()} "
                "processes: each source and process needs one sequence; set num_sequences and text_validation.texts"
            )
        seq_len = data.text_seq_len or data.seq_len
        by_source = sequences_of_sources(
            sources,
            split="val",
            num_sequences=num_sequences,
            tokenizer=text_tokenizer,
            ids=ids,
            seq_len=seq_len,
            seed=config.loop.seed,
            cache=Path(config.loop.output_dir) / "cache",
        )
        sequences = list(itertools.chain(*by_source))
        padded = lay_out(sequences[rank() :: world_size()], seq_len=seq_len, packed=False, pad_id=ids.pad_id)
        micro_batch_size, _ = split_batch(config.loop)
        parts = math.ceil(math.ceil(len(sequences) / world_size()) / micro_batch_size)  # the same on every rank
        self.micro_batches = list(micro_batches(*padded, parts=parts, pad_id=ids.pad_id))
        self.start_loss: float | None = None

    def measure(self, engine: Any, *, step: int) -> dict[str, float]:
        """The loss after `step` steps, and its difference from the start, as metrics; warn above the limit."""
        assert self.start_loss is not None, "measured before the first step"
        loss = self.loss(engine)
        above, limit = loss - self.start_loss, self.config.text_validation.alarm_above
        if limit is not None and above > limit and is_main():
            logger.warning(
                "step %d: the validation text loss is %.3f nats per token, %.3f above the start "
                "(text_validation.alarm_above=%g): the model forgets text; raise its share in data.mix, or lower "
                "optimizer.lr",
                *(step, loss, above, limit),
            )
        values = {"text_loss": loss, "start": self.start_loss, "above_start": above}
        return {f"text_validation/{name}": value for name, value in values.items()}

    @torch.no_grad()
    def loss(self, engine: Any) -> float:
        """Nats per token over the sequences of all ranks, under the softmax of the text half (a collective call)."""
        sum_and_count = torch.zeros(2, device=device())
        engine.eval()
        for input_ids_BT, target_mask_BT in self.micro_batches:
            with autocast(self.config.engine):
                sums = engine(input_ids_BT.to(device()), target_mask_BT.to(device()), mode="split")
            sum_and_count += torch.stack([sums.text_sum, sums.text_count])
        engine.train()
        total, count = sum_over_ranks(sum_and_count).tolist()
        return total / count
