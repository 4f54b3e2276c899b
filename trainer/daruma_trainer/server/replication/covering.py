"""Covered pushes of one shard: who holds what, and telling workers what they may forget."""

from collections.abc import Callable, Mapping, Sequence
from math import inf

import numpy as np

from daruma_trainer.contract import Membership, Role
from daruma_trainer.layout import Ints
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.cover import Cover, Holder
from daruma_trainer.server.replication.demand import Demand
from daruma_trainer.server.replication.stream import Send, Stream, policy_of
from daruma_trainer.server.replies import worker_of
from daruma_trainer.wire import Frame, Kind, MalformedError, encode_json, from_bitmap

ALONE_SECONDS = 0.1
"""So long what is due waits for a replica that has yet to join. Then there is none."""
COMING_SECONDS = 2.0
"""So long an answer to a pull may be on its way: what it brings need not be sent elsewhere."""
NEVER = int(np.iinfo(np.int64).max)
Tell = Callable[[str, Kind, Sequence[Frame]], bool]


class Covering:
    """Of a head: replicas cover nothing themselves."""

    def __init__(
        self, plane: DataPlane, membership: Membership, clock: Callable[[], float]
    ) -> None:
        self._plane, self._clock = plane, clock
        self._membership = membership
        self._cover = Cover(membership.settings.copies)
        self._demand = Demand()
        self._lacks: Ints = np.ones((len(plane.slots.ids), plane.workers), np.int64)
        """(slots, workers): the first update of a slot that a worker's copy may lack, or NEVER."""
        self._given, self._given_lacks = self._lacks - 1, self._lacks.copy()
        self._given_at = [-inf] * plane.workers
        """Of the last answers to its pulls: as of which update, the same of what they bring, and
        when they went out."""
        self._due_since: float | None = None
        """Since when what waits is due to go to a replica; None: it is not."""

    def follow(self, new: Membership) -> None:
        """Take a newer membership: what a lost worker had is gone with it."""
        for worker in self._membership.of(Role.WORKER):
            if new.member(Role.WORKER, worker.index) != worker:
                self._given[:, worker.index] = 0
                self._lacks[:, worker.index] = self._given_lacks[:, worker.index] = 1
                self._demand.forget(worker.index)
        if new.rollback.generation != self._membership.rollback.generation:
            self._given[:] = 0
            self._lacks[:] = self._given_lacks[:] = 1
            self._cover.forget()
            self._demand = Demand()  # batches come again from the cut's on
        self._membership = new

    @property
    def any(self) -> bool:
        """Whether a push is not covered yet."""
        return self._cover.any

    def changed(self, k: Ints) -> None:
        """The last update changed the slots `k`."""
        for lacks in self._lacks, self._given_lacks:
            lacks[k] = np.minimum(lacks[k], self._plane.updates)

    def pushed(self, worker: int, batch: int) -> None:
        """A worker's push, of this batch or from it on, is in the shard as of its last update."""
        self._cover.pushed(self._plane.updates, worker, batch)
        self._demand.pushed(worker, batch, self._clock())

    def again(self, worker: int) -> None:
        """A worker is to hear once more what is covered."""
        self._cover.again(self._plane.updates, worker)
        self._demand.heard(worker, self._clock())

    def pulled(self, worker: int, k: Ints) -> None:
        """The slots `k` are on their way to a worker, as of the last update."""
        self._given[k, worker], self._given_lacks[k, worker] = self._plane.updates, NEVER
        self._given_at[worker] = self._clock()

    def has(self, member: str, frames: Sequence[Frame]) -> None:
        """HAVE: a worker's copy of some slots has everything up to an update."""
        raw = memoryview(frames[1])
        if len(raw) < 8:
            raise MalformedError("a HAVE without a number")
        plane = self._plane
        update = min(int.from_bytes(raw[:8], "little"), plane.updates)
        k = plane.slots.index_of(np.flatnonzero(from_bitmap(raw[8:])))
        k = k[k >= 0]
        worker = worker_of(member)
        same = self._given[k, worker] == update
        lacks = np.where(same, self._given_lacks[k, worker], update + 1)
        self._lacks[k, worker] = np.maximum(self._lacks[k, worker], lacks)

    @property
    def demanded(self) -> bool:
        """Whether what waits is due to go to a replica."""
        return self._due_since is not None

    def settle(self, chain: Sequence[str], stream: Stream | None, tell: Tell) -> None:
        """Tell workers what is covered now. `chain`: the nodes of the head and its replicas."""
        plane, membership = self._plane, self._membership
        if not self._cover.any:
            self._due_since = None
            return
        nodes = {m.index: m.failure_domain for m in membership.of(Role.WORKER)}
        holders = self._holders(chain, stream)
        everything = np.arange(len(plane.slots.ids))
        for worker, limit in self._cover.settle(nodes, holders).items():
            # A batch may come in parts, of which some are still under way.
            batch = int(min(limit, plane.slots.complete_until(everything, worker)))
            member = membership.member(Role.WORKER, worker)
            if member is not None and self._cover.tell(worker, batch):
                tell(member.id, Kind.COVERED, [encode_json({"batch": batch})])
        if policy_of(membership.settings, plane) is not Send.DEMAND:
            return  # everything goes to replicas by itself
        now = self._clock()
        if not self._due(nodes, holders, now):
            self._due_since = None
        elif self._due_since is None:
            self._due_since = now

    def _due(self, nodes: Mapping[int, str], holders: Sequence[Holder], now: float) -> bool:
        """Whether some of what waits has to go to a replica now."""
        cover, demand, limit = self._cover, self._demand, self._membership.max_uncovered
        # Of workers that wait for each other nobody is late: they only seem a little apart.
        steps = limit + self._membership.repeats
        fresh = [w for w in nodes if now - self._given_at[w] < COMING_SECONDS]
        given = self._everything(self._given_lacks)
        coming = [(nodes[w], given[w], False) for w in fresh]
        for worker, batches in cover.waiting(cover.limits(nodes, [*holders, *coming])).items():
            if len(batches) > limit or demand.rests(worker, now):
                return True
            if len(batches) == limit:
                # Its next push would make it wait: who pulls before that?
                gone = set(self._plane.steps.gone)
                soon = (demand.in_time(worker, steps, now) - gone) & nodes.keys()
                hoped = [(nodes[w], self._plane.updates, False) for w in soon]
                if worker in cover.waiting(cover.limits(nodes, [*holders, *hoped])):
                    return True
        return False

    def _holders(self, chain: Sequence[str], stream: Stream | None) -> list[Holder]:
        """Who has everything up to which update, by node."""
        plane, settings = self._plane, self._membership.settings
        # A replica that has yet to join holds nothing that anybody counts on.
        joined = stream is not None and stream.joined
        reached = stream.covered if stream is not None and joined else plane.updates
        if settings.chain:
            return [("chain", reached, True)]
        found = [(chain[0], plane.updates, True)]
        found += [(node, reached, True) for node in chain[1:] if joined]
        if policy_of(settings, plane) is not Send.DEMAND:
            return found
        due = self._due_since
        if not joined and due is not None and self._clock() - due > ALONE_SECONDS:
            return found  # there is no replica to send it to: as many as there are have to do
        gone = plane.steps.gone
        have = self._everything(self._lacks)
        for m in self._membership.of(Role.WORKER):
            has = have[m.index]
            # One that ended pulls no more: it holds all there is, or is not waited for.
            if m.index not in gone or has >= plane.updates:
                found.append((m.failure_domain, has, False))
        return found

    def _everything(self, lacks: Ints) -> list[int]:
        """By worker: up to which update its copy has everything."""
        found: list[int] = np.minimum(lacks.min(axis=0) - 1, self._plane.updates).tolist()
        return found
