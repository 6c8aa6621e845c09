"""The forgetting guard: what held-out text costs the model, against what it cost when the run began.

A language model that learns images forgets text (the reason for the paper's calm-down). Measured here while it trains,
on the same rows every time, it can raise an alarm, or have the mix go back to its start and calm down anew.

Legend: B rows of a micro-batch, T tokens of a row.
"""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_mix.batches.packing import lay_out, micro_batches
from data_mix.batches.token_stream import scattered_rows
from data_mix.sources.fingerprint import origin
from data_mix.sources.text import open_text_source
from train.config import UM3Config
from train.engine import autocast, split_batch
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.errors import UserError
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class ForgettingGuard:
    """Held-out rows of text, this rank's share of them, and the loss on all before the first step."""

    def __init__(self, config: UM3Config, *, ids: UnifiedVocabulary, text_tokenizer: "PreTrainedTokenizerBase"):
        """Raises:
        UserError: no text to measure on, or fewer rows than sources or processes.
        """
        self.config, self.settings = config, config.text_validation
        data, sources = config.data, config.text_validation.texts or config.data.texts
        least = max(len(sources), world_size())
        if not sources or self.settings.num_sequences < least:
            raise UserError(
                f"text_validation.num_sequences={self.settings.num_sequences} for {len(sources)} text sources and {world_size()} processes: give each "
                "a row; text_validation.texts or data.texts names the sources"
            )
        seq_len = data.text_seq_len or data.seq_len
        rows = []
        for number, source in enumerate(sources):
            rows += scattered_rows(
                open_text_source(source, split="val"),
                tokenizer=text_tokenizer,
                ids=ids,
                num_rows=len(range(number, self.settings.num_sequences, len(sources))),
                seq_len=seq_len,
                seed=config.loop.seed,
                cache=Path(config.loop.output_dir) / "cache",
                origin=origin(source, "val"),
            )
        laid = lay_out(rows[rank() :: world_size()], seq_len=seq_len, packed=False, pad_id=ids.pad_id)
        micro_rows, _ = split_batch(config.loop)
        self.micro_batches = list(
            micro_batches(
                laid.input_ids_BT,
                laid.target_mask_BT,
                parts=math.ceil(math.ceil(len(rows) / world_size()) / micro_rows),  # the same on every rank
                pad_id=ids.pad_id,
            )
        )
        self.start_loss: float | None = None

    def begin(self, engine: Any) -> None:
        """Measure the model that the run starts from, where that was not done before its interruption."""
        if self.start_loss is None:
            self.start_loss = self.loss(engine)

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step % self.settings.every_steps == 0 or step == self.config.loop.max_steps

    def check(self, engine: Any, *, step: int) -> dict[str, float]:
        """Measure after `step` steps; the loss, and what it is above the start's, as metrics."""
        assert self.start_loss is not None, "begin() measures it"
        loss = self.loss(engine)
        above = loss - self.start_loss
        limit = self.settings.alarm_above
        if limit is not None and above > limit and is_main():
            logger.warning(
                "after step %d held-out text costs %.3f nats per token, %.3f more than at the start "
                "(text_validation.alarm_above=%g): the model forgets; more text in data.mix or a lower optimizer.lr would help",
                *(step, loss, above, limit),
            )
        return {
            "text_validation/text_loss": loss,
            "text_validation/start": self.start_loss,
            "text_validation/above_start": above,
        }

    def wants_more_text(self, values: dict[str, float]) -> bool:
        """Whether what `check` measured asks for the mix of the start."""
        limit = self.settings.return_above
        return limit is not None and values["text_validation/above_start"] > limit

    @torch.no_grad()
    def loss(self, engine: Any) -> float:
        """Nats per token over the rows of all ranks, under the softmax of the text half (a collective call)."""
        sums_2 = torch.zeros(2, device=device())
        engine.eval()
        for input_ids_BT, target_mask_BT in self.micro_batches:
            with autocast(self.config.engine):
                found = engine(input_ids_BT.to(device()), target_mask_BT.to(device()), mode="split")
            sums_2 += torch.stack([found.text_sum, found.text_count])
        engine.train()
        total, count = sum_over_ranks(sums_2).tolist()
        return total / count
