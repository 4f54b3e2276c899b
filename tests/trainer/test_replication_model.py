"""Replicas and copies, model-checked: the real servers and workers over a simulated network.

Connections break with what was on its way, members are parted, killed, or taken for lost while
they go on; the operator looks and tells late. Each batch leaves a mark of its own in the shard, so
what a slot holds can be seen. Whatever happens: no push that a worker was told is covered is lost
by as many failures as were promised, none is applied twice, slots of one version are one wherever
they are, weights are what the batches that their slot has make of them, what is lost is counted
exactly, and it ends: once the network is whole again, all pushes are covered and all replicas have
joined. One server or two, each with its replicas in the other's pod; rollbacks; elastic workers.

Broken on purpose, the protocol is caught here: a push acknowledged before it is forwarded, marks
that a replica leaves out, uncovered pushes dropped, updates taken from a deposed head, no whole
slots after a gap, a known next replica not counted on, held pushes not given again, a middle
replica that answers at once, a floor that leaves the version, a replica that lags and serves, one
that hears too early that it is counted on, a gap in a stream's numbers that nobody notices.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daruma_trainer.contract import Replay, Settings, WorkersMeanwhile
from daruma_trainer.wire import Header, Kind
from simulated_job import SimulatedJob, quiet
from simulated_members import SimulatedServer, SimulatedWorker
from simulated_network import Wire
from simulated_training import TABLES, WORKERS
from soak import counted

CHAIN = Settings(replicas=2, chain=True, ack="Next", meanwhile=WorkersMeanwhile.WAIT)
COPIES = Settings(replicas=2, copies=2, replay=Replay(combine="Sum"))
MODES = {
    "next": (CHAIN, 0.0),
    "tail": (replace(CHAIN, ack="Tail"), 0.5),
    "next of 3": (replace(CHAIN, replicas=3), 0.5),
    "tail of 3": (replace(CHAIN, replicas=3, ack="Tail"), 0.0),
    "tail, all read": (replace(CHAIN, ack="Tail", pulls_from_replicas=True), 0.5),
    "next of 3, all read": (replace(CHAIN, replicas=3, pulls_from_replicas=True), 0.0),
    "none": (replace(CHAIN, ack="None"), 0.0),
    "every 3": (replace(CHAIN, ack="None", every_updates=3), 0.5),
    "every 3, of 3": (replace(CHAIN, replicas=3, ack="None", every_updates=3), 0.0),
    "copies": (COPIES, 0.0),
    "copies, momentum": (COPIES, 0.5),
    "3 copies, momentum": (replace(COPIES, replicas=3, copies=3), 0.5),
}
CONSISTENCY: dict[str, dict[str, Any]] = {
    "async": {"consistency": "Async"},
    "sync": {"consistency": "Sync"},
    "bounded": {"consistency": "Bounded", "max_staleness": 2},
    "sync, elastic": {"consistency": "Sync", "min_replicas": 1},
    "bounded, elastic": {"consistency": "Bounded", "max_staleness": 2, "min_replicas": 1},
}
MANY = 64
ROUNDS = 400
LIMITS = (64, 0, 1, 3)
some = st.integers(0, 5)
bits = st.integers(0, (1 << 48) - 1)


def kinds_of(wire: Wire) -> list[Kind]:
    """What is on its way to a wire's peer."""
    return [Header.decode(message).kind for message in wire.up]


class Bits:
    """Small numbers out of a large one; zeros once it is used up."""

    def __init__(self, choice: int) -> None:
        self._choice = choice

    def take(self, count: int) -> int:
        found = self._choice & ((1 << count) - 1)
        self._choice >>= count
        return found


