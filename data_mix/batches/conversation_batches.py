"""Batches that train LLaVA: a batch holds conversations about images, or conversations without one.

    step  --exact counts-->  modality, and the number of the batch among those of its modality
          --window of WINDOW_BATCHES batches: draws of the sources, sorted by length-->  conversations of equal length
          --template, image processor-->  ids, mask and pixels of this rank's share

A batch is a function of (seed, step), and the same for any number of ranks.

Shape legend: B = sequences of this rank, T = tokens of the longest of them, C, H, W = channels and sides of an image.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_mix.conversations import MAX_UNUSABLE, Conversation, ConversationSource
from data_mix.order import SampleOrder, fixed_counts, rank_positions
from data_mix.samples import BadSample
from data_mix.sources.bad_files import BadFiles
from downstream.llava.template import LlavaSequence, Template
from um3.core.distributed import make_once
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash
from um3.core.progress import Progress
from um3.core.seeds import numpy_generator

SIGNS = {"image": 1, "text": -1}
"""The modalities, and the sign of the words of their conversations (`count_words`)."""
WINDOW_BATCHES = 8
"""Within so many batches of a modality, conversations are sorted by length."""
MAX_SIDE, MAX_RATIO = 4096, 50
"""A larger image is scaled down to this side before it is padded; a narrower one than 1 : 50 is not used."""
NO_ANSWER = "no answer within the window"

Pixels = Callable[[Image.Image], Tensor]
"""An RGB image -> normalised pixels (C, H, W)."""


class ConversationBatch(NamedTuple):
    """One rank's part of a global batch, padded on the right.

    input_ids_BT, target_mask_BT: as `LlavaSequence`. pixels_BCHW: None for conversations without images. keys: of the
    conversations. skipped: unusable ones that were replaced, by reason. num_tokens: without padding.
    """

    input_ids_BT: Tensor
    target_mask_BT: Tensor
    pixels_BCHW: Tensor | None
    keys: list[str]
    skipped: Counter[str]
    num_tokens: int


class Pool:
    """The usable conversations of one modality of a source, in their order."""

    def __init__(self, source: ConversationSource, *, indices: np.ndarray, words: np.ndarray, order: SampleOrder):
        """indices, words: of its conversations. order: theirs."""
        self.source, self.indices, self.words, self.order = source, indices, words, order

    def length(self, draw: int) -> int:
        """Words of the conversation of a draw."""
        return int(self.words[self.order.index(draw)])


class ConversationBatches:
    """Global batches of `batch_size` conversations; the share of a source is its weight, that of a modality within it
    is that of its conversations."""

    def __init__(
        self,
        sources: dict[str, ConversationSource],
        *,
        weights: Sequence[float],
        template: Template,
        pixels: Pixels,
        batch_size: int,
        seed: int,
        cache: Path,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """cache: folder for the lengths of the conversations. UserError: more than 1 % of a source's conversations
        cannot be used, or the batch does not divide among the ranks."""
        self.sources, self.template, self.pixels = sources, template, pixels
        self.batch_size, self.seed = batch_size, seed
        mine = rank_positions(batch_size, rank=rank, world_size=world_size)
        self.positions = range(rank, len(mine) * world_size, world_size)
        self.pools: dict[str, list[Pool]] = {kind: [] for kind in SIGNS}
        shares: dict[str, list[float]] = {kind: [] for kind in SIGNS}
        for (name, source), weight in zip(sources.items(), weights, strict=True):
            words = count_words(name, source, cache=cache)
            for kind, sign in SIGNS.items():
                if len(indices := np.flatnonzero(sign * words > 0)):
                    order = SampleOrder(len(indices), seed=seed, name=f"{name}/{kind}")
                    self.pools[kind].append(Pool(source, indices=indices, words=sign * words[indices], order=order))
                    shares[kind].append(weight * len(indices) / int(np.count_nonzero(words)))
        of_modalities = [sum(shares[kind]) for kind in SIGNS]
        self.batches = fixed_counts(of_modalities, batch_size=1, of=f"conversations {[*sources]}")
        self.counts = {kind: fixed_counts(share, batch_size=batch_size) for kind, share in shares.items() if sum(share)}
        self._window = functools.lru_cache(maxsize=4)(self._draw_window)

    def modality(self, step: int) -> tuple[str, int]:
        """The modality of the batch of `step`, and how many of that modality came before."""
        number = self.batches.at(step).index(1)
        return list(SIGNS)[number], self.batches.before(step)[number]

    def batch(self, step: int) -> ConversationBatch:
        """This rank's part of the batch of `step`; UserError if no conversation of a source can be used."""
        modality, number = self.modality(step)
        plan = self._window(modality, number // WINDOW_BATCHES)[number % WINDOW_BATCHES]
        skipped: Counter[str] = Counter()
        has_image = modality == "image"
        rows = [self._read(*plan[position], has_image=has_image, skipped=skipped) for position in self.positions]
        sequences, pixels, keys = zip(*rows, strict=True)
        return ConversationBatch(
            pad_sequence(
                [sequence.input_ids_T for sequence in sequences],
                batch_first=True,
                padding_value=self.template.tokenizer.pad_token_id,
            ),
            pad_sequence([sequence.target_mask_T for sequence in sequences], batch_first=True),
            torch.stack(pixels) if has_image else None,
            list(keys),
            skipped,
            sum(len(sequence.input_ids_T) for sequence in sequences),
        )

    def fingerprints(self) -> dict[str, str]:
        """Hash of what each source's conversations depend on, to verify a resumed run."""
        return {f"conversations/{name}": source.fingerprint() for name, source in self.sources.items()}

    def _draw_window(self, modality: str, window: int) -> list[list[tuple[Pool, int]]]:
        """(pool, draw) of every conversation of the batches of a window."""
        numbers = range(window * WINDOW_BATCHES, (window + 1) * WINDOW_BATCHES)
        draws = [
            (self.pools[modality][i], draw) for number in numbers for i, draw in self.counts[modality].draws(number)
        ]
        draws.sort(key=lambda place: -place[0].length(place[1]))
        order = numpy_generator(self.seed, "window", modality, window).permutation(WINDOW_BATCHES)
        return [draws[i * self.batch_size : (i + 1) * self.batch_size] for i in order]

    def _read(
        self, pool: Pool, draw: int, *, has_image: bool, skipped: Counter[str]
    ) -> tuple[LlavaSequence, Tensor | None, str]:
        """Sequence, pixels and key of a draw; an unusable conversation is replaced by the next of the epoch."""

        def read(place: int) -> tuple[LlavaSequence, Tensor | None, str]:
            conversation = pool.source[int(pool.indices[place])]
            sequence = self.template(conversation.turns, has_image=has_image)
            if not sequence.target_mask_T[1:].any():
                raise BadSample(NO_ANSWER, detail=f"{conversation.key}: {self.template.max_tokens} tokens")
            return sequence, self._image(pool.source, conversation) if has_image else None, conversation.key

        row, reasons = pool.order.first_usable(draw, read, what="conversation")
        skipped.update(reasons)
        return row

    def _image(self, source: ConversationSource, conversation: Conversation) -> Tensor:
        image = Image.fromarray(source.read_image(conversation))
        if max(image.size) > MAX_RATIO * min(image.size):
            raise BadSample("too narrow an image", detail=f"{conversation.image}: {image.width} x {image.height}")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
        return self.pixels(image)


def count_words(name: str, source: ConversationSource, *, cache: Path) -> np.ndarray:
    """Words of every conversation (int32), negative for those without an image, 0 for unusable ones.

    The first rank counts once a run and keeps the file (a collective call). UserError if over 1 % are unusable.
    """
    path = cache / f"words-{short_hash(name, source.fingerprint())}.npy"

    def make() -> None:
        words, problems = np.zeros(len(source), np.int32), BadFiles(name)
        progress = Progress(len(source), label=f"conversations of {name}", unit="conversations")
        for index in range(len(source)):
            try:
                conversation = source[index]
            except BadSample as error:
                problems.count(error.reason, str(error))
                continue
            count = max(sum(len(text.split()) for turn in conversation.turns for text in turn), 1)
            words[index] = -count if conversation.image is None else count
            progress.advance()
        unusable = int((words == 0).sum())
        if unusable > MAX_UNUSABLE * len(words):
            problem = f"{unusable:,} of {len(words):,} conversations cannot be used ({problems.summary()})"
            raise UserError(f"source '{name}': {problem}; correct its file")
        problems.report(len(words) - unusable)
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.save(file, words, allow_pickle=False)

    counted: Any = np.load(make_once(path, make), allow_pickle=False)
    return np.asarray(counted)
