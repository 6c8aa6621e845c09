"""UM3's rows: every global batch mixes text, image-to-text and text-to-image samples in the scheduled counts.

Which samples a step holds is a function of (seed, step), worked out for the global batch and cut into equal parts
for the ranks last; so the state to save is the step. Each rank then lays its samples into rows (`data_mix.batches.packing`),
padded to the longest of them.

A sample whose shard cannot be read is replaced by the next one of its source's order that can, for the same task and
at the same place: so the counts stay exact, on every rank and after every resume, and it is counted as replaced.

Shape legend: S = samples of this rank, B = its rows, T = ids of the longest of them (at most seq_len), N = patches
of an image, P = visual ids of an image, K = pairs of task and source, C = what is counted of them.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data_mix.batches.config import DataConfig
from data_mix.batches.packing import lay_out
from data_mix.batches.schedule import TASKS, Schedule, Task
from data_mix.batches.statistics import COUNTED
from data_mix.batches.token_stream import TokenStream
from data_mix.codes.shards import CodedSample, CodeShards, open_code_sources
from data_mix.order import SHARE_UNIT, ExactCounts, SampleOrder, fixed_shares, interleave, shared_rows
from data_mix.samples import BadSample, Split
from data_mix.sources.fingerprint import origin
from data_mix.sources.text import open_text_source
from um3.core.errors import UserError
from um3.core.seeds import derive_seed
from um3.model.sequences import Row, image_to_text_row, text_to_image_row, unconditional_row
from um3.model.text_tokenizer import encode_captions
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_MARKS = 4  # bos, begin and end of image, eos: what a row of an image and a caption holds besides the two


class PlannedSample(NamedTuple):
    """Sample `place` of a global batch: what is shown (the `draw`-th sample ever taken from `source`) and what for."""

    place: int
    task: Task
    source: str
    draw: int
    sample: int

    @property
    def key(self) -> str:
        """task/source"""
        return f"{self.task}/{self.source}"


class RowBatch(NamedTuple):
    """One rank's part of a global batch, padded on the right.

    target_mask_BT: true where the id is to be predicted. row_S, start_S and lengths_S: where each sample lies.
    task_S: 0 text, 1 image-to-text, 2 text-to-image. sources: where each sample comes from.
    counts: samples of the *global* batch by "task/source". seen_KC: what this rank's samples count for
    (`data_mix.batches.statistics`). truncated_captions: captions of this rank that were cut. shards_set_aside: shards and
    text files that this process could not read so far.
    """

    input_ids_BT: Tensor
    target_mask_BT: Tensor
    row_S: Tensor
    start_S: Tensor
    lengths_S: Tensor
    task_S: Tensor
    sources: list[str]
    counts: dict[str, int]
    seen_KC: Tensor
    truncated_captions: int
    shards_set_aside: int


class TaskSamples:
    """Which samples of which sources those of one task are, at every step."""

    def __init__(
        self,
        task: Task,
        sizes: Mapping[str, int],
        *,
        weights: Mapping[str, float],
        seed: int,
        schedule: Schedule,
        batch_size: int,
    ) -> None:
        unknown = sorted(weights.keys() - sizes.keys())
        if unknown:
            raise UserError(
                f"weights for {task} samples name '{unknown[0]}', which is no source; there are {sorted(sizes)}"
            )
        self.task, self.names = task, sorted(weights or sizes)
        self.shares = fixed_shares(
            [float((weights or sizes)[name]) for name in self.names], of=f"{task} sources {self.names}"
        )
        self.orders = {name: SampleOrder(sizes[name], seed=seed, name=f"{task}/{name}") for name in self.names}
        self.counts = ExactCounts(
            lambda step: self.shares, batch_size=lambda step: schedule.counts(step, batch_size=batch_size)[task]
        )

    def at(self, step: int) -> list[tuple[str, int]]:
        """(source, draw) of the task's samples at `step`, in the order they take in the batch."""
        draws = list(self.counts.before(step))
        samples = []
        for i in interleave(self.counts.at(step)):
            samples.append((self.names[i], draws[i]))
            draws[i] += 1
        return samples


