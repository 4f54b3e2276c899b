"""When a head sends to a replica what no other worker's copy covers: as little as it can.

A real shard and the real covering; time, workers and the replica are simulated. A worker makes a
step every so many seconds: its push arrives, its pull is answered, later its copy has that.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from daruma_trainer.contract import Member, Membership, Role, Rollback, Settings
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.covering import COMING_SECONDS, Covering
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.wire import Frame, Kind, Push, bitmap, decode_json, mask_of

SENT_SECONDS = 0.05
"""Until a replica has what it is sent, unless a test says otherwise."""
STEPS = 60


@dataclass
class World:
    """One head with a replica, and workers on nodes of their own."""

    nodes: Sequence[str]
    """Of the workers."""
    limit: int = 2
    sync: bool = False
    takes: float = SENT_SECONDS
    now: float = 100.0
    sent: int = 0
    """How often all slots went to the replica."""
    reached: int = 0
    """Up to which update the replica has everything."""
    told: dict[int, int] = field(default_factory=dict)
    _number: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        members: tuple[Member, ...] = (Member(Role.SERVER, 0, 1, "s0", "s:0", "head"),)
        members += tuple(
            Member(Role.WORKER, i, 1, f"w{i}", f"w:{i}", node) for i, node in enumerate(self.nodes)
        )
        settings = Settings(
            copies=2, replicas=2, max_uncovered=self.limit,
            consistency="Sync" if self.sync else "Async",
        )  # fmt: skip
        new = Membership("uid", "n", "j", 1, 1, len(self.nodes), members, settings)
        self.plane = DataPlane(new, 0, 1)
        assert self.plane.add_table(TableSpec(0, "t", (64, 2), 1, rule_to_json(SGD()))) is None
        self.k = np.arange(len(self.plane.slots.ids))
        self.plane.note_given(self.k)
        self.plane.restored(self.k)
        me = Identity("n", "j", Role.SERVER, 0, 1, "token")
        around, connect = cast("Any", SimpleNamespace(tell=self._tell)), cast("Any", None)
        replicator = self._replicator = Replicator(me, connect, around, lambda: self.now)
        replicator.attach(self.plane)
        replicator.follow(new)
        replicator.turn(())
        assert isinstance(replicator._covering, Covering)
        self.covering = replicator._covering
        self._todo: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._todo, (self.now + seconds, next(self._number), what))

    def push(self, worker: int, batch: int) -> None:
        self.step(batch, [worker], self.k)

    def step(self, batch: int, workers: Sequence[int], k: Ints) -> None:
        """Make an update of these slots out of a push of each worker."""
        self.plane.updates += 1
        for worker in workers:
            self.plane.slots.advance(k, worker, batch, batch)
        if self.sync:
            self._replicator.stepped(batch, workers, k, None)
            return
        mask = mask_of(self.plane.slots.ids[k])
        for worker in workers:
            self._replicator.pushed(Push(worker, batch, batch, 1, 0, mask, ()), [], k)

    def pull(self, worker: int, seconds: float, k: Ints | None = None) -> None:
        """Answer a pull of all slots, or of some, which is there after so many seconds."""
        k = self.k if k is None else k
        self.covering.pulled(worker, k)
        update = self.plane.updates.to_bytes(8, "little")
        have: list[Frame] = [b"", update + bitmap(mask_of(self.plane.slots.ids[k]))]
        self.at(seconds, lambda: self.covering.has(f"worker-{worker}-1", have))

    def run(self, seconds: float, dt: float = 0.01) -> None:
        """Let time pass; the loop turns whenever something comes, and now and then."""
        end = self.now + seconds
        while self.now < end:
            due = self._todo[0][0] if self._todo else end
            self.now = min(due, self.now + dt, end)
            while self._todo and self._todo[0][0] <= self.now:
                heapq.heappop(self._todo)[2]()
            self.turn()

    def turn(self) -> None:
        stream: Any = SimpleNamespace(joined=True, covered=self.reached)
        self.covering.settle(["head", "other"], stream, self._tell)
        if self.covering.demanded and self._sending != self.plane.updates:
            self._sending = self.plane.updates
            self.sent += 1
            self.at(self.takes, self._arrived(self._sending))

    _sending = 0

    def _arrived(self, update: int) -> Callable[[], None]:
        def arrived() -> None:
            self.reached = max(self.reached, update)

        return arrived

    def _tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        assert kind is Kind.COVERED
        self.told[int(member.split("-")[1])] = decode_json(body[0])["batch"]
        return True


def trains(
    world: World,
    worker: int,
    gaps: Callable[[int], float],
    pull: float,
    *,
    steps: int = STEPS,
    waited: list[float] | None = None,
) -> None:
    """Let a worker make steps as `Job.exchange` does: it waits for its pull and for its pushes."""
    made = itertools.count(1)

    def step() -> None:
        batch = next(made)
        if batch > steps:
            return
        world.push(worker, batch)
        world.pull(worker, pull)
        world.at(pull, lambda: think(batch, world.now))

    def think(batch: int, since: float) -> None:
        if batch - world.told.get(worker, 0) > world.limit:
            world.at(0.005, lambda: think(batch, since))
            return
        if waited is not None:
            waited.append(world.now - since)
        world.at(max(0.0, gaps(batch) - pull), step)

    step()


@pytest.mark.parametrize("pull", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("phase", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("second", [0.02, 1.0, 20.0])
def test_workers_of_one_pace_cover_each_others_pushes(
    second: float, phase: float, pull: float
) -> None:
    """However long their steps are, and how much of one a pull takes: hardly anything is sent."""
    world, waited = World(["a", "b"]), list[float]()
    trains(world, 0, lambda _: second, second * pull, waited=waited)
    world.at(phase * second, lambda: trains(world, 1, lambda _: second, second * pull))
    world.run(second * (STEPS - 2), second / 50)
    assert world.sent <= 2, "but the first pushes, of workers whose pace nobody knows"
    assert max(waited) <= 0.02 * second, "nobody waited"
    assert min(world.told.values()) >= STEPS - 5


def test_nothing_is_sent_where_workers_wait_for_each_other() -> None:
    """A step is everybody's; which of them is entered first says nothing of their pace."""
    world, draw = World(["a", "b"], sync=True), random.Random(0)

    def step(batch: int) -> None:
        world.plane.updates += 1
        world.covering.changed(world.k)
        for worker in draw.sample((0, 1), 2):
            world.now += draw.uniform(1e-6, 1e-4)
            world.plane.slots.advance(world.k, worker, batch, batch)
            world.covering.pushed(worker, batch)
        world.at(0.001, lambda: pull(batch))
        world.turn()

    def pull(batch: int) -> None:
        if min(world.told.get(w, 0) for w in (0, 1)) < batch - 1:
            world.at(0.001, lambda: pull(batch))
            return
        for worker in (0, 1):
            world.pull(worker, 0.05)
        world.at(0.2, lambda: step(batch + 1))

    step(1)
    world.run(0.2 * STEPS)
    assert min(world.told.values()) >= STEPS - 4
    assert world.sent <= 2


