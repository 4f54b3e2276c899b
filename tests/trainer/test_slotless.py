"""Servers that own no slot, as some of very many do: nobody waits for them, or for what they have.

A small job stands for one of 256 servers: there `place` gives all slots to server 1.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest

from daruma_trainer.contract import SLOTS, Settings, place
from daruma_trainer.server.reporting import report_of
from daruma_trainer.worker.copies import HostCopy
from simulated_job import SimulatedJob, quiet

ROUNDS = 600
PLACES = (
    "daruma_trainer.server.data.place",
    "daruma_trainer.server.cuts.place",
    "daruma_trainer.worker.copies.place",
    "simulated_operator.place",
)


@contextmanager
def all_on_server_1() -> Iterator[None]:
    with ExitStack() as stack:
        for name in PLACES:
            stack.enter_context(mock.patch(name, return_value=(1,) * SLOTS))
        yield


def test_of_256_servers_some_own_nothing() -> None:
    """So is a stored job placed, whose slots must not move."""
    owners = set(place("uid-0", 256))
    assert len(owners) == 254
    copy = HostCopy("uid-0", 256, 1)
    assert copy.servers == sorted(owners)


CONFIGS: dict[str, dict[str, Any]] = {
    "async": {},
    "sync": {"consistency": "Sync"},
    "bounded": {"consistency": "Bounded", "max_staleness": 1},
    "copies": {"replicas": 2, "copies": 2},
    "chain": {"replicas": 2, "chain": True},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def job(request: pytest.FixtureRequest) -> Iterator[SimulatedJob]:
    with all_on_server_1():
        job = SimulatedJob(Settings(**request.param), 0.0, servers=2)
        assert job.until(lambda: quiet(job), ROUNDS), "it begins"
        yield job
        job.close()


def train(job: SimulatedJob, batches: int) -> None:
    for _ in range(batches):
        for worker in job.live_workers:
            worker.step()
        assert job.until(lambda: all(w.idle for w in job.live_workers), ROUNDS)


def ends(job: SimulatedJob, batches: int) -> None:
    """All is quiet, and every batch is everywhere, acknowledged and let go."""

    def acknowledged() -> bool:
        return all(
            w.pushes is not None and w.pushes.acked == batches and not w.pushes.held
            for w in job.live_workers
        )

    assert job.until(lambda: quiet(job) and acknowledged(), ROUNDS)
    marks = job.marks(job.heads[1])
    assert (marks[:, :, :batches] == 1.0).all()
    assert not marks[:, :, batches:].any()
    step = report_of(job.heads[1]).step
    assert step >= batches
    assert not any(w.pushes is not None and w.pushes.lost for w in job.live_workers)
    assert all(not w.pushes.open for w in job.live_workers if w.pushes is not None)


def test_a_job_trains_and_ends(job: SimulatedJob) -> None:
    train(job, 5)
    ends(job, 5)


@pytest.mark.parametrize("replaced", [0, 1])
def test_either_server_is_lost(job: SimulatedJob, replaced: int) -> None:
    train(job, 3)
    ends(job, 3)
    job.crash(job.heads[replaced].me.id)
    train(job, 3)
    ends(job, 6)


@pytest.mark.parametrize("job", [CONFIGS[c] for c in ("async", "sync", "bounded")], indirect=True)
def test_training_goes_on_without_it(job: SimulatedJob) -> None:
    """Under every consistency: nothing that anybody needs is lost."""
    train(job, 2)
    job.crash(job.heads[0].me.id)
    for _ in range(3):
        for worker in job.live_workers:
            worker.step()
        for _ in range(100):
            job.now += 0.03
            job.round()
    assert all(w.idle and w.pushes is not None for w in job.live_workers)
    assert [w.pushes.acked for w in job.live_workers if w.pushes is not None] == [5, 5]
