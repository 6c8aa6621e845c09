"""The five layouts of a training sequence, and the prompts that generation starts from.

    text            bos tokens eos
    image-to-text   bos <boi> visual <eoi> caption eos
    text-to-image   bos caption <boi> visual <eoi> eos
    unconditional   bos <boi> visual <eoi> eos              (text-to-image with a dropped caption)
    conversation    bos [<boi> visual <eoi>] Q: question A: answer eos Q: question A: answer eos

A prompt is the beginning of such a sequence; the tests compare the two. bos is never a target, so packed sequences can
be shifted by one without a target that crosses a boundary. `document_positions` separates packed documents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from um3.model.configuration import Supervision
from um3.model.vocabulary import UnifiedVocabulary

Tokens = Sequence[int] | Tensor
Pieces = Sequence[int | Tokens]


class TrainingSequence(NamedTuple):
    """`input_ids` int64 (T,) and `targets` bool (T,): true where the token is predicted."""

    input_ids: Tensor
    targets: Tensor


def text_sequence(tokens: Tokens, *, ids: UnifiedVocabulary) -> TrainingSequence:
    """`bos tokens eos`; every token except bos is a target."""
    return _sequence([ids.bos_id], [tokens, ids.eos_id])


def image_to_text_sequence(
    visual_ids: Tokens, caption: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target"
) -> TrainingSequence:
    """`bos <boi> visual <eoi> caption eos`; "target" predicts caption and eos, "all" every token except bos."""
    return _sequence([ids.bos_id, *_image(visual_ids, ids=ids)], [caption, ids.eos_id], supervision=supervision)


def text_to_image_sequence(
    caption: Tokens, visual_ids: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target"
) -> TrainingSequence:
    """`bos caption <boi> visual <eoi> eos`; "target" predicts all after the caption, "all" every token except bos."""
    return _sequence([ids.bos_id, caption], [*_image(visual_ids, ids=ids), ids.eos_id], supervision=supervision)


def unconditional_sequence(
    visual_ids: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target"
) -> TrainingSequence:
    """`bos <boi> visual <eoi> eos`, for classifier-free guidance; "target" predicts all after <boi>.

    <boi> is not a target: no caption asked for an image, and a model that learns it would start texts with an image.
    """
    begin, image, end = _image(visual_ids, ids=ids)
    return _sequence([ids.bos_id, begin], [image, end, ids.eos_id], supervision=supervision)


def conversation_sequence(
    turns: Sequence[tuple[Tokens, Tokens]], visual_ids: Tokens | None = None, *, ids: UnifiedVocabulary
) -> TrainingSequence:
    """`bos [<boi> visual <eoi>]`, then `question answer eos` for each of `turns`, which `encode_turns` makes.

    Targets are the answers and their eos.
    """
    image: Pieces = () if visual_ids is None else _image(visual_ids, ids=ids)
    parts = [_sequence([ids.bos_id, *image], [])]
    parts += [_sequence([question], [answer, ids.eos_id]) for question, answer in turns]
    return TrainingSequence(*map(torch.cat, zip(*parts, strict=True)))


def image_prompt(caption: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos caption <boi>`: the prompt for an image. An empty caption gives the unconditional prompt."""
    return _join(ids.bos_id, caption, ids.begin_of_image_id)


def caption_prompt(visual_ids: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos <boi> visual <eoi>`: the prompt for a caption."""
    return _join(ids.bos_id, *_image(visual_ids, ids=ids))


def text_prompt(tokens: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos tokens`: the prompt for a continuation."""
    return _join(ids.bos_id, tokens)


def chat_prompt(
    turns: Sequence[tuple[Tokens, Tokens]], visual_ids: Tokens | None = None, *, ids: UnifiedVocabulary
) -> Tensor:
    """A `conversation_sequence` up to the answer of its last turn, which is not read: the prompt for that answer."""
    *past, (question, _) = turns
    return _join(conversation_sequence(past, visual_ids, ids=ids).input_ids, question)


def document_positions(input_ids_BT: Tensor, *, bos_id: int) -> Tensor:
    """Position of every token in its document, int64 (B, T); a document starts at each bos and at position 0.

    Passed as position ids without an attention mask, they separate documents in transformers' models: attention is
    causal within each document and stops at its start. Padding at the end counts as part of the last document.
    """
    positions_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    starts_BT = torch.where(input_ids_BT == bos_id, positions_BT, 0).cummax(dim=1).values
    return positions_BT - starts_BT


def _sequence(context: Pieces, answer: Pieces, *, supervision: Supervision = "target") -> TrainingSequence:
    if supervision not in ("target", "all"):
        raise ValueError(f"supervision '{supervision}' is unknown; use 'target' or 'all'")
    input_ids = _join(*context, *answer)
    targets = torch.arange(len(input_ids)) >= (1 if supervision == "all" else len(_join(*context)))
    return TrainingSequence(input_ids=input_ids, targets=targets)


def _join(*pieces: int | Tokens) -> Tensor:
    return torch.cat([torch.as_tensor(piece, dtype=torch.int64).reshape(-1) for piece in pieces])


def _image(visual_ids: Tokens, *, ids: UnifiedVocabulary) -> tuple[int, Tensor, int]:
    image = torch.as_tensor(visual_ids)
    if image.shape != (ids.image_tokens,):
        raise ValueError(f"an image is {ids.image_tokens} visual ids in one dimension, not {tuple(image.shape)}")
    return ids.begin_of_image_id, image, ids.end_of_image_id
