"""One batch ahead: the next batch is put together in a thread while the current one is computed on."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

BatchT = TypeVar("BatchT")
MadeT = TypeVar("MadeT", covariant=True)


class Batches(Protocol[MadeT]):
    """Anything that can make the batch of any step."""

    def batch(self, step: int) -> MadeT:
        """The batch of `step`, the same whenever it is asked for."""
        ...


class Prefetch(Generic[BatchT]):
    """The batches of `batches`, with the batch of the step after the one asked for already under way.

    What goes wrong in the thread is raised where that step's batch is asked for, and only there. `close` (or
    leaving the `with` block) waits for the batch in flight.
    """

    def __init__(self, batches: Batches[BatchT], *, num_steps: int | None = None) -> None:
        """`num_steps`: the run's length; no batch at or after it is prepared ahead."""
        self.batches, self.num_steps = batches, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[BatchT]] | None = None

    def batch(self, step: int) -> BatchT:
        """The batch of `step`; steps may be asked for in any order, in sequence they come without waiting."""
        if self._ahead is None or self._ahead[0] != step:
            self._start(step)
        assert self._ahead is not None
        _, future = self._ahead
        self._ahead = None
        batch = future.result()
        if self.num_steps is None or step + 1 < self.num_steps:
            self._start(step + 1)
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, step: int) -> None:
        self._ahead = (step, self._thread.submit(self.batches.batch, step))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