def test_nothing_is_sent_where_a_step_is_made_and_pulled_part_by_part() -> None:
    """Each part is answered once it is made, so as of another update: a copy has them all yet."""
    world = World(["a", "b"], limit=1, sync=True)
    parts = np.array_split(world.k, 4)

    def step(batch: int) -> None:
        for number, k in enumerate(parts):
            world.at(0.02 * number, partial(make, batch, k))
        world.at(0.02 * 4, lambda: world.at(0.2, lambda: begin(batch + 1)))

    def make(batch: int, k: Ints) -> None:
        world.step(batch, (0, 1), k)
        for worker in (0, 1):
            world.pull(worker, 0.1, k)

    def begin(batch: int) -> None:
        if min(world.told.get(w, 0) for w in (0, 1)) < batch - 1:
            world.at(0.001, lambda: begin(batch))
        else:
            step(batch)

    step(1)
    world.run(0.3 * STEPS)
    assert min(world.told.values()) >= STEPS - 10
    assert world.sent <= 2


def test_unsteady_workers_send_little() -> None:
    """Steps take from half to twice as long as others, by chance."""
    draw = np.random.default_rng(0)
    world = World(["a", "b"])
    for worker in range(2):
        trains(world, worker, lambda _: float(draw.uniform(0.1, 0.4)), 0.08, steps=10_000)
    world.run(100.0)
    pushes = sum(world.told.values())
    assert pushes > 700
    assert world.sent / pushes < 0.05


def test_a_worker_that_is_much_faster_does_not_wait_for_the_others() -> None:
    """They pull too seldom for it: what it pushed goes to the replica before it has to wait."""
    world, waited = World(["a", "b"]), list[float]()
    trains(world, 0, lambda _: 0.2, 0.05, steps=200, waited=waited)
    trains(world, 1, lambda _: 2.0, 0.05)
    world.run(30.0)
    assert world.sent > 40
    assert sum(waited[10:]) < 0.02, "but at first, while nobody knows their paces"


@pytest.mark.parametrize("nodes", [["a"], ["a", "a"], ["a", "head"]])
def test_what_no_other_node_pulls_is_sent_once_a_worker_has_as_much_as_it_may(
    nodes: list[str],
) -> None:
    world, waited = World(nodes, limit=4), list[float]()
    trains(world, 0, lambda _: 0.2, 0.05, waited=waited)
    world.run(0.2 * (STEPS - 1))
    assert world.told[0] >= STEPS - 5
    assert world.sent == pytest.approx(STEPS / 4, abs=2), "one whole state for four pushes"
    assert max(waited) < 0.01


