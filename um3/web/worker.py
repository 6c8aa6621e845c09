"""One thread that has the model to itself. Who comes waits for their turn; who leaves is waited for no longer."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Event = dict[str, Any]


class Busy(Exception):
    """As many wait as may."""


class Left(Exception):
    """Whoever asked is gone: raised in the worker's thread to end the work."""


class Job:
    """A piece of work: the thread says events, the event loop reads them, and can end the work."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._left = threading.Event()
        self.future: Future[None] | None = None

    def check(self) -> None:
        """In the thread: stop here if nobody waits any longer."""
        if self._left.is_set():
            raise Left

    def say(self, event: Event) -> None:
        """In the thread: send an event."""
        self.check()
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def run(self, work: "Callable[[Job], None]", *, ended: Callable[[], None]) -> None:
        """In the thread: all of it. What `work` raises is an event too."""
        end: Exception | None = None
        try:
            self.check()
            work(self)
        except Left:
            pass
        except Exception as error:
            end = error
        self._loop.call_soon_threadsafe(self._events.put_nowait, end)
        self._loop.call_soon_threadsafe(ended)

    async def events(self) -> AsyncIterator[Event]:
        """In the loop: the events up to the last; raises what the work raised."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def leave(self) -> bool:
        """In the loop: nobody waits for this. True if it had not begun and never will."""
        self._left.set()
        return self.future is not None and self.future.cancel()


class Worker:
    """Runs jobs in order of arrival; at most `most_waiting` wait for the one that runs."""

    def __init__(self, *, most_waiting: int):
        self.most_waiting = most_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._jobs: set[Job] = set()

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Put work in the line.

        Raises:
            Busy: the line is as long as it may be.
        """
        if len(self._jobs) > self.most_waiting:
            raise Busy
        job = Job()
        self._jobs.add(job)
        job.future = self._thread.submit(job.run, work, ended=lambda: self._jobs.discard(job))
        return job

    def leave(self, job: Job) -> None:
        """Whoever asked for the job is gone."""
        if job.leave():
            self._jobs.discard(job)

    async def close(self) -> None:
        """End all jobs and the thread."""
        for job in list(self._jobs):
            self.leave(job)
        await asyncio.to_thread(self._thread.shutdown)
