"""What the tests of this room share."""

from collections.abc import Callable

import pytest

from um3.ids import IdSpace


def _make_ids(*, slots: int = 4, bits_per_slot: int = 7, num_patches: int = 16, text_vocab_size: int = 50) -> IdSpace:
    return IdSpace(
        text_vocab_size=text_vocab_size,
        slots=slots,
        bits_per_slot=bits_per_slot,
        num_patches=num_patches,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        begin_of_image_id=3,
        end_of_image_id=4,
    )


@pytest.fixture
def make_ids() -> Callable[..., IdSpace]:
    """An id space with bos, eos, pad, <boi>, <eoi> = 0 .. 4 and everything else adjustable."""
    return _make_ids
