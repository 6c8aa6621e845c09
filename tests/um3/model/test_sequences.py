"""Row layouts, what is supervised in them, and that prompts are their beginnings."""

import pytest
import torch

from um3.model import sequences as rows
from um3.model.vocabulary import UnifiedVocabulary

IDS = UnifiedVocabulary(
    text_vocab_size=50,
    subtokens=4,
    bits_per_subtoken=7,
    num_patches=2,
    bos_id=0,
    eos_id=1,
    pad_id=2,
    begin_of_image_id=3,
    end_of_image_id=4,
)
VISUAL = IDS.codes_to_ids(torch.tensor([7, 2**28 - 1]))
CAPTION = [10, 11, 12]


def targets_of(row: rows.Row) -> list[int]:
    return row.input_ids[row.targets].tolist()


def test_layouts() -> None:
    visual = VISUAL.tolist()
    assert rows.text_row(CAPTION, ids=IDS).input_ids.tolist() == [0, *CAPTION, 1]
    assert rows.image_to_text_row(VISUAL, CAPTION, ids=IDS).input_ids.tolist() == [0, 3, *visual, 4, *CAPTION, 1]
    assert rows.text_to_image_row(CAPTION, VISUAL, ids=IDS).input_ids.tolist() == [0, *CAPTION, 3, *visual, 4, 1]
    assert rows.unconditional_row(VISUAL, ids=IDS).input_ids.tolist() == [0, 3, *visual, 4, 1]


def test_target_supervision_is_what_the_row_is_for() -> None:
    visual = VISUAL.tolist()
    assert targets_of(rows.text_row(CAPTION, ids=IDS)) == [*CAPTION, 1]
    assert targets_of(rows.image_to_text_row(VISUAL, CAPTION, ids=IDS)) == [*CAPTION, 1]
    assert targets_of(rows.text_to_image_row(CAPTION, VISUAL, ids=IDS)) == [3, *visual, 4, 1]
    assert targets_of(rows.unconditional_row(VISUAL, ids=IDS)) == [*visual, 4, 1]


def test_all_supervision_leaves_out_bos_only() -> None:
    for row in (
        rows.image_to_text_row(VISUAL, CAPTION, ids=IDS, supervision="all"),
        rows.text_to_image_row(CAPTION, VISUAL, ids=IDS, supervision="all"),
        rows.unconditional_row(VISUAL, ids=IDS, supervision="all"),
    ):
        assert targets_of(row) == row.input_ids[1:].tolist()


def test_prompts_begin_the_rows() -> None:
    for prompt, row in (
        (rows.image_prompt(CAPTION, ids=IDS), rows.text_to_image_row(CAPTION, VISUAL, ids=IDS)),
        (rows.image_prompt([], ids=IDS), rows.unconditional_row(VISUAL, ids=IDS)),
        (rows.caption_prompt(VISUAL, ids=IDS), rows.image_to_text_row(VISUAL, CAPTION, ids=IDS)),
        (rows.text_prompt(CAPTION, ids=IDS), rows.text_row(CAPTION, ids=IDS)),
    ):
        assert torch.equal(prompt, row.input_ids[: len(prompt)])


def test_positions_restart_at_every_document() -> None:
    bos, pad = IDS.bos_id, IDS.pad_id
    ids_BT = torch.tensor([[bos, 9, 9, bos, 9, bos, bos, 9, pad, pad], [9, 9, bos, 9, 9, 9, 9, 9, 9, 9], [pad] * 10])
    assert rows.document_positions(ids_BT, bos_id=bos).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1, 2, 3],
        [0, 1, 0, 1, 2, 3, 4, 5, 6, 7],
        list(range(10)),
    ]


def test_dtypes_hold_for_empty_and_tensor_inputs() -> None:
    row = rows.text_row([], ids=IDS)
    assert row.input_ids.dtype == torch.int64 and row.targets.dtype == torch.bool
    assert rows.text_row(torch.tensor(CAPTION, dtype=torch.int32), ids=IDS).input_ids.dtype == torch.int64


def test_wrong_image_length_and_supervision_are_refused() -> None:
    with pytest.raises(ValueError, match="8 visual ids"):
        rows.caption_prompt(VISUAL[:-1], ids=IDS)
    with pytest.raises(ValueError, match="some"):
        rows.unconditional_row(VISUAL, ids=IDS, supervision="some")  # type: ignore[arg-type]
