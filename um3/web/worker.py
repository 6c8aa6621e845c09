"""Runs model requests one at a time in a worker thread; a disconnected client cancels its job."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Event = dict[str, Any]


class QueueFull(Exception):
    """The request queue is full."""


class Cancelled(Exception):
    """The client has disconnected; raised in the worker thread to end the job."""


class Job:
    """A request as the worker thread sees it: `send` passes an event to the client, `check` ends a cancelled job."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_cancelled = threading.Event()
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.future: Future[None] | None = None

    def check(self) -> None:
        """Raise Cancelled if the client has disconnected."""
        if self._is_cancelled.is_set():
            raise Cancelled

    def send(self, event: Event) -> None:
        """Pass an event to the client."""
        self.check()
        self.put(event)

    def put(self, event: Event | None) -> None:
        """Put an event into the queue, from any thread; None ends the stream."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self) -> None:
        """End the job: at once if it has not started, else at its next `check` or `send`."""
        self._is_cancelled.set()
        if self.future is not None:
            self.future.cancel()


class Worker:
    """One thread that runs jobs in order of arrival; at most `max_waiting` jobs wait for the running one."""

    def __init__(self, *, max_waiting: int):
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._jobs: set[Job] = set()

    async def stream(self, work: Callable[[Job], None]) -> AsyncIterator[Event]:
        """Run `work` and yield the events that it sends; closing the iterator cancels the job.

        Raises:
            QueueFull: too many jobs are waiting.
            Exception: whatever `work` raises, after its events.
        """
        if len(self._jobs) > self.max_waiting:
            raise QueueFull
        job = Job()
        self._jobs.add(job)
        job.future = future = self._thread.submit(work, job)
        future.add_done_callback(lambda _: job.put(None))
        try:
            while (event := await job.events.get()) is not None:
                yield event
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, Cancelled):
                raise error
        finally:
            job.cancel()
            if future.cancelled():
                self._jobs.discard(job)
            else:  # a running job keeps its place until it has ended
                loop = asyncio.get_running_loop()
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._jobs.discard, job))

    async def close(self) -> None:
        """Cancel all jobs and end the thread."""
        for job in list(self._jobs):
            job.cancel()
        await asyncio.to_thread(self._thread.shutdown)
