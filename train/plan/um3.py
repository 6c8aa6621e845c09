"""The plan of UM3's training: its sequences, and their FLOPs."""

from typing import NamedTuple

from torch import Tensor, nn

from data_mix.batches.packing import lay_out
from data_mix.batches.schedule import Schedule
from train.plan.objective import build_objective
from train.plan.plan import CAPTION_TOKENS, Plan, sizes
from train.settings.um3 import UM3Config
from um3.model.sequences import TrainingSequence, image_to_text_sequence, text_sequence, text_to_image_sequence
from um3.model.vocabulary import UnifiedVocabulary


class UM3Plan(Plan):
    """The plan of a UM3 config."""

    def build(self) -> None:
        """Build the objective on the meta device, and typical samples of every task."""
        config = self.config
        self.objective, self.ids = build_objective(config)
        self.model = self.objective.model
        trained, frozen = map(sum, sizes(self.objective.parameters()))
        head, self.frozen_head = map(sum, sizes(self.model.lm_head.parameters()))
        self.head: int = head + self.frozen_head
        # A tied head is the embedding's own table.
        tables = {*self.model.get_input_embeddings().parameters(), *self.model.lm_head.parameters()}
        trained_tables, frozen_tables = map(sum, sizes(tables))
        self.frozen_matrices = frozen - frozen_tables
        self.matrices = trained - trained_tables + self.frozen_matrices
        self.samples = _task_samples(config, ids=self.ids)
        self.packed, self.longest = config.data.packing == "documents", max(sample.length for sample in self.samples)

    def traced(self) -> tuple[nn.Module, nn.Module]:
        """Another objective on the meta device, and its layers."""
        objective, _ = build_objective(self.config)
        return objective, objective.model.model

    def step_tokens(self) -> tuple[float, float]:
        """Tokens of a step's sequences with padding, and without."""
        batch = self.config.loop.batch_size
        unpadded = batch * sum(sample.share * sample.length for sample in self.samples)
        return unpadded if self.packed else batch * float(self.longest), unpadded

    def step_flops(self, *, checkpointing: bool) -> tuple[float, float]:
        """Model FLOPs of a step, and FLOPs of what is computed twice."""
        config, batch = self.model.config, self.config.loop.batch_size
        tokens, _ = self.step_tokens()
        padded_to = 0 if self.packed else self.longest
        pairs = batch * sum(sample.share * max(sample.length, padded_to) ** 2 for sample in self.samples)
        attention_width = config.num_attention_heads * config.head_dim
        body = 2.0 * self.matrices * tokens + 4.0 * config.num_hidden_layers * attention_width * pairs
        text_size, visual_size = self.ids.text_vocab_size, self.ids.visual_vocab_size
        if joint := self.config.loss.mode == "joint":
            text_size = visual_size = text_size + visual_size
        head = frozen_head = 0.0
        for share, sequence in self.samples:
            visual = int((sequence.targets & (sequence.input_ids >= self.ids.text_vocab_size)).sum())
            text = int(sequence.targets.sum()) - visual
            visual *= self.ids.subtokens_per_id
            head += 2.0 * batch * share * config.hidden_size * (text * text_size + visual * visual_size)
            frozen_head += 2.0 * batch * share * self.frozen_head * (text + visual if joint else text)
        frozen = 2.0 * self.frozen_matrices * tokens + frozen_head
        return 3 * (body + head) - frozen, head + (body if checkpointing else 0)

    def micro_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """(ids, target mask) of `size` samples of the mix; the most frequent task fills the remainder."""
        counts = [round(share * size) for share, _ in self.samples[1:]]
        counts = [size - sum(counts), *counts]
        sequences = [sequence for (_, sequence), count in zip(self.samples, counts, strict=True) for _ in range(count)]
        return lay_out(sequences, seq_len=self.config.data.seq_len, packed=self.packed, pad_id=self.ids.pad_id)


class TaskSample(NamedTuple):
    """A typical sample of a task, and the task's share of the batch after the calm-down."""

    share: float
    sequence: TrainingSequence

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.sequence.input_ids)


def _task_samples(config: UM3Config, *, ids: UnifiedVocabulary) -> list[TaskSample]:
    """The most frequent task first; text fills its sequence, captions have CAPTION_TOKENS."""
    data = config.data
    visual = [ids.text_vocab_size] * ids.image_tokens
    word = next(token for token in range(ids.text_vocab_size) if token not in (ids.bos_id, ids.pad_id))
    room = data.seq_len - ids.image_tokens - 4  # bos, begin and end of image, eos
    caption = [word] * max(1, min(CAPTION_TOKENS, room))
    text = [word] * ((data.text_seq_len or data.seq_len) - 2)
    make = {
        "text": lambda: text_sequence(text, ids=ids),
        "i2t": lambda: image_to_text_sequence(visual, caption, ids=ids, supervision=data.supervision),
        "t2i": lambda: text_to_image_sequence(caption, visual, ids=ids, supervision=data.supervision),
    }
    shares = Schedule(data.mix).proportions(data.mix.calm_down_steps)
    samples = [TaskSample(share, make[task]()) for task, share in shares.items() if share]
    return sorted(samples, key=lambda sample: -sample.share)
