"""Layouts of training sequences, their targets, and that prompts are their beginnings."""

import pytest
import torch

from tests.helpers.tiny_um3 import make_ids
from um3.model import sequences

IDS = make_ids(num_patches=2)
VISUAL = IDS.codes_to_ids(torch.tensor([7, 2**28 - 1]))
CAPTION = [10, 11, 12]
IMAGE = [3, *VISUAL.tolist(), 4]
LAYOUTS = {
    "text": ([0, *CAPTION, 1], [*CAPTION, 1]),
    "image-to-text": ([0, *IMAGE, *CAPTION, 1], [*CAPTION, 1]),
    "text-to-image": ([0, *CAPTION, *IMAGE, 1], [*IMAGE, 1]),
    "unconditional": ([0, *IMAGE, 1], [*IMAGE[1:], 1]),
}
"""Tokens and targets under supervision "target"."""


def make(kind, **options):
    parts = {"text": [CAPTION], "image-to-text": [VISUAL, CAPTION], "text-to-image": [CAPTION, VISUAL]}
    function = getattr(sequences, kind.replace("-", "_") + "_sequence")
    return function(*parts.get(kind, [VISUAL]), ids=IDS, **options)


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_layout_and_targets(kind):
    tokens, targets = LAYOUTS[kind]
    sequence = make(kind)
    assert sequence.input_ids.tolist() == tokens and sequence.input_ids.dtype == torch.int64
    assert sequence.input_ids[sequence.targets].tolist() == targets and sequence.targets.dtype == torch.bool
    if kind != "text":
        sequence = make(kind, supervision="all")
        assert sequence.input_ids[sequence.targets].tolist() == tokens[1:]


def test_prompts_begin_the_sequences():
    for prompt, kind in (
        (sequences.image_prompt(CAPTION, ids=IDS), "text-to-image"),
        (sequences.image_prompt([], ids=IDS), "unconditional"),
        (sequences.caption_prompt(VISUAL, ids=IDS), "image-to-text"),
        (sequences.text_prompt(CAPTION, ids=IDS), "text"),
    ):
        assert prompt.tolist() == LAYOUTS[kind][0][: len(prompt)]


def test_positions_restart_at_every_document():
    bos, pad = IDS.bos_id, IDS.pad_id
    ids_BT = torch.tensor([[bos, 9, 9, bos, 9, bos, bos, 9, pad, pad], [9, 9, bos, 9, 9, 9, 9, 9, 9, 9], [pad] * 10])
    assert sequences.document_positions(ids_BT, bos_id=bos).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1, 2, 3],
        [0, 1, 0, 1, 2, 3, 4, 5, 6, 7],
        list(range(10)),
    ]


def test_empty_and_tensor_inputs():
    assert sequences.text_sequence([], ids=IDS).input_ids.tolist() == [0, 1]
    tokens = sequences.text_sequence(torch.tensor(CAPTION, dtype=torch.int32), ids=IDS).input_ids
    assert tokens.dtype == torch.int64 and tokens.tolist() == [0, *CAPTION, 1]


def test_wrong_image_length_and_supervision_are_refused():
    with pytest.raises(ValueError, match="8 visual ids"):
        sequences.caption_prompt(VISUAL[:-1], ids=IDS)
    with pytest.raises(ValueError, match="some"):
        make("unconditional", supervision="some")
