"""The worker: order of jobs, a bounded queue, and jobs that end when their client disconnects."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from um3.web.worker import Event, Job, QueueFull, Worker


def run(main: Callable[[Worker], Coroutine[Any, Any, Any]], *, max_waiting: int) -> Any:
    """Run a coroutine over a worker, and close the worker."""

    async def with_worker() -> Any:
        worker = Worker(max_waiting=max_waiting)
        try:
            return await main(worker)
        finally:
            await worker.close()

    return asyncio.run(asyncio.wait_for(with_worker(), 60))


def forever(job: Job) -> None:
    """Work that ends only when it is cancelled."""
    job.send({"started": True})
    while True:
        job.check()


async def events_of(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def test_jobs_run_in_order_of_arrival_and_send_their_events() -> None:
    order: list[int] = []

    def numbered(number: int) -> Callable[[Job], None]:
        def work(job: Job) -> None:
            order.append(number)
            for step in range(3):
                job.send({"step": 10 * number + step})

        return work

    async def main(worker: Worker) -> list[list[Event]]:
        return await asyncio.gather(*(events_of(worker.stream(numbered(number))) for number in range(5)))

    assert run(main, max_waiting=5) == [[{"step": 10 * number + step} for step in range(3)] for number in range(5)]
    assert order == list(range(5))


def test_an_error_reaches_its_client_and_the_next_job_runs() -> None:
    def fail(job: Job) -> None:
        raise ZeroDivisionError

    async def main(worker: Worker) -> list[Any]:
        streams = [worker.stream(fail), worker.stream(lambda job: job.send({"fine": 1}))]
        return await asyncio.gather(*map(events_of, streams), return_exceptions=True)

    error, events = run(main, max_waiting=1)
    assert isinstance(error, ZeroDivisionError) and events == [{"fine": 1}]


def test_a_disconnected_client_cancels_its_job_and_frees_its_place() -> None:
    ended = threading.Event()

    def work(job: Job) -> None:
        try:
            forever(job)
        finally:
            ended.set()

    async def main(worker: Worker) -> list[Event]:
        running = worker.stream(work)
        await anext(running)
        waiting = asyncio.ensure_future(anext(worker.stream(forever)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await anext(worker.stream(forever))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        last = asyncio.ensure_future(events_of(worker.stream(lambda job: job.send({"last": True}))))
        await asyncio.sleep(0)
        await running.aclose()  # type: ignore[attr-defined]
        return await last

    assert run(main, max_waiting=1) == [{"last": True}]
    assert ended.is_set()


def test_closing_ends_the_running_job_and_drops_the_waiting_ones() -> None:
    ran: list[int] = []

    async def main(worker: Worker) -> list[list[Event]]:
        streams = [worker.stream(forever), worker.stream(lambda job: ran.append(1))]
        clients = [asyncio.ensure_future(events_of(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        await worker.close()
        return await asyncio.gather(*clients)

    assert run(main, max_waiting=3) == [[{"started": True}], []]
    assert ran == []
