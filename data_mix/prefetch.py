"""Prepare the next batch in a thread while the model computes on the current one."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

BatchT = TypeVar("BatchT")
MadeT = TypeVar("MadeT", covariant=True)


class Batches(Protocol[MadeT]):
    """Makes the batch of any step; the same step gives the same batch."""

    def batch(self, step: int) -> MadeT: ...


class Prefetch(Generic[BatchT]):
    """Returns the batch of a step and starts preparing the batch of the next step.

    An error in the thread is raised when the batch of that step is requested.
    """

    def __init__(self, batches: Batches[BatchT], *, num_steps: int) -> None:
        """`num_steps`: length of the run; batches from this step on are not prepared in advance."""
        self.batches, self.num_steps = batches, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[BatchT]] = {}

    def batch(self, step: int) -> BatchT:
        """The batch of `step`; any order of steps works, only consecutive steps are prepared in advance."""
        future = self._ahead.pop(step, None) or self._thread.submit(self.batches.batch, step)
        self._ahead.clear()
        batch = future.result()
        if step + 1 < self.num_steps:
            self._ahead[step + 1] = self._thread.submit(self.batches.batch, step + 1)
        return batch

    def close(self) -> None:
        """Stop the thread after the batch in preparation."""
        self._thread.shutdown(wait=True, cancel_futures=True)