class UM3Rows:
    """Batches of UM3's rows by step; every rank builds only its own part.

    `keys`: "task/source" of all that the mix draws from, in the order of `RowBatch.seen_KC`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        images: Mapping[str, CodeShards],
        texts: Mapping[str, TokenStream],
        ids: UnifiedVocabulary,
        text_tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`images` and `texts`: opened sources by name; `open_rows` opens those of a config.

        Raises:
            UserError: a task of the mix has no source, the codes are not those of `ids`, rows too short for an
                image, or a batch that does not divide among the ranks.
        """
        self.config, self.images, self.texts, self.ids = config, images, texts, ids
        self.text_tokenizer, self.batch_size, self.seed = text_tokenizer, batch_size, seed
        self.places = shared_rows(batch_size, rank=rank, world_size=world_size)
        self.schedule = Schedule(config.mix)
        for source in images.values():
            _check_codes(source, ids=ids)
        self.caption_room = config.seq_len - ids.image_tokens - ROW_MARKS
        if self.caption_room < 1 and images:
            raise UserError(
                f"data.seq_len={config.seq_len} cannot hold an image of {ids.image_tokens} tokens and a caption; "
                f"set it to {ids.image_tokens + ROW_MARKS + 1} or more"
            )
        self.tasks: dict[Task, TaskSamples] = {}
        for number, task in enumerate(TASKS):
            if not config.mix.start[number] and not config.mix.end[number]:
                continue
            sources: Mapping[str, CodeShards] | Mapping[str, TokenStream] = texts if task == "text" else images
            if not sources:
                raise UserError(
                    f"the mix has {task} samples, but there is no source for them; add one, or set its ratios to 0"
                )
            self.tasks[task] = TaskSamples(
                task,
                {name: len(source) for name, source in sources.items()},
                weights={source.name: source.weight for source in config.texts}
                if task == "text"
                else config.image_weights,
                seed=seed,
                schedule=self.schedule,
                batch_size=batch_size,
            )
        self.keys = [f"{task}/{name}" for task, samples in self.tasks.items() for name in samples.names]

    def plan(self, step: int) -> list[PlannedSample]:
        """The samples of the global batch of `step`, tasks evenly spread; the same on every rank."""
        counts = self.schedule.counts(step, batch_size=self.batch_size)
        waiting = {task: iter(samples.at(step)) for task, samples in self.tasks.items()}
        tasks = [TASKS[number] for number in interleave([counts[task] for task in TASKS])]
        plan = []
        for place, task in enumerate(tasks):
            source, draw = next(waiting[task])
            plan.append(PlannedSample(place, task, source, draw, self.tasks[task].orders[source].index(draw)))
        return plan

    def due(self, step: int) -> dict[str, float]:
        """Samples scheduled in all batches before `step`: by task, and by "task/source" the source's share of those
        that its task has had. What is had differs from either by less than one.
        """
        scheduled = self.schedule.due(step, batch_size=self.batch_size)
        due: dict[str, float] = {task: scheduled[task] for task in self.tasks}
        had = self.schedule.counts_before(step, batch_size=self.batch_size)
        for task, samples in self.tasks.items():
            for name, share in zip(samples.names, samples.shares, strict=True):
                due[f"{task}/{name}"] = had[task] * share / SHARE_UNIT
        return due

    def batch(self, step: int) -> RowBatch:
        """This rank's part of the batch of `step`.

        Raises:
            UserError: more than half of a source's shards cannot be read.
        """
        plan = self.plan(step)
        mine, captioned = [], {}
        for planned in (plan[place] for place in self.places):
            if planned.task != "text":
                planned, captioned[planned.place] = self._readable(planned)
            mine.append(planned)
        captions, truncated = self._captions(mine, captioned, step=step)
        samples = []
        for planned in mine:
            if planned.task == "text":
                samples.append(self.texts[planned.source][planned.sample])
            else:
                samples.append(self._image_row(planned.task, captioned[planned.place], captions[planned.place]))
        packed = self.config.packing == "documents"
        rows = lay_out(samples, seq_len=self.config.seq_len, packed=packed, pad_id=self.ids.pad_id)
        seen_KC = torch.zeros(len(self.keys), len(COUNTED), dtype=torch.int64)
        for planned, sample in zip(mine, samples, strict=True):
            num_visual = int((sample.input_ids >= self.ids.text_vocab_size).sum())
            replaced = planned.sample != plan[planned.place].sample
            counted = [1, len(sample.input_ids) - num_visual, num_visual, int(replaced)]
            seen_KC[self.keys.index(planned.key)] += torch.tensor(counted)
        return RowBatch(
            **rows._asdict(),
            task_S=torch.tensor([TASKS.index(planned.task) for planned in mine], dtype=torch.int8),
            sources=[planned.source for planned in mine],
            counts=dict(Counter(planned.key for planned in plan)),
            seen_KC=seen_KC,
            truncated_captions=truncated,
            shards_set_aside=sum(len(source.set_aside.reasons) for source in self.images.values())
            + sum(len(stream.set_aside) for stream in self.texts.values()),
        )

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` keeps: enough to see that a resumed run goes on with the same rows."""
        draws = {
            f"{task}/{name}": draw
            for task, samples in self.tasks.items()
            for name, draw in zip(samples.names, samples.counts.before(step), strict=True)
        }
        sizes = {
            f"{task}/{name}": order.length
            for task, samples in self.tasks.items()
            for name, order in samples.orders.items()
        }
        state = {"seed": self.seed, "step": step, "batch_size": self.batch_size, "draws": draws, "sizes": sizes}
        return state | {"calm_down_restarts": list(self.schedule.restarts)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Take over the schedule's restarts from a checkpoint's `state`, and compare it with what this config gives at
        its step. Call before any batch is made.

        Raises:
            UserError: they differ, so the rows of a resumed run would not be those of an undisturbed one.
        """
        self.schedule.restarts[:] = state.get("calm_down_restarts", [])
        ours = self.state(int(state["step"]))
        for key in ("seed", "batch_size", "sizes", "draws"):
            if state.get(key) != ours[key]:
                raise UserError(
                    f"the checkpoint of step {state['step']} was trained on other data: {key} {state.get(key)}, now "
                    f"{ours[key]}; resume with the config it began with, or start a new run folder"
                )

    def _readable(self, planned: PlannedSample) -> tuple[PlannedSample, CodedSample]:
        """The planned sample, or the one to take instead where its shard is set aside."""
        source = self.images[planned.source]
        for sample in self.tasks[planned.task].orders[planned.source].substitutes(planned.draw):
            with contextlib.suppress(BadSample):
                return planned._replace(sample=sample), source[sample]
        raise AssertionError("half of a source's shards can be read, or reading raises UserError")

    def _captions(
        self, mine: Sequence[PlannedSample], samples: Mapping[int, CodedSample], *, step: int
    ) -> tuple[dict[int, list[int] | None], int]:
        """Token ids of the caption of each image sample by place, None where it is dropped, and how many were cut."""
        chosen: dict[int, str] = {}
        for row in mine:
            if row.task == "text" or (row.task == "t2i" and self._drops(step, row.place)):
                continue
            texts = samples[row.place].captions
            first = row.task == "i2t" and self.config.i2t_caption == "first"
            chosen[row.place] = texts[0 if first else derive_seed(self.seed, "caption", step, row.place) % len(texts)]
        encoded = encode_captions(list(chosen.values()), tokenizer=self.text_tokenizer)
        truncated = sum(len(tokens) > self.caption_room for tokens in encoded)
        captions: dict[int, list[int] | None] = dict.fromkeys(samples)
        captions.update(zip(chosen, (tokens[: self.caption_room] for tokens in encoded), strict=True))
        return captions, truncated

    def _drops(self, step: int, place: int) -> bool:
        return derive_seed(self.seed, "caption_dropout", step, place) < self.config.caption_dropout * 2**63

    def _image_row(self, task: Task, sample: CodedSample, caption: list[int] | None) -> Row:
        visual_P = self.ids.codes_to_ids(sample.codes_N)
        if caption is None:
            return unconditional_row(visual_P, ids=self.ids, supervision=self.config.supervision)
        if task == "i2t":
            return image_to_text_row(visual_P, caption, ids=self.ids, supervision=self.config.supervision)
        return text_to_image_row(caption, visual_P, ids=self.ids, supervision=self.config.supervision)


def open_rows(
    config: DataConfig,
    *,
    ids: UnifiedVocabulary,
    text_tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    seed: int,
    cache: str | Path,
    fingerprint: str | None = None,
    split: Split = "train",
    rank: int = 0,
    world_size: int = 1,
) -> UM3Rows:
    """Open the sources of `config` that its mix needs, and the rows over them.

    Args:
        cache: folder for the tokenised text, seen by every rank.
        fingerprint: of the visual tokenizer the model is tied to; codes of another are refused.

    Raises:
        UserError: the sources cannot be opened, or what `UM3Rows` refuses.
    """
    needed = {task for i, task in enumerate(TASKS) if config.mix.start[i] or config.mix.end[i]}
    images, texts = {}, {}
    if needed - {"text"}:
        images = open_code_sources(config.codes, split=split, expected_fingerprint=fingerprint)
    for source_config in config.texts if "text" in needed else []:
        documents = open_text_source(source_config, split=split)
        if documents.name in texts:
            raise UserError(f"two text sources are called '{documents.name}'; give each a name of its own")
        texts[documents.name] = TokenStream(
            documents,
            tokenizer=text_tokenizer,
            ids=ids,
            seq_len=config.text_seq_len or config.seq_len,
            cache=cache,
            origin=origin(source_config, split),
        )
    return UM3Rows(
        config,
        images=images,
        texts=texts,
        ids=ids,
        text_tokenizer=text_tokenizer,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def _check_codes(source: CodeShards, *, ids: UnifiedVocabulary) -> None:
    if (source.bits, source.num_patches) != (ids.num_bits, ids.num_patches):
        raise UserError(
            f"codes of '{source.name}' are {source.num_patches} a picture of {source.bits} bits; the model takes "
            f"{ids.num_patches} of {ids.subtokens} x {ids.bits_per_subtoken} bits: set vocabulary.subtokens and vocabulary.bits_per_subtoken to "
            "make up the codes' bits"
        )
