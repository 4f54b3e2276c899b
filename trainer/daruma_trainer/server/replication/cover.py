"""Which pushes are covered: on as many nodes as the job asks for, the sender's not counted. Pure.

A node is what is lost together (Member.failure_domain).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

Holder = tuple[str, int, bool]
"""A node; up to which update it has everything; whether as a shard, not as a worker's copy."""


@dataclass(slots=True)
class Cover:
    """Of one shard. Updates are numbered as the shard makes them."""

    copies: int
    """On how many nodes."""
    told: dict[int, int] = field(default_factory=dict)
    """By worker: the last batch that was said to be covered."""
    _pending: list[tuple[int, int, int]] = field(default_factory=list)
    """(update, worker, its first batch), in order."""

    @property
    def any(self) -> bool:
        """Whether a push is not covered yet."""
        return bool(self._pending)

    def pushed(self, update: int, worker: int, batch: int) -> None:
        """A worker's push, of this batch or from it on, is in the shard as of this update."""
        if batch <= self.told.get(worker, 0):
            # It makes its predecessor's batch again, and heard of that before it held it.
            self.told[worker] = batch - 1
        self._pending.append((update, worker, batch))

    def again(self, update: int, worker: int) -> None:
        """A worker is to hear once more what is covered, of all that is here as of this update.

        It may have missed it, or pushed to a server before this one.
        """
        self.told.pop(worker, None)
        self._pending.append((update, worker, 1))

    def waiting(self, limits: Mapping[int, float] = MappingProxyType({})) -> dict[int, set[int]]:
        """By worker: its batches that are not covered yet, of updates above its limit if any."""
        found: dict[int, set[int]] = {}
        for update, worker, batch in self._pending:
            if update > limits.get(worker, -inf):
                found.setdefault(worker, set()).add(batch)
        return found

    def limits(self, nodes: Mapping[int, str], holders: Iterable[Holder]) -> dict[int, float]:
        """Return, by worker that has pushes here, up to which update these are covered.

        `nodes`: by worker, its node. Where there are fewer nodes than asked for, as many as there
        are have to do. Shards on so many nodes are enough, the sender's among them: they are sent
        to, while a worker pulls when it likes.
        """
        best: dict[str, int] = {}
        shards: dict[str, int] = {}
        for node, update, shard in holders:
            best[node] = max(best.get(node, 0), update)
            if shard:
                shards[node] = max(shards.get(node, 0), update)
        held = sorted(shards.values(), reverse=True)[self.copies - 1 : self.copies]
        # The best nodes; a sender's own is passed over.
        ranked = sorted(best, key=best.__getitem__, reverse=True)
        place = {node: i for i, node in enumerate(ranked)}
        limits: dict[int, float] = {}
        for worker in {w for _, w, _ in self._pending}:
            own = place.get(nodes.get(worker, ""), len(ranked))
            enough = min(self.copies, len(ranked) - (own < len(ranked)))
            last = enough - 1 + (own < enough)
            limits[worker] = max([best[ranked[last]] if enough else inf, *held])
        return limits

    def settle(self, nodes: Mapping[int, str], holders: Iterable[Holder]) -> dict[int, float]:
        """Return of workers with pushes that are covered now up to which batch all are.

        See `limits`.
        """
        limits = self.limits(nodes, holders)
        covered = {w for update, w, _ in self._pending if update <= limits[w]}
        self._pending = [p for p in self._pending if p[0] > limits[p[1]]]
        return {
            w: min((b - 1 for _, v, b in self._pending if v == w), default=inf) for w in covered
        }

    def tell(self, worker: int, batch: int) -> bool:
        """Note that a worker hears this; False if it is no news."""
        if batch <= self.told.get(worker, 0):
            return False
        self.told[worker] = batch
        return True

    def forget(self) -> None:
        """A rollback: nothing that was pushed counts any more."""
        self._pending.clear()
        self.told.clear()
