"""Prefetch: the same batches, one prepared in advance, errors at their own step."""

import threading
import time

import pytest

from data_mix.prefetch import Prefetch
from um3.core.errors import UserError


class Squares:
    """Batches that are numbers; records which steps were made, and by which threads."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.made: list[int] = []
        self.threads: set[str] = set()

    def batch(self, step: int) -> int:
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise UserError(f"step {step} cannot be read")
        return step * step


def test_the_batches_are_the_same_and_none_is_made_past_the_end() -> None:
    squares = Squares()
    with Prefetch(squares, num_steps=5) as batches:
        assert [batches.batch(step) for step in range(5)] == [0, 1, 4, 9, 16]
        assert squares.made == [0, 1, 2, 3, 4]
        assert batches.batch(2) == 4
    assert all(name.startswith("prefetch") for name in squares.threads)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_the_next_batch_is_prepared() -> None:
    squares = Squares()
    with Prefetch(squares) as batches:
        batches.batch(0)
        deadline = time.monotonic() + 5
        while squares.made != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert squares.made == [0, 1]


def test_an_error_is_raised_at_its_own_step() -> None:
    with Prefetch(Squares(fails_at=2)) as batches:
        assert [batches.batch(step) for step in range(2)] == [0, 1]
        with pytest.raises(UserError, match="step 2"):
            batches.batch(2)
        assert batches.batch(3) == 9
