"""The step that a shard is at, and which workers the next one waits for.

Pure bookkeeping, of what each slot has of each worker. `Sync`, `Bounded`: the slowest worker's
clock; `Async`: acknowledged pushes ÷ workers.
"""

import numpy as np

from daruma_trainer.contract import Membership
from daruma_trainer.layout import Ints
from daruma_trainer.server.seats import Seats
from daruma_trainer.server.slots import Slots

EVERYTHING = 1 << 40
"""More than any batch or step: how far a shard without slots is, which never is the last."""


class Steps:
    """Of one shard."""

    def __init__(self, membership: Membership, slots: Slots) -> None:
        self._slots = slots
        self._workers = membership.workers
        self.clocked = membership.settings.consistency != "Async"
        """Whether the step is the slowest worker's clock."""
        self.seats = Seats(membership)
        self.left: dict[int, int] = {}
        """By worker: its last batch. It counts in no later step."""
        self.ended: dict[int, int] = {}
        """By worker: its last batch, also of those that only a rollback can bring back."""
        self.now = 0
        """The shard's step; within a generation it never goes back."""

    @property
    def gone(self) -> dict[int, int]:
        """By worker that is at its end: its last batch."""
        return self.left | self.ended

    def active(self) -> list[int]:
        """Workers whose contribution the next step needs."""
        done = self._slots.last.min(axis=0) if len(self._slots.ids) else np.zeros(self._workers)
        gone, vacant = self.gone, self.seats.vacant
        there = [w for w in range(self._workers) if w not in vacant]
        return [w for w in there if w not in gone or done[w] < gone[w]]

    def too_few(self, active: list[int]) -> bool:
        """Whether these are fewer than a step may be made with."""
        ended = self.gone.keys() - set(active)
        return self.seats.too_few(active, len(ended))

    def of(self, k: Ints) -> Ints:
        """Return for each of the slots `k` the batch that all workers that go on have reached.

        Under `Sync` that is its step. Otherwise, where it ends a phase or bounds the staleness,
        nobody waits for a worker at the end of its batches either: only a rollback could bring it
        back.
        """
        out = {*self.left, *self.ended, *self.seats.vacant}
        workers = [w for w in range(self._workers) if w not in out] or list(range(self._workers))
        return np.asarray(self._slots.last[k][:, workers].min(axis=1), np.int64)

    @property
    def slotless(self) -> bool:
        """Whether this shard is none: of very many servers some own no slot."""
        return not len(self._slots.ids)

    def heard(self, step: int) -> None:
        """A sibling is at this step: so is a shard that has nothing to know it from."""
        if self.slotless:
            self.now = max(self.now, step)

    def refresh(self) -> None:
        """Recompute this shard's step; within a generation it never goes back."""
        if self.slotless:
            return
        if self.clocked:
            now = int(self.of(np.arange(len(self._slots.ids))).min())
        else:
            now = int(self._slots.last.max(axis=0).sum()) // self._workers
        self.now = max(self.now, now)

    def complete(self) -> tuple[int, ...]:
        """For each worker the last batch up to which every slot has everything."""
        if self.slotless:
            return (EVERYTHING,) * self._workers
        k = np.arange(len(self._slots.ids))
        return tuple(self._slots.complete_until(k, w) for w in range(self._workers))