class Replication(RuleBasedStateMachine):
    job: SimulatedJob

    @initialize(
        mode=st.sampled_from(sorted(MODES)),
        consistency=st.sampled_from(sorted(CONSISTENCY)),
        shared=st.booleans(),
        single=st.booleans(),
        servers=st.integers(1, 2),
        narrow=st.booleans(),
    )
    def begin(
        self,
        mode: str,
        consistency: str = "async",
        shared: bool = False,
        single: bool = False,
        servers: int = 1,
        narrow: bool = False,
    ) -> None:
        config, momentum = MODES[mode]
        config = replace(config, **CONSISTENCY[consistency])
        self.job = SimulatedJob(
            config, momentum, shared=shared, single=single, servers=servers, narrow=narrow
        )
        assert self.job.until(lambda: quiet(self.job), ROUNDS)
        self.job.save()

    # What happens

    @rule(choice=bits)
    def go(self, choice: int) -> None:
        """Workers make a step, messages arrive, members have a turn: some of each."""
        job, draw = self.job, Bits(choice)
        rounds = 1 + draw.take(2)
        limits = [(LIMITS[draw.take(2)], LIMITS[draw.take(2)]) for _ in range(6)]
        turns = [LIMITS[draw.take(2)] for _ in range(5)]
        works = draw.take(2)
        for _ in range(rounds):
            for worker in job.live_workers:
                if works >> worker.me.index & 1 and worker.idle:
                    worker.step()
            job.now += 0.005 * draw.take(2)
            for i, wire in enumerate(list(job.wires)):
                job.move(partial(is_, wire), *limits[i % len(limits)])
            for i, member in enumerate(job.members()):
                job.spin(member, turns[i % len(turns)])

    @rule(worker=st.integers(0, WORKERS))
    def run(self, worker: int) -> None:
        """Workers (or one) go on for a while, as far as they get."""
        for _ in range(6):
            for found in self.job.live_workers:
                if found.idle and worker in (WORKERS, found.me.index):
                    found.step()
            self.job.now += 0.01
            self.job.round()

    @rule(seconds=st.sampled_from([0.02, 0.06, 0.2, 1.2]))
    def wait(self, seconds: float) -> None:
        self.job.now += seconds

    @rule(wire=some, lost=st.integers(0, 5), kept=st.integers(0, 3))
    def cut(self, wire: int, lost: int, kept: int) -> None:
        """A connection breaks; it may come back at once."""
        if self.job.wires:
            self.job.wires[wire % len(self.job.wires)].cut(lost, kept)

    @rule(server=st.integers(0, 1), wire=some, number=some)
    def drop(self, server: int, wire: int, number: int) -> None:
        """A message to a replica is lost, of a connection that stays."""
        self.get_ahead(server)
        streams = [w for w in self.job.wires if set(kinds_of(w)) & {Kind.UPDATE, Kind.WHOLE}]
        if streams:
            streams[wire % len(streams)].drop(number)

    @rule(wire=some, full=st.booleans())
    def jam(self, wire: int, full: bool) -> None:
        """A peer's queue is full, or empty again."""
        if self.job.wires:
            self.job.wires[wire % len(self.job.wires)].full = full

    @rule(a=some, b=some)
    def part(self, a: int, b: int) -> None:
        """Two members, or one and the operator, do not reach each other."""
        members = ["operator", *self.job.members()]
        pair = frozenset((members[a % len(members)], members[b % len(members)]))
        if len(pair) == 2:
            self.job.parted.add(pair)
            for wire in self.job.wires:
                if frozenset((wire.own, wire.peer.id)) == pair:
                    wire.cut(MANY, 0)

    @rule()
    def join(self) -> None:
        self.job.parted.clear()

    @rule(worker=st.integers(0, WORKERS - 1))
    def again(self, worker: int) -> None:
        """A worker begins anew with its server: what it holds is sent twice."""
        for found in self.job.live_workers:
            if found.me.index == worker and found.resumed:
                found._live.begin_all()
                found.spin()

    @rule(member=some, arrive=st.integers(0, 3))
    def crash(self, member: int, arrive: int) -> None:
        members = [m for m in self.job.operator.everybody if self.job.alive(m.id)]
        if len(members) > 2:
            self.job.crash(members[member % len(members)].id, arrive)

    @rule(arrive=st.integers(0, 3), server=st.integers(0, 1))
    def crash_head(self, arrive: int, server: int = 0) -> None:
        if heads := self.job.heads:
            self.job.crash(heads[server % len(heads)].me.id, arrive)

    @rule(server=st.integers(0, 1), arrive=st.integers(0, 2))
    def crash_ahead(self, server: int = 0, arrive: int = 0) -> None:
        """A server is killed that has acknowledged what its replica has yet to get."""
        job, head = self.job, self.get_ahead(server)
        if head is not None and job.alive(head.me.id):
            job.move(lambda w: w.peer.id == head.me.id and w.own in job.workers, MANY, MANY)
            for worker in job.live_workers:
                worker.spin()
            job.crash(head.me.id, arrive)

    def get_ahead(self, server: int) -> SimulatedServer | None:
        """Let a server have what workers push, and nobody else hear of it."""
        job, heads = self.job, self.job.heads
        if not heads:
            return None
        head = heads[server % len(heads)]
        for worker in job.live_workers:
            if worker.idle:
                worker.step()
        for _ in range(2):
            for worker in job.live_workers:
                worker.spin()
            job.move(lambda w: w.peer.id == head.me.id and w.own in job.workers, MANY, MANY)
            job.spin(head.me.id)
        return head

    @rule(server=st.integers(0, 1))
    def depose(self, server: int = 0) -> None:
        """A server that lives is replaced, and nobody but its successor hears of it."""
        operator = self.job.operator
        self.job.suspect(operator.heads[server % self.job.count])
        operator.look(lambda _: True)
        operator.act()
        operator.tell(operator.heads[server % self.job.count])

    @rule(member=some)
    def suspect(self, member: int) -> None:
        """The operator takes a member for lost that goes on."""
        members = self.job.operator.everybody
        self.job.suspect(members[member % len(members)])

    @rule(choice=bits, hurry=st.booleans())
    def decide(self, choice: int, hurry: bool) -> None:
        """The operator decides, by what it knows and what it sees of some now; it tells some."""
        operator, draw = self.job.operator, Bits(choice)
        operator.look(lambda _: bool(draw.take(1)))
        operator.act(hurry=hurry)
        for member in operator.everybody:
            if draw.take(1):
                operator.tell(member)

    @rule()
    def operate(self) -> None:
        self.job.operate()

    @precondition(lambda self: self.job.may_add_table)
    @rule()
    def add_table(self) -> None:
        """Programs declare one more table."""
        self.job.add_table()

    @precondition(lambda self: self.job.cut is not None)
    @rule()
    def roll_back(self) -> None:
        """The operator sends everybody back to where it was last calm."""
        self.job.operator.roll_back()

    @rule()
    def calm(self) -> None:
        """All is well for long enough: it comes to an end, and nothing is missing."""
        job = self.job
        job.parted.clear()
        for wire in job.wires:
            wire.full = False
        assert job.until(lambda: self.flushed() and quiet(job), ROUNDS), "pushes stay uncovered"
        for worker in job.live_workers:
            worker.refresh()
        assert job.until(lambda: self.flushed() and quiet(job), ROUNDS), "no pull"
        self.nothing_is_missing()
        job.renew()
        job.save()

    def flushed(self) -> bool:
        if self.job.settings.consistency != "Async":
            # A step is made of everybody's part; nobody gets far ahead of another.
            workers = self.job.live_workers
            for worker in workers:
                if worker.idle and worker.batch < max(w.batch for w in workers):
                    worker.step()
        return all(
            w.pushes is not None and w.pushes.acked >= w.batch for w in self.job.live_workers
        )

    def nothing_is_missing(self) -> None:
        job = self.job
        assert len(job.heads) == job.count
        for worker in job.live_workers:
            assert worker.pushes is not None
            lost = set(worker.pushes.lost) - worker.void
            job.reported |= {(worker.me.index, b) for b in lost}
        missing = set()
        for head in job.heads:
            has = (job.marks(head) == 1).all(axis=0)
            lacks = {
                (w.me.index, b)
                for w in job.live_workers
                for b in range(1, w.batch + 1)
                if not has[w.me.index, b - 1]
            }
            held = [(w, b) for i, w, b in job.promises if i == head.me.index]
            broken = [
                p for p in held if p in lacks and job.left(job.promises[head.me.index, *p]) >= 0
            ]
            assert not broken, ("covered and lost", sorted(broken))
            missing |= lacks
        counted = {p for p in job.reported if self.current(p)}
        wrong = (missing ^ counted) - job.skipped
        assert not wrong, ("lost and not counted", sorted(wrong))
        self.replicas_equal()

    def current(self, push: tuple[int, int]) -> bool:
        return any(w.me.index == push[0] and push[1] <= w.batch for w in self.job.live_workers)

    def replicas_equal(self) -> None:
        """Replicas have what their head has, but for the last updates where they are told late."""
        job = self.job
        if job.stateless:
            return
        late = job.settings.every_updates - 1
        for head in job.heads:
            assert head.plane is not None
            slots, marks = head.plane.slots, job.marks(head)
            for member in job.operator.chain(head.me.index)[1:]:
                plane = job.servers[member.id].plane
                assert plane is not None
                lacks = (marks != job.marks(job.servers[member.id])).any(axis=0)
                if job.settings.consistency == "Sync":
                    lacks = lacks.any(axis=0)  # a step of all is one update
                assert lacks.sum() <= late, "more than was to be waited for"
                if not late:
                    assert (plane.slots.lineage == slots.lineage).all()
                    assert (plane.slots.position == slots.position).all()

    # What must hold all the time

    @invariant()
    def nothing_is_applied_twice(self) -> None:
        for server in self.job.servers.values():
            marks = self.job.marks(server)
            assert ((marks == 0) | (marks == 1)).all(), "applied twice"

    @invariant()
    def weights_are_what_was_applied(self) -> None:
        for server in self.job.servers.values():
            assert (problem := self.job.wrong(server)) is None, problem

    @invariant()
    def what_has_joined_counts(self) -> None:
        job = self.job
        if job.replicated and not job.stateless and job.operator.recovery is None:
            job.renew()

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        try:
            if sys.exc_info()[0] is None:
                self.calm()
        finally:
            self.job.close()


