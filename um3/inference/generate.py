"""Sampling of images and text; every sample is legal by construction.

An image position computes only the head rows of its sub-token's range and a text position only the text rows, so no
logits have to be masked and no result repaired. Guidance adds an unconditional sequence per sample to the batch. Every
sample has random numbers of its own, so it does not depend on its batch (see `um3.inference.decoder` on rounding).

Shapes: B samples, P positions to sample, R sequences (twice B under guidance), D width, V entries of one range.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from um3.core.errors import UserError
from um3.inference.cuda_graphs import CudaGraphs
from um3.inference.decoder import DecodingBatch, DepthDecoder, FastDecoder, check_room, whole_windows
from um3.inference.sampling_params import Sampling
from um3.model.visual_parts import DepthHead
from um3.model.vocabulary import UnifiedVocabulary

LOGITS = "the model's logits"
FREE = -1
"""In `kept_BP`: this position is sampled."""


class SampledImages(NamedTuple):
    """`visual_ids` (B, P) int64; `logprobs` (B,): the conditional model's log-probability of each image in nats, every
    position normalised within its sub-token, before guidance, temperature and filters."""

    visual_ids: Tensor
    logprobs: Tensor


class SampledTexts(NamedTuple):
    """New tokens of every text without the one that ended it; `ends` is that token, None where there was no room.

    `logprobs`: the model's log-probability of the tokens and the end in nats, among all text entries.
    """

    token_ids: list[list[int]]
    ends: list[int | None]
    logprobs: list[float]


class Sampler:
    """Samples from one model. Builds the decoder, and per batch shape the cache and CUDA graphs, once for all calls.

    The last image batch and the last text batch are kept, so batches of one size reuse them. One call runs at a time.
    """

    def __init__(self, model: PreTrainedModel, *, ids: UnifiedVocabulary, depth: DepthHead | None = None):
        depth = None if depth is None else depth.to(model.device, model.dtype)
        self.decoder, self.ids = FastDecoder(model, depth=depth), ids
        self._lock = Lock()
        self._batches: dict[type, tuple[Any, Any]] = {}

    @torch.inference_mode()
    def images(
        self,
        *,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        uniforms_BP: Tensor,
        unconditional_prompt: Tensor | None = None,
        kept_BP: Tensor | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> SampledImages:
        """Sample one image after each prompt (`um3.model.sequences.image_prompt`), one sub-token at a time.

        `uniforms_BP` are numbers in [0, 1), one a sub-token, the only source of randomness. `kept_BP` gives visual ids
        to keep, and FREE where to sample; kept ids count in `logprobs`. `watch` receives the ids so far (positions, B)
        after every id. Guidance needs `unconditional_prompt`.
        """
        per_id = self.ids.subtokens_per_id
        sequences = [*prompts, *[cast(Tensor, unconditional_prompt)] * len(prompts)] if sampling.guided else prompts
        with self._lock:
            num_new = uniforms_BP.shape[1] // per_id
            options = {"sampling": sampling, "keeps": kept_BP is not None}
            batch = self._batch(_ImageBatch, sequences, uniforms_BP, num_new=num_new, **options)
            if kept_BP is not None:
                batch.kept_PB.copy_(self.ids.ids_to_rows(kept_BP).flatten(1).T)
            batch.begin(sequences, uniforms_BP)
            check_finite(batch.highest_B, what=LOGITS)  # before the work
            for position in range(1, self.ids.image_subtokens):
                batch.graphs(batch.advance, batch.sequences.window(position // per_id), position % self.ids.subtokens)
                if watch is not None and (position + 1) % per_id == 0:
                    watch(self._visual_ids(batch, position + 1).T)
            check_finite(batch.highest_B, what=LOGITS)
            return SampledImages(self._visual_ids(batch).clone(), logprobs=batch.logprobs_B.clone())

    @torch.inference_mode()
    def texts(
        self,
        *,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        uniforms_BP: Tensor,
        may_begin_image: bool = False,
    ) -> SampledTexts:
        """Continue each prompt with text until end of text, or for as many tokens as `uniforms_BP` has columns.

        Begin of text, padding and image tokens are never sampled. With `may_begin_image` begin of image can be sampled,
        and ends the text like end of text.
        """
        with self._lock:
            options = {"sampling": sampling, "may_begin_image": may_begin_image}
            batch = self._batch(_TextBatch, prompts, uniforms_BP, num_new=uniforms_BP.shape[1], **options)
            batch.begin(prompts, uniforms_BP)
            for position in range(1, uniforms_BP.shape[1]):
                if batch.finished_B.all():
                    break
                batch.graphs(batch.advance, batch.sequences.window(position), 0)
            check_finite(batch.highest_B, what=LOGITS)
            texts = batch.ids_PB[: int(batch.position_1)].T.tolist()
            logprobs = batch.logprobs_B.tolist()
        ends = set(batch.ends.tolist())
        lengths = [next((place for place, token in enumerate(text) if token in ends), len(text)) for text in texts]
        return SampledTexts(
            token_ids=[text[:length] for text, length in zip(texts, lengths, strict=True)],
            ends=[text[length] if length < len(text) else None for text, length in zip(texts, lengths, strict=True)],
            logprobs=logprobs,
        )

    @torch.inference_mode()
    def image_logprob(self, prompt: Tensor, *, visual_ids: Tensor) -> float:
        """Log-probability in nats of an image after a prompt, as in `SampledImages`."""
        subtokens, decoder = self.ids.subtokens, self.decoder
        hidden_PD = decoder.prefill(torch.cat([prompt, visual_ids]))[len(prompt) - 1 : -1]
        if decoder.depth is not None:
            visual_ids = visual_ids.to(decoder.device)
            hidden_PD = decoder.depth(hidden_PD, decoder.depth.embed(visual_ids, table=decoder.table)).flatten(0, 1)
        rows_P, total = self.ids.ids_to_rows(visual_ids).flatten(), 0.0
        for subtoken in range(subtokens):
            hidden_ND, ids_N = hidden_PD[subtoken::subtokens].contiguous(), rows_P[subtoken::subtokens]
            total += self._logprob(hidden_ND, ids_N, entries=self.ids.subtoken_range(subtoken))
        return total

    @torch.inference_mode()
    def text_logprob(self, prompt: Tensor, *, token_ids: Tensor, ends: bool = True) -> float:
        """Log-probability in nats of a text after a prompt, among all text entries, and of its end if it `ends`."""
        targets_P = torch.cat([token_ids, torch.tensor([self.ids.eos_id])]) if ends else token_ids
        hidden_PD = self.decoder.prefill(torch.cat([prompt, token_ids]))[len(prompt) - 1 :][: len(targets_P)]
        return self._logprob(hidden_PD, targets_P, entries=(0, self.ids.text_vocab_size))

    def _logprob(self, hidden_ND: Tensor, ids_N: Tensor, *, entries: tuple[int, int]) -> float:
        """Log-probability in nats of ids after hidden states, among a range of entries."""
        logits_NV = self.decoder.head(*entries, packed=False)(hidden_ND).float()
        total = _logprob(logits_NV, ids_N.to(logits_NV.device) - entries[0]).sum()
        check_finite(total, what=LOGITS)
        return float(total)

    def _visual_ids(self, batch: "_ImageBatch", num_sampled: int | None = None) -> Tensor:
        """Visual ids (B, P) of the sub-tokens sampled so far."""
        return self.ids.rows_to_ids(batch.ids_PB[:num_sampled].T.unflatten(-1, (-1, self.ids.subtokens_per_id)))

    def _batch(
        self, kind: "type[BatchT]", prompts: Sequence[Tensor], uniforms_BP: Tensor, *, num_new: int, **options: Any
    ) -> "BatchT":
        """The last batch of this kind if its shape and options are the same, else a new one in its place."""
        check_room(prompts, num_new=num_new, limit=self.decoder.config.max_position_embeddings)
        capacity = whole_windows(max(len(prompt) for prompt in prompts) + num_new)
        key = (len(prompts), capacity, uniforms_BP.shape, options)
        if kind not in self._batches or self._batches[kind][0] != key:
            self._batches.pop(kind, None)  # free its cache before the next one is reserved
            sequences = DecodingBatch(self.decoder, num_sequences=len(prompts), capacity=capacity)
            self._batches[kind] = key, kind(sequences, ids=self.ids, shape_BP=uniforms_BP.shape, **options)
        return cast(BatchT, self._batches[kind][1])


class _Batch:
    """Samples in progress. Their state is in tensors that keep their place in memory: a graph can record `advance`."""

    def __init__(self, sequences: DecodingBatch, *, ids: UnifiedVocabulary, sampling: Sampling, shape_BP: torch.Size):
        device = sequences.decoder.device
        self.sequences, self.ids, self.sampling = sequences, ids, sampling
        self.graphs = CudaGraphs(device=device)
        self.uniforms_PB = torch.zeros(shape_BP[::-1], dtype=widest_float(device), device=device)
        self.ids_PB = torch.zeros_like(self.uniforms_PB, dtype=torch.int64)
        self.logprobs_B, self.highest_B = torch.zeros(2, shape_BP[0], device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished_B = torch.zeros(shape_BP[0], dtype=torch.bool, device=device)

    def begin(self, prompts: Sequence[Tensor], uniforms_BP: Tensor) -> None:
        """Start over with these prompts and sample the first position."""
        self.uniforms_PB.copy_(uniforms_BP.T.to(self.uniforms_PB.dtype))
        for state in (self.ids_PB, self.logprobs_B, self.position_1, self.finished_B, self.highest_B):
            state.zero_()
        self.sample(self.sequences.start(prompts), 0)

    def advance(self, window: int, subtoken: int) -> None:
        """Append the last sampled ids, under guidance to both halves of the batch, and sample the next ones."""
        self.sample(self.sequences.step(self.for_sequences(self.last_ids()), window=window), subtoken)

    def last_ids(self) -> Tensor:
        """The last sampled ids."""
        return self.ids_PB[self.position_1 - 1][0]

    def for_sequences(self, ids_B: Tensor) -> Tensor:
        """Ids (R,): those of both halves of the batch under guidance."""
        return ids_B.repeat(len(self.sequences.lengths_R) // len(ids_B))

    def sample(self, hidden_RD: Tensor, subtoken: int) -> None:
        """Choose the next id of every sample from hidden states."""
        raise NotImplementedError

    def choose(self, logits_BV: Tensor) -> Tensor:
        self.highest_B += logits_BV.amax(-1)  # not finite once a logit was NaN, or none of a position finite
        return choose(logits_BV, sampling=self.sampling, uniforms_B=self.uniforms_PB[self.position_1][0])

    def append(self, ids_B: Tensor, *, logprobs_B: Tensor) -> None:
        self.ids_PB[self.position_1] = ids_B
        self.logprobs_B += logprobs_B
        self.position_1 += 1


BatchT = TypeVar("BatchT", bound=_Batch)


class _ImageBatch(_Batch):
    """`ids_PB` are visual entries, one a sub-token, also where a patch is one id of the sequence."""

    def __init__(self, sequences: DecodingBatch, *, keeps: bool, **options: Any):
        super().__init__(sequences, **options)
        ranges = [self.ids.subtoken_range(subtoken) for subtoken in range(self.ids.subtokens)]
        self.starts = [start for start, _ in ranges]
        self.heads = [sequences.decoder.head(start, end) for start, end in ranges]
        self.scales_P = torch.tensor(self.sampling.scales(len(self.ids_PB)), device=self.ids_PB.device)
        self.kept_PB, self.keeps = torch.full_like(self.ids_PB, FREE), keeps
        decoder = sequences.decoder
        self.depth = DepthDecoder(decoder, num_sequences=len(sequences.lengths_R)) if decoder.depth else None

    def advance(self, window: int, subtoken: int) -> None:
        if self.depth is None or subtoken == 0:
            super().advance(window, subtoken)
        else:  # within a patch
            self.sample(self.sequences.decoder.table(self.for_sequences(super().last_ids())), subtoken)

    def last_ids(self) -> Tensor:
        """The last visual ids of the sequences."""
        places_S = self.position_1 + torch.arange(-self.ids.subtokens_per_id, 0, device=self.ids_PB.device)
        return self.ids.rows_to_ids(self.ids_PB[places_S].T)

    def sample(self, hidden_RD: Tensor, subtoken: int) -> None:
        if self.depth is not None:
            hidden_RD = self.depth.step(hidden_RD, subtoken=subtoken)
        logits_BV = conditional_BV = self.heads[subtoken](hidden_RD).float()
        if self.sampling.guided:
            conditional_BV, unconditional_BV = logits_BV.chunk(2)
            scale_1 = self.scales_P[self.position_1]
            logits_BV = unconditional_BV + scale_1 * (conditional_BV - unconditional_BV)
        choice_B = self.choose(logits_BV)
        if self.keeps:
            kept_B = self.kept_PB[self.position_1][0]
            choice_B = torch.where(kept_B == FREE, choice_B, kept_B - self.starts[subtoken])
        self.append(choice_B + self.starts[subtoken], logprobs_B=_logprob(conditional_BV, choice_B))


class _TextBatch(_Batch):
    def __init__(self, sequences: DecodingBatch, *, may_begin_image: bool, **options: Any):
        super().__init__(sequences, **options)
        ids = self.ids
        ends = {ids.eos_id, *([ids.begin_of_image_id] if may_begin_image else [])}
        self.head = sequences.decoder.head(0, ids.text_vocab_size, packed=False)
        self.bias_V = torch.zeros(ids.text_vocab_size, device=self.ids_PB.device)
        self.bias_V[sorted(ids.special_ids - ends)] = float("-inf")
        self.ends = torch.tensor(sorted(ends), device=self.ids_PB.device)

    def sample(self, hidden_RD: Tensor, subtoken: int) -> None:
        logits_BV = self.head(hidden_RD).float()
        # A finished text is sampled further with the others; the tokens after its end are dropped.
        choice_B = self.choose(logits_BV + self.bias_V)
        self.append(choice_B, logprobs_B=_logprob(logits_BV, choice_B).masked_fill(self.finished_B, 0.0))
        self.finished_B |= (choice_B.unsqueeze(-1) == self.ends).any(-1)


def choose(logits_BV: Tensor, *, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """Sample an index (B,) from each row of float32 logits by inverting its distribution at `uniforms_B`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # Relative to the highest logit, so that no temperature, however low, gives inf - inf.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).to(widest_float(logits_BV.device)) / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, float("-inf"))
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        # Sorting only finds the threshold; sampling keeps the order of ids, where a near-tie cannot swap two entries.
        sorted_BV = _sort_descending(probabilities_BV)
        kept_BV = sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
        lowest_B1 = sorted_BV.masked_fill(~kept_BV, 2.0).amin(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < lowest_B1, 0.0)
    if sampling.min_p > 0:
        lowest_B1 = sampling.min_p * probabilities_BV.amax(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < lowest_B1, 0.0)
    cumulative_BV = probabilities_BV.cumsum(-1)
    level_B1 = uniforms_B.to(cumulative_BV.dtype).unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, level_B1, right=True).squeeze(-1).clamp_(max=logits_BV.shape[-1] - 1)


def widest_float(device: torch.device) -> torch.dtype:
    """The type in which distributions are summed: float64, which Apple's MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_finite(values: Tensor, *, what: str) -> None:
    """Raise UserError unless all values are finite; `what` names them."""
    if not values.isfinite().all():
        raise UserError(f"{what} are not finite numbers: the weights are damaged; copy or train the model again")


def uniforms(seeds: Sequence[int], *, count: int) -> Tensor:
    """Uniform numbers (B, count) in float64, each row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def _sort_descending(values_BV: Tensor) -> Tensor:
    if values_BV.device.type == "cpu":  # numpy sorts with AVX-512, eight times as fast
        return torch.from_numpy(np.sort(values_BV.numpy(), axis=-1)).flip(-1)
    return values_BV.sort(dim=-1, descending=True).values


def _logprob(logits_BV: Tensor, choice_B: Tensor) -> Tensor:
    return logits_BV.log_softmax(-1).gather(-1, choice_B.unsqueeze(-1)).squeeze(-1)
