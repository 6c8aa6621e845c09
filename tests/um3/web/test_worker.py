"""The one thread: order, a bounded line, and work that ends when nobody waits for it."""

import asyncio
import threading

import pytest

from um3.web.worker import Busy, Job, Worker


def test_jobs_run_in_order_of_arrival_and_say_their_events() -> None:
    order: list[int] = []

    async def main() -> list[list[int]]:
        worker = Worker(most_waiting=5)

        def work(number: int) -> Job:
            def say(job: Job) -> None:
                order.append(number)
                for step in range(3):
                    job.say({"step": 10 * number + step})

            return worker.submit(say)

        jobs = [work(number) for number in range(5)]
        found = [[event["step"] async for event in job.events()] for job in jobs]
        await worker.close()
        return found

    assert asyncio.run(main()) == [[10 * number + step for step in range(3)] for number in range(5)]
    assert order == list(range(5))


def test_what_the_work_raises_reaches_who_waits_and_the_next_runs() -> None:
    async def main() -> dict[str, int]:
        worker = Worker(most_waiting=1)

        def fail(job: Job) -> None:
            raise ZeroDivisionError

        failing, next_one = worker.submit(fail), worker.submit(lambda job: job.say({"fine": 1}))
        with pytest.raises(ZeroDivisionError):
            await anext(failing.events())
        found = await anext(next_one.events())
        await worker.close()
        return found

    assert asyncio.run(main()) == {"fine": 1}


def test_endless_work_ends_when_who_asked_leaves_and_a_waiting_place_is_free_at_once() -> None:
    ended = threading.Event()

    async def main() -> None:
        worker = Worker(most_waiting=1)

        def forever(job: Job) -> None:
            try:
                job.say({"began": True})
                while True:
                    job.check()
            finally:
                ended.set()

        running = worker.submit(forever)
        await anext(running.events())
        waiting = worker.submit(lambda job: job.say({}))
        with pytest.raises(Busy):
            worker.submit(lambda job: None)
        worker.leave(waiting)
        last = worker.submit(lambda job: job.say({"last": True}))
        worker.leave(running)
        assert await anext(last.events()) == {"last": True}
        assert [event async for event in running.events()] == []
        await worker.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert ended.is_set()


def test_closing_ends_what_runs_and_drops_what_waits() -> None:
    ran = []

    async def main() -> None:
        worker = Worker(most_waiting=3)

        def forever(job: Job) -> None:
            while True:
                job.check()

        worker.submit(forever)
        worker.submit(lambda job: ran.append(1))
        await worker.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert ran == []
