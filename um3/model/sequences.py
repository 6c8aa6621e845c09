"""The four row layouts UM3 is trained on, and the prompts that sampling starts from.

    text            bos tokens eos
    image-to-text   bos <boi> visual <eoi> caption eos
    text-to-image   bos caption <boi> visual <eoi> eos
    unconditional   bos <boi> visual <eoi> eos              (a text-to-image row whose caption was dropped)

A prompt is the beginning of such a row; tests hold the two together.
bos is never a target: rows can be packed one after the other and shifted by one without a target that
reaches across a boundary. Where a row holds several of them, `document_positions` tells them apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from um3.model.configuration import Supervision
from um3.model.vocabulary import UnifiedVocabulary

Tokens = Sequence[int] | Tensor


class Row(NamedTuple):
    """One training sequence: `input_ids` int64 (T,) and `targets` bool (T,), true where the id is to be predicted."""

    input_ids: Tensor
    targets: Tensor


def text_row(tokens: Tokens, *, ids: UnifiedVocabulary) -> Row:
    """`bos tokens eos`; everything but bos is a target."""
    return _row(_given(ids.bos_id), _target(tokens, ids.eos_id))


def image_to_text_row(
    visual_ids: Tokens, caption: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target"
) -> Row:
    """`bos <boi> visual <eoi> caption eos`; "target" predicts the caption and eos, "all" all but bos."""
    image = _image(visual_ids, ids=ids)
    return _row(
        _given(ids.bos_id, ids.begin_of_image_id, image, ids.end_of_image_id),
        _target(caption, ids.eos_id),
        supervision=supervision,
    )


def text_to_image_row(
    caption: Tokens, visual_ids: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target"
) -> Row:
    """`bos caption <boi> visual <eoi> eos`; "target" predicts all after the caption, "all" all but bos."""
    image = _image(visual_ids, ids=ids)
    return _row(
        _given(ids.bos_id, caption),
        _target(ids.begin_of_image_id, image, ids.end_of_image_id, ids.eos_id),
        supervision=supervision,
    )


def unconditional_row(visual_ids: Tokens, *, ids: UnifiedVocabulary, supervision: Supervision = "target") -> Row:
    """`bos <boi> visual <eoi> eos`, what classifier-free guidance needs; under "target" all after <boi> is predicted.

    <boi> is not a target here: nothing asked for an image, and learning it would make text begin with one.
    """
    image = _image(visual_ids, ids=ids)
    return _row(
        _given(ids.bos_id, ids.begin_of_image_id),
        _target(image, ids.end_of_image_id, ids.eos_id),
        supervision=supervision,
    )


def image_prompt(caption: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos caption <boi>`: what an image is drawn after. An empty caption is the unconditional prompt."""
    return _join(ids.bos_id, caption, ids.begin_of_image_id)


def caption_prompt(visual_ids: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos <boi> visual <eoi>`: what a caption is written after."""
    return _join(ids.bos_id, ids.begin_of_image_id, _image(visual_ids, ids=ids), ids.end_of_image_id)


def text_prompt(tokens: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    """`bos tokens`: what text is continued after."""
    return _join(ids.bos_id, tokens)


def document_positions(input_ids_BT: Tensor, *, bos_id: int) -> Tensor:
    """The place of every id in its document, int64 (B, T): a document begins at each bos and at the row's beginning.

    Given as position ids without an attention mask, they keep documents apart in transformers' models: attention is
    causal within each document and stops at its beginning. Padding at the end counts as part of the last document.
    """
    places_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    starts_BT = torch.where(input_ids_BT == bos_id, places_BT, 0).cummax(dim=1).values
    return places_BT - starts_BT


def _join(*pieces: int | Tokens) -> Tensor:
    return torch.cat([torch.as_tensor(piece, dtype=torch.int64).reshape(-1) for piece in pieces])


def _given(*pieces: int | Tokens) -> Row:
    tokens = _join(*pieces)
    return Row(tokens, torch.zeros_like(tokens, dtype=torch.bool))


def _target(*pieces: int | Tokens) -> Row:
    tokens = _join(*pieces)
    return Row(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _row(*parts: Row, supervision: Supervision = "target") -> Row:
    if supervision not in ("target", "all"):
        raise ValueError(f"supervision '{supervision}' is unknown; use 'target' or 'all'")
    input_ids = torch.cat([part.input_ids for part in parts])
    targets = torch.cat([part.targets for part in parts])
    if supervision == "all":
        targets = torch.ones_like(targets)
        targets[0] = False
    return Row(input_ids=input_ids, targets=targets)


def _image(visual_ids: Tokens, *, ids: UnifiedVocabulary) -> Tensor:
    image = torch.as_tensor(visual_ids)
    if image.shape != (ids.image_tokens,):
        raise ValueError(f"an image is {ids.image_tokens} visual ids in one dimension, not {tuple(image.shape)}")
    return image
