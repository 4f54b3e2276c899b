"""Covered pushes of one shard: who holds what, and telling workers what they may forget."""

from collections.abc import Callable, Sequence

import numpy as np

from daruma_trainer.contract import Membership, Role
from daruma_trainer.layout import Ints
from daruma_trainer.server.data import DataPlane, worker_of
from daruma_trainer.server.replication.cover import Cover, Holder
from daruma_trainer.server.replication.stream import Send, Stream, policy_of
from daruma_trainer.wire import Frame, Kind, MalformedError, encode_json, from_bitmap

DEMAND_SECONDS = 0.1
"""So long a push may wait for others to pull it. Then it is sent to a replica: nobody may come."""
Tell = Callable[[str, Kind, Sequence[Frame]], bool]


class Covering:
    """Of a head: replicas cover nothing themselves."""

    def __init__(
        self, plane: DataPlane, membership: Membership, clock: Callable[[], float]
    ) -> None:
        self._plane, self._clock = plane, clock
        self._membership = membership
        self.cover = Cover(membership.settings.copies)
        self._have: Ints = np.zeros((plane.workers, len(plane.slots.ids)), np.int64)
        """(workers, slots): up to which update each worker's copy of a slot has everything."""
        self._told_at = clock()
        """When there was last nothing that waited to be covered, or some of it was."""

    def follow(self, new: Membership) -> None:
        """Take a newer membership: what a lost worker had is gone with it."""
        for worker in self._membership.of(Role.WORKER):
            if new.member(Role.WORKER, worker.index) != worker:
                self._have[worker.index] = 0
        if new.rollback.generation != self._membership.rollback.generation:
            self.cover.forget()
        self._membership = new

    def has(self, member: str, frames: Sequence[Frame]) -> None:
        """HAVE: a worker's copy of some slots has everything up to an update."""
        raw = memoryview(frames[1])
        if len(raw) < 8:
            raise MalformedError("a HAVE without a number")
        plane = self._plane
        update = min(int.from_bytes(raw[:8], "little"), plane.updates)
        k = plane.slots.index_of(np.flatnonzero(from_bitmap(raw[8:])))
        k = k[k >= 0]
        row = self._have[worker_of(member)]
        row[k] = np.maximum(row[k], update)

    @property
    def _waited(self) -> bool:
        """Whether pushes wait for long, and nobody's were covered meanwhile."""
        return self.cover.any and self._clock() - self._told_at > DEMAND_SECONDS

    @property
    def demanded(self) -> bool:
        """Whether a worker has as many uncovered pushes as it may have, or one for long."""
        if self._waited:
            return True
        limit = self._membership.settings.max_uncovered
        return any(self.cover.waiting(w) >= limit for w in range(self._plane.workers))

    def settle(self, chain: Sequence[str], stream: Stream | None, tell: Tell) -> None:
        """Tell workers what is covered now. `chain`: the nodes of the head and its replicas."""
        plane, membership = self._plane, self._membership
        if not self.cover.any:
            self._told_at = self._clock()
            return
        nodes = {m.index: m.failure_domain for m in membership.of(Role.WORKER)}
        everything = np.arange(len(plane.slots.ids))
        for worker, limit in self.cover.settle(nodes, self._holders(chain, stream)).items():
            self._told_at = self._clock()
            # A batch may come in parts, of which some are still under way.
            batch = int(min(limit, plane.slots.complete_until(everything, worker)))
            member = membership.member(Role.WORKER, worker)
            if member is not None and self.cover.tell(worker, batch):
                tell(member.id, Kind.COVERED, [encode_json({"batch": batch})])

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
        if not joined and self._waited:
            return found  # there is no replica to send it to: as many as there are have to do
        gone = plane.left | plane.ended
        for m in self._membership.of(Role.WORKER):
            has = int(self._have[m.index].min())
            # One that ended pulls no more: it holds all there is, or is not waited for.
            if m.index not in gone or has >= plane.updates:
                found.append((m.failure_domain, has, False))
        return found
