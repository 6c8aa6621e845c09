"""Runs model requests one at a time in a worker thread; a disconnected client cancels its job."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.exceptions import HTTPException

Event = dict[str, Any]


class Cancelled(Exception):
    """The client has disconnected; raised in the worker thread to end the job."""


class Job:
    """A request as the worker thread sees it: `send` passes an event to the client, `check` ends a cancelled job."""

    def __init__(self) -> None:
        self.loop, self.is_cancelled = asyncio.get_running_loop(), False
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    def check(self) -> None:
        """Raise Cancelled if the client has disconnected."""
        if self.is_cancelled:
            raise Cancelled

    def send(self, event: Event) -> None:
        """Pass an event to the client."""
        self.check()
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """One thread that runs jobs in order of arrival; at most `max_waiting` jobs wait for the running one."""

    def __init__(self, *, max_waiting: int):
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._jobs: dict[Job, Future[None]] = {}

    async def stream(self, work: Callable[[Job], None]) -> AsyncIterator[Event]:
        """Run `work` and yield the events that it sends, then raise its error; closing the iterator cancels the job.

        A waiting job ends at once, a running one at its next `check` or `send`; until then it keeps its place.
        """
        if len(self._jobs) > self.max_waiting:
            raise HTTPException(503, "the request queue is full; try again in a moment", headers={"Retry-After": "2"})
        job = Job()
        self._jobs[job] = future = self._thread.submit(work, job)
        future.add_done_callback(lambda _: job.loop.call_soon_threadsafe(self._end, job))
        try:
            while (event := await job.events.get()) is not None:
                yield event
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, Cancelled):
                raise error
        finally:
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        job.is_cancelled = True
        if job in self._jobs:
            self._jobs[job].cancel()

    def _end(self, job: Job) -> None:
        del self._jobs[job]
        job.events.put_nowait(None)

    async def close(self) -> None:
        """Cancel all jobs and end the thread."""
        for job in list(self._jobs):
            self._cancel(job)
        await asyncio.to_thread(self._thread.shutdown)
