"""Sums that are made again, and what happens while a program makes its part of one."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS, Settings
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import Add
from daruma_trainer.wire import Kind, Push, TablePush, encode_push, mask_of
from daruma_trainer.worker.rebuilding import Rebuilders
from planes import Planes
from simulated_job import SimulatedJob, quiet
from simulated_members import SimulatedServer, SimulatedWorker
from simulated_training import BATCHES, ROWS

ROUNDS = 300


class Job(SimulatedJob):
    """Its workers make their parts of table 0 again: they know their own batches."""

    def __init__(self) -> None:
        super().__init__(Settings(), 0.0)
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while worker 0's program makes its part, once."""
        assert self.until(lambda: quiet(self), ROUNDS)
        self.rebuilders = [self._register(worker) for worker in self.live_workers]
        assert self.until(self.calm, ROUNDS)

    def record(self, server: SimulatedServer) -> None:
        """Sums that are made again change without a version of their own."""

    def _register(self, worker: SimulatedWorker) -> Rebuilders:
        def part(rows: Ints) -> Floats:
            made = np.zeros((len(rows), self.specs[0].cols), np.float32)
            begin = worker.me.index * BATCHES
            made[:, begin : begin + worker.batch] = 1.0
            if worker.me.index == 0:
                now, self.meanwhile = self.meanwhile, lambda: None
                program = worker._program
                worker._program = lambda: None  # type: ignore[method-assign]
                now()
                worker._program = program  # type: ignore[method-assign]
            return made

        rebuilders = Rebuilders(worker, self.specs)
        rebuilders.add(self.specs[0], part, sync=False)
        return rebuilders

    def make_parts(self, worker: int) -> None:
        """Let a program make what is asked for."""
        self.rebuilders[worker].wait(lambda: True, 1.0, "nothing")

    def calm(self) -> bool:
        """Whether nothing is under way. Parts are made meanwhile."""
        for worker in range(len(self.rebuilders)):
            self.make_parts(worker)
        planes = [head.plane for head in self.heads]
        return quiet(self) and not any(p is None or p.sums.lacking(p.workers) for p in planes)

    def train(self, batches: int) -> None:
        for _ in range(batches):
            for worker in self.live_workers:
                worker.step()
            assert self.until(self.calm, ROUNDS)

    def go_back(self) -> None:
        """A rollback: worker 1 goes on from the cut, worker 0's program has not heard of it."""
        self.operator.roll_back()
        first, second = self.live_workers

        def back() -> bool:
            over = self.operator.recovery is None and first.generation == 1
            return over and second.idle and not first._live.away()

        assert self.until(back, ROUNDS)

    def go_back_and_lose(self) -> None:
        """And then the server is lost again: parts are asked for, of batches since the cut."""
        self.go_back()
        self.crash(self.heads[0].me.id)
        first, second = self.live_workers
        assert self.until(lambda: bool(second.due) and not first._live.away(), ROUNDS)
        self.make_parts(1)


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job()
    yield job
    job.close()


@pytest.mark.parametrize("happens", [lambda _: None, Job.go_back, Job.go_back_and_lose])
def test_a_part_that_a_rollback_overtakes_is_dropped(
    job: Job, happens: Callable[[Job], None]
) -> None:
    """It is of batches that never were; the job goes on from the cut."""
    job.train(3)
    job.save()
    job.train(2)
    meanwhile = job.meanwhile = partial(happens, job)
    job.crash(job.heads[0].me.id)
    assert job.until(job.calm, ROUNDS)
    assert job.meanwhile != meanwhile, "a part was asked for"
    job.train(1)
    expected = np.zeros((ROWS, 2, BATCHES), np.float32)
    expected[:, :, : 4 if job.operator.rollback.generation else 6] = 1.0
    (head,) = job.heads
    np.testing.assert_array_equal(job.marks(head), expected)
    assert all(worker.failure is None for worker in job.live_workers)


def test_a_part_that_nobody_asked_for_changes_nothing() -> None:
    """As one that comes late, to a server that has forgotten that it asked."""
    planes = Planes(Settings(), Add(), servers=1, workers=1)
    (plane,) = planes.planes
    planes.enter(planes.seats[0])
    planes.step(planes.seats[0])
    before = planes.values(0).copy()
    part = TablePush(0, 1.0, np.ones_like(before))
    push = Push(0, 2, 2, 1, 0, mask_of(np.arange(SLOTS)), (part,))
    frames = [b"", *map(bytes, encode_push(push))]
    assert plane.rebuild(b"worker-0-1", frames).kind is Kind.OK
    np.testing.assert_array_equal(planes.values(0), before)
