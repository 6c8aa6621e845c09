"""The worker: order of jobs, a bounded queue, and jobs that end when their client disconnects."""

import asyncio
import threading

import pytest
from starlette.exceptions import HTTPException

from um3.web.worker import Worker


def run(main, *, max_waiting):
    """Run a coroutine over a worker, and close the worker."""

    async def with_worker():
        worker = Worker(max_waiting=max_waiting)
        try:
            return await main(worker)
        finally:
            await worker.close()

    return asyncio.run(asyncio.wait_for(with_worker(), 60))


def forever(job):
    """Work that ends only when it is cancelled."""
    job.send({"started": True})
    while True:
        job.check()


async def events_of(stream):
    return [event async for event in stream]


def test_jobs_run_in_order_of_arrival_and_an_error_reaches_its_client():
    order = []

    def work(number, job):
        order.append(number)
        for step in range(3):
            job.send({"step": 10 * number // step if number == 2 else step})

    async def main(worker):
        streams = [worker.stream(lambda job, number=number: work(number, job)) for number in range(4)]
        return await asyncio.gather(*map(events_of, streams), return_exceptions=True)

    results = run(main, max_waiting=4)
    assert isinstance(results.pop(2), ZeroDivisionError) and order == [0, 1, 2, 3]
    assert results == [[{"step": step} for step in range(3)]] * 3


def test_a_disconnected_client_cancels_its_job_and_frees_its_place():
    ended = threading.Event()

    def work(job):
        try:
            forever(job)
        finally:
            ended.set()

    async def main(worker):
        running = worker.stream(work)
        await anext(running)
        waiting = asyncio.ensure_future(anext(worker.stream(forever)))
        await asyncio.sleep(0)
        with pytest.raises(HTTPException, match="queue is full"):
            await anext(worker.stream(forever))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        last = asyncio.ensure_future(events_of(worker.stream(lambda job: job.send({"last": True}))))
        await asyncio.sleep(0)
        await running.aclose()
        return await last

    assert run(main, max_waiting=1) == [{"last": True}]
    assert ended.is_set()


def test_closing_ends_the_running_job_and_drops_the_waiting_ones():
    async def main(worker):
        streams = [worker.stream(forever), worker.stream(lambda job: job.send({"ran": True}))]
        clients = [asyncio.ensure_future(events_of(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        await worker.close()
        return await asyncio.gather(*clients)

    assert run(main, max_waiting=3) == [[{"started": True}], []]
