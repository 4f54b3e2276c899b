"""Replicas and copies, model-checked: the real servers and workers over a simulated network.

Connections break with what was on its way, messages are lost or come twice, members are parted,
killed, or taken for lost while they go on; the operator looks and tells late. Each batch leaves a
mark of its own in the shard, so what a slot holds can be seen. Whatever happens: no push that a
worker was told is covered is lost by as many failures as were promised, none is applied twice,
slots of one version are one wherever they are, weights are what the batches that their slot has
make of them, what is lost is counted exactly, and it ends: once the network is whole again, all
pushes are covered and all replicas have joined. One server or two, each with its replicas in the
other's pod; rollbacks; elastic workers.

Broken on purpose, the protocol is caught here: a push acknowledged before it is forwarded, marks
that a replica leaves out, uncovered pushes dropped, updates taken from a deposed head, no whole
slots after a gap, a known next replica not counted on, held pushes not given again, a middle
replica that answers at once, a floor that leaves the version, a replica that lags and serves, one
that hears too early that it is counted on, a gap in a stream's numbers that nobody notices.
"""

import sys
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daruma_trainer.contract import Replay, Settings, WorkersMeanwhile
from daruma_trainer.wire import Header, Kind
from simulated_job import SimulatedJob, quiet
from simulated_members import SimulatedServer
from simulated_network import Wire
from simulated_training import WORKERS

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

    @rule(wire=some, number=some, later=some, down=st.booleans())
    def repeat(self, wire: int, number: int, later: int, *, down: bool) -> None:
        """A message comes twice."""
        if self.job.wires:
            self.job.wires[wire % len(self.job.wires)].repeat(number, later, down=down)

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
        job.reported |= self.counted() - job.void
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
        # Marks are not in every slot: a slot without any may lack what those have.
        wrong = ((missing ^ counted) - job.skipped) - (job.lagging - missing)
        assert not wrong, ("lost and not counted", sorted(wrong))
        self.replicas_equal()

    def counted(self) -> set[tuple[int, int]]:
        """What workers count as lost."""
        workers = self.job.live_workers
        return {(w.me.index, b) for w in workers if w.pushes is not None for b in w.pushes.lost}

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
