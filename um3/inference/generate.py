"""Drawing images and text from UM3, legal by construction.

An image position computes only the head rows of its subtoken's range, text positions only the text rows, so nothing
has to be masked or repaired afterwards. Guidance is a second half of the batch. Every sample uses random numbers of
its own, so what comes out does not depend on what else is in the batch (see `um3.inference.decoder` on rounding).

Shapes: B samples, P positions to draw, R rows (twice B under guidance), D width, V entries of one range.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from um3.inference.cuda_graphs import Replayed
from um3.inference.decoder import Body, Decoder
from um3.inference.sampling_params import Sampling, choose
from um3.model.vocabulary import UnifiedVocabulary

FREE = -1
"""In `kept_BP`: this position is to be drawn."""


class DrawnImages(NamedTuple):
    """`visual_ids` (B, P) int64; `logprobs` (B,): the conditional model's own log-probability of each image in nats,
    every position normalised within its subtoken, before guidance, temperature and cuts."""

    visual_ids: Tensor
    logprobs: Tensor


class WrittenTexts(NamedTuple):
    """New ids of every row without the one that ended it; `ends` is that id, None where there was no more room.

    `logprobs`: the model's own log-probability of the ids and the end in nats, among all text entries.
    """

    token_ids: list[list[int]]
    ends: list[int | None]
    logprobs: list[float]


@torch.inference_mode()
def draw_images(
    model: PreTrainedModel,
    *,
    prompts: Sequence[Tensor],
    unconditional_prompt: Tensor,
    ids: UnifiedVocabulary,
    sampling: Sampling,
    uniforms_BP: Tensor,
    kept_BP: Tensor | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> DrawnImages:
    """Draw one image after each prompt (`um3.model.sequences.image_prompt`), one position at a time.

    `uniforms_BP` are numbers in [0, 1), one per position: all the randomness there is. `kept_BP` gives visual ids
    that are not drawn, and FREE elsewhere; they count in `logprobs`. `watch` is shown the ids so far (positions, B)
    after every position.
    """
    rows = [*prompts, *[unconditional_prompt] * len(prompts)] if sampling.guided else list(prompts)
    body = Body(model)
    decoder = Decoder(body, prompts=rows, num_new=ids.image_tokens)
    images = _Images(decoder, ids=ids, sampling=sampling, uniforms_BP=uniforms_BP, kept_BP=kept_BP)
    images.draw(decoder.prefill(), 0)
    advance = Replayed(images.advance, device=body.device)
    for position in range(1, ids.image_tokens):
        advance(decoder.window(position), position % ids.subtokens)
        if watch is not None:
            watch(images.ids_PB[: position + 1])
    return DrawnImages(visual_ids=images.ids_PB.T.contiguous(), logprobs=images.logprobs_B)


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    *,
    prompts: Sequence[Tensor],
    ids: UnifiedVocabulary,
    sampling: Sampling,
    uniforms_BP: Tensor,
    may_begin_image: bool = False,
) -> WrittenTexts:
    """Continue each prompt with text entries until end of text or as many ids as `uniforms_BP` has columns.

    Begin of text, padding and the image marks cannot come out; with `may_begin_image` begin of image can, and ends
    the text like its own end.
    """
    body = Body(model)
    num_new = uniforms_BP.shape[1]
    decoder = Decoder(body, prompts=prompts, num_new=num_new)
    ends = {ids.eos_id, *([ids.begin_of_image_id] if may_begin_image else [])}
    texts = _Texts(decoder, ids=ids, sampling=sampling, uniforms_BP=uniforms_BP, ends=ends)
    texts.draw(decoder.prefill(), 0)
    advance = Replayed(texts.advance, device=body.device)
    for position in range(1, num_new):
        if texts.finished_B.all():
            break
        advance(decoder.window(position), 0)
    written = texts.ids_PB[: int(texts.position_1)].T.tolist()
    lengths = [next((place for place, each in enumerate(row) if each in ends), len(row)) for row in written]
    return WrittenTexts(
        token_ids=[row[:length] for row, length in zip(written, lengths, strict=True)],
        ends=[row[length] if length < len(row) else None for row, length in zip(written, lengths, strict=True)],
        logprobs=texts.logprobs_B.tolist(),
    )


class _Samples:
    """What is drawn so far. All of it tensors that stay in place, so that `advance` can be recorded."""

    def __init__(self, decoder: Decoder, *, sampling: Sampling, uniforms_BP: Tensor):
        device = decoder.body.device
        self.decoder, self.sampling = decoder, sampling
        self.uniforms_PB = uniforms_BP.T.contiguous().to(device)
        self.ids_PB = torch.zeros(self.uniforms_PB.shape, dtype=torch.int64, device=device)
        self.logprobs_B = torch.zeros(len(uniforms_BP), device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def advance(self, window: int, subtoken: int) -> None:
        """Append what was drawn last, under guidance to both halves, and draw the next."""
        last_B = self.ids_PB[self.position_1 - 1][0]
        copies = len(self.decoder.prompts) // len(last_B)
        self.draw(self.decoder.step(last_B.repeat(copies), window=window), subtoken)

    def draw(self, hidden_RD: Tensor, subtoken: int) -> None:
        """Choose the next id of every sample given hidden states."""
        raise NotImplementedError

    def choose(self, logits_BV: Tensor) -> Tensor:
        return choose(logits_BV, sampling=self.sampling, uniforms_B=self.uniforms_PB[self.position_1][0])

    def append(self, ids_B: Tensor, *, logprobs_B: Tensor) -> None:
        self.ids_PB[self.position_1] = ids_B
        self.logprobs_B += logprobs_B
        self.position_1 += 1


class _Images(_Samples):
    def __init__(
        self,
        decoder: Decoder,
        *,
        ids: UnifiedVocabulary,
        sampling: Sampling,
        uniforms_BP: Tensor,
        kept_BP: Tensor | None,
    ):
        super().__init__(decoder, sampling=sampling, uniforms_BP=uniforms_BP)
        ranges = [ids.subtoken_range(subtoken) for subtoken in range(ids.subtokens)]
        self.starts = [start for start, _ in ranges]
        self.heads = [decoder.body.head(slice(start, end)) for start, end in ranges]
        device = decoder.body.device
        self.scales_P = torch.tensor(sampling.scales(ids.image_tokens), dtype=torch.float32, device=device)
        self.kept_PB = None if kept_BP is None else kept_BP.T.contiguous().to(device)

    def draw(self, hidden_RD: Tensor, subtoken: int) -> None:
        logits_RV = self.heads[subtoken](hidden_RD).float()
        logits_BV = own_logits_BV = logits_RV
        if self.sampling.guided:
            own_logits_BV, free_logits_BV = logits_RV.chunk(2)
            logits_BV = free_logits_BV + self.scales_P[self.position_1] * (own_logits_BV - free_logits_BV)
        choice_B = self.choose(logits_BV)
        if self.kept_PB is not None:
            kept_B = self.kept_PB[self.position_1][0]
            choice_B = torch.where(kept_B == FREE, choice_B, kept_B - self.starts[subtoken])
        self.append(choice_B + self.starts[subtoken], logprobs_B=_logprob(own_logits_BV, choice_B))


class _Texts(_Samples):
    def __init__(
        self, decoder: Decoder, *, ids: UnifiedVocabulary, sampling: Sampling, uniforms_BP: Tensor, ends: set[int]
    ):
        super().__init__(decoder, sampling=sampling, uniforms_BP=uniforms_BP)
        device = decoder.body.device
        self.head = decoder.body.head(slice(0, ids.text_vocab_size), packed=False)
        self.bias_V = torch.zeros(ids.text_vocab_size, device=device)
        self.bias_V[sorted(ids.marks - ends)] = float("-inf")
        self.ends = torch.tensor(sorted(ends), device=device)
        self.finished_B = torch.zeros(len(uniforms_BP), dtype=torch.bool, device=device)

    def draw(self, hidden_RD: Tensor, subtoken: int) -> None:
        logits_BV = self.head(hidden_RD).float()
        # A finished row goes on with the others; what it draws comes after its end and is not looked at.
        choice_B = self.choose(logits_BV + self.bias_V)
        self.append(choice_B, logprobs_B=_logprob(logits_BV, choice_B).masked_fill(self.finished_B, 0.0))
        self.finished_B |= (choice_B.unsqueeze(-1) == self.ends).any(-1)


def _logprob(logits_BV: Tensor, choice_B: Tensor) -> Tensor:
    return logits_BV.log_softmax(-1).gather(-1, choice_B.unsqueeze(-1)).squeeze(-1)


def uniforms(seeds: Sequence[int], *, count: int) -> Tensor:
    """Uniform numbers (B, count) in float64, every row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


