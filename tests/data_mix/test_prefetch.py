"""Prefetch: the same batches, one prepared in advance, errors at their own step."""

import threading
import time
from contextlib import closing

import pytest

from data_mix.prefetch import Prefetch
from um3.core.errors import UserError


class Squares:
    """Batches that are numbers; records which steps were made, and by which threads."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()

    def batch(self, step: int) -> int:
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        if step == 7:
            raise UserError("step 7 cannot be read")
        return step * step


def test_the_batches_are_the_same_and_none_is_made_past_the_end() -> None:
    squares = Squares()
    with closing(Prefetch(squares, num_steps=5)) as batches:
        assert [batches.batch(step) for step in range(5)] == [0, 1, 4, 9, 16]
        assert squares.made == [0, 1, 2, 3, 4]
        assert batches.batch(2) == 4
    assert all(name.startswith("prefetch") for name in squares.threads)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_the_next_batch_is_prepared_and_fails_at_its_own_step() -> None:
    squares = Squares()
    with closing(Prefetch(squares, num_steps=10)) as batches:
        assert batches.batch(6) == 36
        deadline = time.monotonic() + 5
        while squares.made != [6, 7] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert squares.made == [6, 7]
        with pytest.raises(UserError, match="step 7"):
            batches.batch(7)
        assert batches.batch(8) == 64
