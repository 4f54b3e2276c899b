"""The state of a shard's slots: Empty, Restoring or Ready; versions; what has been applied.

Pure bookkeeping, the heart of "a push is applied at most once by each slot". Of
each slot and worker it knows the last applied batch and a window of 64 batches before it; what is
older than the window counts as applied, because a worker's pushes reach a slot in order and what
a recovery lost is marked (the floor).
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.applied import FULL, complete_until, holes, mark, seen
from daruma_trainer.contract import Version
from daruma_trainer.layout import Ints
from daruma_trainer.stretches import Stretches


class SlotState(IntEnum):
    """Where a slot stands."""

    EMPTY = 0
    """Before initialisation: takes Init, nothing else."""
    RESTORING = 1
    """Lost and not yet back: refuses pulls, pushes and Init."""
    READY = 2


_READY = np.uint8(SlotState.READY)


class Slots:
    """The slots of one shard, in ascending order; `k` below is an index into that order.

    Arrays: state (n,), lineage (n,), position (n,), last and window (n, workers).
    """

    def __init__(self, ids: Sequence[int] | Ints, workers: int, state: SlotState) -> None:
        self.ids: Ints = np.asarray(ids, np.int64)
        n = len(self.ids)
        self.state = np.full(n, state, np.uint8)
        self.lineage: Ints = np.zeros(n, np.int64)
        self.position: Ints = np.zeros(n, np.int64)
        self.last: Ints = np.zeros((n, workers), np.int64)
        self.window: NDArray[np.uint64] = np.full((n, workers), FULL, np.uint64)

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Which slots serve; shape (n,)."""
        return np.equal(self.state, _READY)

    def index_of(self, ids: Ints) -> Ints:
        """Return the index of each slot id, or −1 for one that is not of this shard."""
        if np.array_equal(ids, self.ids):
            return np.arange(len(ids))  # nearly always all of them
        k = np.searchsorted(self.ids, ids)
        k[k == len(self.ids)] = 0
        return np.where(self.ids[k] == ids, k, -1) if len(self.ids) else np.full(len(ids), -1)

    def owned(self, mask: NDArray[np.bool_]) -> Ints | None:
        """Return the indices of a mask's slots; None: some are not of this shard."""
        k = self.index_of(np.flatnonzero(mask))
        return None if len(k) and k.min() < 0 else k

    def seen(self, k: Ints, worker: int, first: int, until: int) -> NDArray[np.uint8]:
        """Say for each of the slots `k` what it has of a worker's range of batches."""
        out = np.empty(len(k), np.uint8)
        for entry, where in self._entries(k, worker):
            out[where] = seen(*entry, first, until)
        return out

    def mark(self, k: Ints, worker: int, first: int, until: int) -> None:
        """Note that the range was applied, in the bookkeeping alone."""
        for entry, where in self._entries(k, worker):
            last, window = mark(*entry, first, until)
            self.last[k[where], worker] = last
            self.window[k[where], worker] = np.uint64(window)

    def advance(self, k: Ints, worker: int, first: int, until: int) -> None:
        """Note that the range was applied to Ready slots: their versions move on."""
        self.mark(k, worker, first, until)
        self.position[k] += 1

    def floor(self, k: Ints, worker: int, done: int, held: Stretches) -> Stretches:
        """Mark all of a worker's batches up to `done` that it does not hold; return the lost ones.

        Those were acknowledged to the worker, and no copy that could be reached has them.
        """
        lost = Stretches()
        for entry, where in self._entries(k, worker):
            last, window = entry
            lacks = Stretches.these(holes(last, window, 0, last)) | Stretches.of((last + 1, done))
            gaps = (lacks - held).up_to(done)
            lost |= gaps
            for first, until in gaps.pairs:
                last, window = mark(last, window, first, until)
            self.last[k[where], worker] = last
            self.window[k[where], worker] = np.uint64(window)
            if gaps:
                # No two states of a slot have one version: a replica's would pass for this one.
                self.position[k[where]] += 1
        return lost

    def complete_until(self, k: Ints, worker: int) -> int:
        """Return the largest batch up to which none of the slots misses any of a worker's."""
        return min((complete_until(*entry) for entry, _ in self._entries(k, worker)), default=0)

    def version(self, k: int) -> Version:
        """Return one slot's version."""
        return Version(int(self.lineage[k]), int(self.position[k]))

    def vectors(self, k: Ints) -> tuple[Ints, Ints, NDArray[np.uint64]]:
        """Return the distinct applied vectors of the slots `k`: (index per slot, last, window)."""
        last, window = self.last[k], self.window[k]
        if len(k) and (last == last[0]).all() and (window == window[0]).all():
            return np.zeros(len(k), np.int64), last[:1], window[:1]
        both = np.hstack([last, window.view(np.int64)])
        unique, index = np.unique(both, axis=0, return_inverse=True)
        workers = self.last.shape[1]
        window = np.ascontiguousarray(unique[:, workers:]).view(np.uint64)
        return index.reshape(-1).astype(np.int64), unique[:, :workers], window

    def _entries(self, k: Ints, worker: int) -> Iterable[tuple[tuple[int, int], Ints]]:
        """Group slots by their entry of one worker: nearly always a single group."""
        last, window = self.last[k, worker], self.window[k, worker]
        if len(k) and (last == last[0]).all() and (window == window[0]).all():
            return [((int(last[0]), int(window[0])), np.arange(len(k)))]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, entry in enumerate(zip(last.tolist(), window.tolist(), strict=True)):
            groups.setdefault(entry, []).append(i)
        return [(entry, np.array(where)) for entry, where in groups.items()]