def test_what_a_pull_is_bringing_is_not_sent_too() -> None:
    """Though a worker waits for it. But not for ever: a copy may never come."""
    world = World(["a", "b"])
    for batch in (1, 2, 3):
        world.push(0, batch)
    world.pull(1, 60.0)
    world.run(COMING_SECONDS - 0.1)
    assert world.sent == 0
    world.run(0.3)
    assert world.sent == 1
    assert world.told == {0: 3}


def test_a_last_push_is_sent_when_nobody_comes_for_it() -> None:
    world = World(["a", "b"])
    trains(world, 0, lambda _: 1.0, 0.1, steps=10)
    trains(world, 1, lambda _: 1.0, 0.1, steps=5)
    world.run(30.0)
    assert world.told[0] == 10


def test_a_lost_workers_pulls_bring_nothing() -> None:
    world = World(["a", "b"])
    for batch in (1, 2, 3):
        world.push(0, batch)
    world.pull(1, 60.0)
    members = world.covering._membership

    successor = Member(Role.WORKER, 1, 2, "w1", "w:1", "b")
    found = tuple(successor if m.id == "worker-1-1" else m for m in members.members)
    world.covering.follow(replace(members, epoch=2, members=found))
    world.run(0.1)
    assert world.sent == 1


def go_back(world: World) -> None:
    """All members go back to a cut of the beginning."""
    world.covering.follow(
        replace(world.covering._membership, epoch=2, rollback=Rollback(1, "cuts/0.json"))
    )


def replace_both(world: World) -> None:
    """Both workers are replaced, and their successors make their batches again."""
    old = world.covering._membership
    found = tuple(replace(m, incarnation=2) if m.role is Role.WORKER else m for m in old.members)
    world.covering.follow(replace(old, epoch=2, members=found))
    for worker in range(2):
        world.covering.again(worker)


@pytest.mark.parametrize("happens", [go_back, replace_both])
def test_batches_that_come_again_have_a_pace_too(happens: Callable[[World], None]) -> None:
    """Nobody rests who makes older numbers again; and hardly anything is sent, as before."""
    world = World(["a", "b"])
    for worker in range(2):
        trains(world, worker, lambda _: 1.0, 0.4)
    world.run(STEPS + 5.0)
    happens(world)
    world.sent = 0
    for worker in range(2):
        trains(world, worker, lambda _: 1.0, 0.4, steps=STEPS // 2)
    world.run(STEPS // 2 - 1.5)
    assert world.sent <= 2


def test_a_worker_that_begins_a_session_anew_makes_no_step_by_that() -> None:
    """What it holds goes out again; it rests no less for that, and its pace stays what it is."""
    world = World(["a", "b"])
    for batch in (1, 2, 3):
        world.push(0, batch)
        world.run(1.0)
    demand = world.covering._demand
    world.covering.again(0)
    assert not demand.rests(0, world.now + 0.9)
    world.run(5.0)
    world.covering.again(0)
    assert demand.rests(0, world.now)


def test_a_copy_has_what_came_and_no_other_slot() -> None:
    world = World(("a", "b"))
    world.push(0, 1)
    update = world.plane.updates.to_bytes(8, "little")
    for k, told in ((world.k[:512], {}), (world.k[512:], {0: 1})):
        world.covering.has("worker-1-1", [b"", update + bitmap(mask_of(world.plane.slots.ids[k]))])
        world.turn()
        assert world.told == told


@pytest.mark.parametrize("sync", [False, True])
def test_an_answer_that_came_does_not_count_for_what_was_pushed_since(sync: bool) -> None:
    """Neither where the next answer is under way, which has it, nor in one slot."""
    world = World(["a", "b"], sync=sync, takes=100.0)
    world.push(0, 1)
    world.pull(1, 1.0)
    world.push(0, 2)
    world.pull(1, 2.0)
    world.push(0, 3)
    for batch, seconds in ((1, 1.5), (2, 1.0)):
        world.run(seconds)
        assert world.told == {0: batch}
    for batch, k in ((2, world.k[1:]), (3, world.k[:1])):
        world.pull(1, 0.1, k)
        world.run(0.2)
        assert world.told == {0: batch}


def test_copies_of_before_a_rollback_cover_nothing() -> None:
    world = World(["a", "b"], takes=100.0)
    world.push(0, 1)
    world.pull(1, 0.1)
    world.run(0.2)
    assert world.told == {0: 1}
    world.told.clear()
    go_back(world)
    world.covering.again(0)
    world.run(0.05)
    assert not world.told


def test_what_changes_otherwise_is_lacking_too() -> None:
    """As what came back with a restore: of who says that it wants to hear of all that is here."""
    world = World(["a", "b"], takes=100.0)
    world.pull(1, 0.0)
    world._replicator.touched(world.k[:1])
    world.covering.again(0)
    world.plane.slots.advance(world.k, 0, 1, 1)
    world.run(0.05)
    assert not world.told
    world.pull(1, 0.0)
    world.run(0.05)
    assert world.told == {0: 1}
