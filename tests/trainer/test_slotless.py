"""Servers that own no slot, as some of very many do: nobody waits for them, or for what they have.

A small job stands for one of 256 servers: there `place` gives all slots to server 1.
"""

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from daruma_trainer.checkpoint.loading import load
from daruma_trainer.checkpoint.manifest import newest_cut
from daruma_trainer.contract import (
    SLOTS,
    Member,
    Membership,
    Report,
    Restore,
    Role,
    Rollback,
    Settings,
    place,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.server.lifecycle import Lifecycle
from daruma_trainer.server.reporting import report_of
from daruma_trainer.worker.copies import HostCopy
from saving_world import COLS, ROWS, World
from simulated_job import SimulatedJob, quiet

PREFIX = "ns/job/uid"
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


@pytest.fixture(params=list(CONFIGS.values()), ids=list(CONFIGS))
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
    # A session with it is none that is tried for ever.
    assert all(w._live.synced(0) and not w._live.unsettled for w in job.live_workers)


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
    assert not any(w._live.away() or w.outages.on for w in job.live_workers)
    job.crash(job.heads[0].me.id)
    assert all(w.outages.on for w in job.live_workers if job.round()), "as with any other"


def test_a_replacement_is_ready_before_any_worker_comes() -> None:
    """They may all have left: nobody is there to say which tables there are."""
    with all_on_server_1():
        job = SimulatedJob(Settings(), 0.0, servers=2)
        assert job.until(lambda: quiet(job), ROUNDS)
        job.crash(job.heads[0].me.id)
        while not (job.heads[0].me.incarnation > 1 and job.heads[0].epoch):
            job.operate()
            for server in job.servers.values():
                server.spin()
        assert report_of(job.heads[0]).state == "Ready"
        job.close()


# Cuts


class Pair:
    """Servers 0, which has no slot, and 1 of a job of one worker; what they tell comes at once."""

    def __init__(self, folder: Path, consistency: str) -> None:
        self.folder = folder
        self.worlds = [
            World(folder, 2, index=i, running=False, consistency=consistency) for i in (0, 1)
        ]
        for world in self.worlds:
            world.cuts.tell = lambda i, m: self.worlds[i].cuts.receive(m, 0)

    def train(self, batches: int) -> None:
        for _ in range(batches):
            self.worlds[1].train(1)
            for world in [*self.worlds, *self.worlds]:
                world.cuts.tick()
                world.background.run()


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with all_on_server_1():
        yield Pair(tmp_path, request.param)


@pytest.mark.parametrize("pair", ["Async", "Sync", "Bounded"], indirect=True)
def test_cuts_are_taken_of_the_others_steps_and_batches(pair: Pair) -> None:
    pair.train(4)
    reached = 4
    if pair.worlds[1].plane.hold is not None:
        (reached,) = pair.worlds[1].plane.hold
        pair.train(reached - 4)
    newest = pair.worlds[1].cuts.newest
    assert newest is not None
    assert newest.step == reached
    found = newest_cut(pair.worlds[1].store, PREFIX)
    assert found is not None
    assert (found[1].step, found[1].batches) == (reached, (reached,))
    for world in pair.worlds:
        world.cuts.take_final("f")
        world.background.run()
    assert pair.worlds[1].cuts.final == f"{PREFIX}/cuts/f.json"
    tables = load(f"file://{pair.folder}/{PREFIX}/cuts/f.json")
    assert {name: values.tolist() for name, values in tables.items()} == {
        "t": np.full((ROWS, COLS), reached, np.float32).tolist()
    }


@pytest.mark.parametrize("pair", ["Async", "Sync"], indirect=True)
def test_alone_it_begins_no_cut(pair: Pair) -> None:
    """All others are lost; it is at the step that they were at."""
    world = pair.worlds[0]
    lost = tuple(replace(m, address=None) if m.index else m for m in world.membership.members)
    world.cuts.follow_membership(replace(world.membership, epoch=2, members=lost))
    world.plane.steps.heard(8)
    world.cuts.tick()
    assert world.plane.hold is None
    assert not world.background.jobs


class Newcomer:
    """Incarnation 9 of server 0; its loop is turned by hand."""

    def __init__(self, folder: Path, **membership: Any) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        around: Any = SimpleNamespace(
            post=self.calls.put,
            publish=nothing,
            fetch=nothing,
            tell_workers=nothing,
            tell_cut=nothing,
        )
        self.life = Lifecycle(Identity("ns", "job", Role.SERVER, 0, 9, ""), around)
        settings = Settings(store=f"file://{folder}", every=4, cuts=True)
        members = tuple(Member(Role.SERVER, i, 9 - 8 * i, f"s{i}", f"a:{i}") for i in (0, 1))
        new = Membership("uid", "ns", "job", 9, 2, 1, members, settings, initialised=True)
        self.life.adopt(replace(new, **membership), replica=False)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.calls.get(timeout=30.0)()
            self.life.tick()


@pytest.mark.parametrize("pair", ["Sync"], indirect=True)
def test_it_goes_back_to_a_cut_and_counts_on_with_the_others(pair: Pair) -> None:
    pair.train(4)
    newest = pair.worlds[1].cuts.newest
    assert newest is not None
    new = Newcomer(pair.folder, rollback=Rollback(1, newest.path))
    new.until(lambda: new.life.initialised and not new.life.rolling)
    plane = new.life.plane
    assert plane is not None
    assert plane.step == 4
    wrong: list[dict[str, Any]] = [{"generation": 0}, {"state": "Restoring"}, {"id": "worker-0-1"}]
    heard = Report("server-1-1", 9, "Ready", generation=1, step=6)
    for changes in wrong:
        new.life.heard(replace(heard, **changes))
        assert plane.step == 4
    new.life.heard(heard)
    assert plane.step == 6
    new.life.close(10.0)


def test_a_plan_for_it_is_done_at_once(tmp_path: Path) -> None:
    with all_on_server_1():
        new = Newcomer(tmp_path)
        new.life.restore(Restore(9, 9, "server-0-9", ()))
        plane = new.life.plane
        assert plane is not None
        new.until(lambda: plane.sums.inexact)
        restorer = new.life.restorer
        assert restorer is not None
        assert restorer.report is not None
        assert (restorer.report.done, restorer.report.missing) == (True, 0)
        # There is no sum that a worker could have to make again.
        spec = TableSpec(0, "sum", (ROWS, COLS), 1, rule_to_json(Add()))
        assert plane.add_table(spec) is None
        assert not plane.sums.lacking(1)
        new.life.close(10.0)