@torch.inference_mode()
def image_logprob(body: Body, *, prompt: Tensor, visual_ids: Tensor, ids: UnifiedVocabulary) -> float:
    """Log-probability in nats of an image after a prompt (`um3.model.sequences.image_prompt`), as in `DrawnImages`."""
    hidden_PD = body.read(torch.cat([prompt, visual_ids]))[len(prompt) - 1 : -1]
    total = 0.0
    for subtoken in range(ids.subtokens):
        start, end = ids.subtoken_range(subtoken)
        logits_NV = body.head(slice(start, end), packed=False)(
            hidden_PD[subtoken :: ids.subtokens].contiguous()
        ).float()
        total += float(_logprob(logits_NV, visual_ids[subtoken :: ids.subtokens].to(body.device) - start).sum())
    return total


@torch.inference_mode()
def text_logprob(body: Body, *, prompt: Tensor, token_ids: Tensor, ids: UnifiedVocabulary) -> float:
    """Log-probability in nats of a text after a prompt, its end included, among all text entries."""
    targets_P = torch.cat([token_ids, torch.tensor([ids.eos_id])])
    hidden_PD = body.read(torch.cat([prompt, token_ids]))[len(prompt) - 1 :]
    logits_PV = body.head(slice(0, ids.text_vocab_size), packed=False)(hidden_PD).float()
    return float(_logprob(logits_PV, targets_P.to(body.device)).sum())
