"""The work queue: no key twice, none in two passes at once, no event lost."""

import asyncio

from daruma_operator.controller.queue import WorkQueue
from daruma_operator.substrate.protocol import JobKey

A, B = JobKey("n", "a"), JobKey("n", "b")


async def take(queue: WorkQueue) -> JobKey:
    key, _ = await asyncio.wait_for(queue.get(), 10)
    return key


def test_a_key_is_given_out_once_however_often_it_is_added() -> None:
    async def story() -> None:
        queue = WorkQueue()
        for key in (A, B, A, A):
            queue.add(key)
        assert len(queue) == 2
        assert [await take(queue), await take(queue)] == [A, B]
        assert len(queue) == 0

    asyncio.run(story())


def test_an_event_during_a_pass_leads_to_another_one_after_it() -> None:
    async def story() -> None:
        queue = WorkQueue()
        queue.add(A)
        assert await take(queue) == A
        queue.add(A)
        queue.add(B)
        assert await take(queue) == B  # not A, which is in a pass
        queue.done(A)
        assert await take(queue) == A

    asyncio.run(story())


def test_the_earliest_of_several_deadlines_counts() -> None:
    async def story() -> None:
        queue = WorkQueue()
        queue.add_after(A, 3600)
        queue.add_after(A, 0.001)
        queue.add_after(A, 1800)
        assert await take(queue) == A
        queue.done(A)
        queue.add_after(B, 3600)
        queue.forget(B)
        queue.close()
        assert len(queue) == 0

    asyncio.run(story())


def test_a_waiting_reader_is_woken() -> None:
    async def story() -> None:
        queue = WorkQueue()
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0)
        queue.add(A)
        assert await reader == A

    asyncio.run(story())