STORIES, COUNTED = counted("stories of 30 steps: replicas, copies, promotions", 80, 5_000)
Replication.TestCase.settings = settings(
    max_examples=STORIES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestReplication = COUNTED(Replication.TestCase)


# Stories that found something, in short


@pytest.fixture
def story() -> Iterator[Replication]:
    machine = Replication()
    yield machine
    machine.teardown()


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", ["next", "copies", "copies, momentum"])
def test_a_worker_that_did_not_hear_it_is_told_again(
    story: Replication, mode: str, consistency: str
) -> None:
    """What is covered was said once; a worker may not have as many more uncovered as it wants."""
    story.begin(mode, consistency)
    job = story.job
    for worker in job.live_workers:
        worker.step()
    lost = 0
    for _ in range(60):
        job.now += 0.01
        job.round()
        for wire in job.wires:
            if any(Header.decode(message).kind is Kind.COVERED for message in wire.down):
                wire.cut(0, 0)
                lost += 1
    assert lost
    story.calm()


def test_a_push_is_covered_though_its_worker_shares_a_node_with_the_head(
    story: Replication,
) -> None:
    """The other worker's copy would do; but that worker does not pull."""
    story.begin("copies", "async", shared=True)
    story.run(0)
    story.calm()


def test_a_table_comes_with_its_values(story: Replication) -> None:
    """They come later than the table, and replicas may have been sent its zeros."""
    story.begin("next", "async")
    job = story.job
    story.add_table()
    for turn in range(60):
        job.now += 0.03
        for wire in list(job.wires):
            kinds = kinds_of(wire)
            waits = turn < 30 and Kind.INIT in kinds
            job.move(partial(is_, wire), kinds.index(Kind.INIT) if waits else MANY, MANY)
        for member in job.members():
            job.spin(member)
    story.calm()


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", ["next", "tail of 3", "copies", "copies, momentum"])
@pytest.mark.parametrize("comes", ["not at all", "without its values", "to one worker"])
def test_a_server_is_lost_while_a_table_comes(
    story: Replication, mode: str, consistency: str, comes: str
) -> None:
    """What was covered before is, whoever knows the table by then; and the table has its values."""
    story.begin(mode, consistency)
    job = story.job
    story.run(WORKERS)
    story.calm()
    story.crash_ahead()
    story.calm()
    job.specs.append(job.training.weights(TABLES))
    job.cut = None
    first, second = job.live_workers
    head = job.heads[0].me.id
    (first if comes == "to one worker" else second).add_tables()
    stays = comes == "not at all"
    for _ in range(12):
        job.now += 0.03
        job.move(lambda wire: not (stays and wire.own in job.workers), MANY, MANY)
        for member in job.members():
            job.spin(member)
    plane = job.servers[head].plane
    assert plane is not None
    assert (len(plane.shard.tables), bool(plane.given.all())) == {
        "not at all": (2, True), "without its values": (3, False), "to one worker": (3, True)
    }[comes]  # fmt: skip
    if comes == "to one worker" and consistency == "async":
        for worker in (first, second, second):
            worker.step()  # of three tables, and of two
            job.until(lambda: first.idle and second.idle, 20)
    job.crash(head)
    job.until(lambda: False, 40)
    for worker in job.live_workers:
        if len(worker._live.copy.specs) == TABLES:
            worker.add_tables()
    story.calm()
    assert not job.reported
    for server in job.heads:
        assert server.plane is not None
        assert server.plane.given.all()


@pytest.mark.parametrize("mode", ["tail of 3", "3 copies, momentum"])
def test_a_table_comes_to_a_chain_of_three_in_many_messages(story: Replication, mode: str) -> None:
    """The middle answers for what has come to it, or no more would come."""
    story.begin(mode, narrow=True)
    story.run(0)
    story.add_table()
    story.calm()


def test_a_pull_that_lacks_a_table_covers_nothing(story: Replication) -> None:
    story.begin("copies")
    job = story.job
    story.run(WORKERS)
    story.calm()
    first, second = job.live_workers
    job.specs.append(job.training.weights(TABLES))
    first.add_tables()
    assert job.until(lambda: first.idle, 40)
    seen = []
    for worker in (first, second):
        worker.refresh()
        for _ in range(20):
            job.now += 0.01
            job.spin(worker.me.id)
            seen += [(worker, Kind.HAVE) for w in job.wires if Kind.HAVE in kinds_of(w)]
            job.round()
        assert worker.idle
    assert {worker for worker, _ in seen} == {first}
    job.cut = None
    second.add_tables()
    story.calm()


def test_a_lazy_replica_has_a_new_table_at_once(story: Replication) -> None:
    story.begin("every 3, of 3", "async")
    story.add_table()
    story.crash_head(MANY)
    story.calm()


def test_a_step_that_all_others_are_past_is_acknowledged(story: Replication) -> None:
    """Of a push to a promoted replica, whose sender has pulled that step long ago."""
    story.begin("copies", "sync")
    story.run(WORKERS)
    story.add_table()
    story.crash_head(MANY)
    story.calm()


def test_a_replay_is_let_go_whose_acknowledgement_was_lost(story: Replication) -> None:
    story.begin("3 copies, momentum", "async")
    job = story.job
    (wire,) = [w for w in job.wires if w.own == job.live_workers[0].me.id]
    wire.cut(0, 0)
    pair = frozenset((wire.own, wire.peer.id))
    job.parted.add(pair)
    story.run(0)
    story.join()
    for _ in range(60):
        job.now += 0.01
        job.round()
        story.again(0)  # what is answered now says nothing
    story.calm()


@pytest.mark.parametrize("mode", ["none", "every 3"])
def test_a_last_step_is_acknowledged_by_a_server_that_makes_it_again(
    story: Replication, mode: str
) -> None:
    """Its predecessor made it and showed it; another server has yet to."""
    story.begin(mode, "sync", servers=2)
    job = story.job
    story.run(WORKERS)
    story.calm()
    head, other = (server.me.id for server in job.heads)
    for worker in job.live_workers:
        worker.step()
        job.parted.add(frozenset((worker.me.id, other)))
    for wire in list(job.wires):
        if wire.peer.id == other and wire.own in job.workers:
            wire.cut(MANY, 0)
    for _ in range(6):
        job.move(lambda w: w.peer.id == head and w.own in job.workers, MANY, MANY)
        for member in (head, *job.workers):
            job.spin(member)
    job.crash(head)
    job.until(lambda: False, 40)
    story.calm()


SURE = ("next", "tail of 3", "copies", "copies, momentum", "3 copies, momentum")


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("consistency", ["async", "sync", "bounded"])
@pytest.mark.parametrize("mode", SURE)
def test_what_a_lost_server_had_alone_is_given_again(
    story: Replication, mode: str, consistency: str, servers: int
) -> None:
    """Twice: the second time to who was the second replica, or has followed since."""
    story.begin(mode, consistency, servers=servers, single=True)
    story.run(WORKERS)
    for _ in range(2):
        story.crash_ahead()
        for _ in range(4):
            story.operate()
            story.job.now += 0.3
            story.job.round()
    story.calm()
    assert not story.job.reported


@pytest.mark.parametrize("consistency", ["async", "sync"])
@pytest.mark.parametrize("mode", SURE)
def test_nobody_hears_of_a_promotion(story: Replication, mode: str, consistency: str) -> None:
    """Workers push to the one that was deposed, and what it says to its replica comes late."""
    story.begin(mode, consistency)
    job = story.job
    story.run(WORKERS)
    old = job.heads[0].me.id
    story.depose()
    for worker in job.live_workers:
        worker.step()
    for turn in range(24):
        job.now += 0.03
        if turn == 4:  # the old one has what they pushed; from now on they push to the new one
            for told in job.operator.members.values():
                job.operator.tell(told)
        for member in job.members():
            job.spin(member)
        job.move(lambda w: w.own != old, MANY, MANY)
    job.move(lambda w: w.own == old, MANY, MANY)
    story.calm()


@pytest.mark.parametrize("mode", ["tail of 3", "3 copies, momentum"])
def test_two_are_lost_before_the_third_has_it(story: Replication, mode: str) -> None:
    story.begin(mode)
    job = story.job
    story.run(WORKERS)
    story.calm()
    head, second, third = job.operator.chain(0)
    for worker in job.live_workers:
        worker.step()
    for _ in range(10):
        job.now += 0.03
        job.move(lambda w: w.peer != third, MANY, MANY)
        for member in job.members():
            job.spin(member)
    assert all(
        worker.pushes is not None and worker.pushes.uncovered(0) for worker in job.live_workers
    )
    job.operate()
    for lost in (head, second):
        job.crash(lost.id)
    story.calm()
    assert not job.reported


def test_a_replica_that_lags_does_not_serve_what_workers_have_newer(story: Replication) -> None:
    story.begin("copies")
    job = story.job
    story.run(WORKERS)
    story.calm()
    for act in (SimulatedWorker.step, SimulatedWorker.refresh):
        for worker in job.live_workers:
            act(worker)
        for _ in range(6):
            job.round()
    assert not any(w.pushes is not None and w.pushes.uncovered(0) for w in job.live_workers)
    head, replica = (job.servers[m.id].plane for m in job.operator.chain(0))
    assert head is not None
    assert replica is not None
    assert (head.slots.last > replica.slots.last).any()
    story.crash_head(0)
    story.calm()
    assert not job.reported


def test_what_a_later_life_makes_again_is_not_counted_as_lost(story: Replication) -> None:
    """A worker counted a batch as lost, and died; the server that knew that too. Nobody else does,
    so the worker's replacement makes it again."""
    story.begin("every 3, of 3", "bounded, elastic", servers=2)
    story.run(0)
    story.add_table()
    story.calm()
    story.operate()
    story.depose(1)
    story.wait(1.2)
    for arrive in (2, 1):
        story.crash_ahead(arrive=arrive)
        story.calm()
    story.crash(member=3, arrive=0)
    story.crash(member=0, arrive=1)
    story.calm()


def test_what_a_worker_said_it_holds_is_kept_until_it_is_sent(story: Replication) -> None:
    """A server and its first replica died: the second one lacks a batch that both had. Its worker
    said that it holds it, and then heard from the other server, which was the last to take it."""
    story.begin("every 3, of 3", "async", servers=2, shared=True)
    story.crash_ahead(server=1, arrive=1)
    story.decide(choice=335316, hurry=False)
    story.crash_ahead(server=1, arrive=0)
    story.calm()
