"""What a worker's copy was a step ago: the other half of the double buffer (`Sync`).

While a step is incomplete, some servers have made it and others wait for a worker that was lost.
Its replacement has to compute on what all slots were before that step, which those servers have
overwritten. Every worker that lives is in the middle of the same pull, so it has each slot either
still as it was, or here.
"""

from typing import TYPE_CHECKING

import numpy as np

from daruma_trainer.contract import SLOTS
from daruma_trainer.layout import Floats, Ints, ShardLayout
from daruma_trainer.wire import Slots, State, mask_of

if TYPE_CHECKING:
    from daruma_trainer.worker.copies import HostCopy


class Previous:
    """Of each slot of a copy the values and versions that a newer step overwrote."""

    def __init__(self, copy: "HostCopy", worker: int) -> None:
        """`worker` is the copy's own: a slot is a step further when it has its next batch."""
        self._copy = copy
        self._worker = worker
        self._data: list[Floats] = []
        self.lineage: Ints = np.zeros(SLOTS, np.int64)
        """0: this slot has nothing here."""
        self._position = self.lineage.copy()
        self._last = copy.last.copy()
        self._window = copy.window.copy()

    def keep(self, state: State, layout: ShardLayout) -> None:
        """Before the copy takes slots: keep those that a newer step overwrites."""
        copy, slots = self._copy, layout.slots
        for spec in copy.specs[len(self._data) :]:
            self._data.append(np.zeros((spec.rows, spec.cols), np.float32))
            self.lineage[:] = 0
        new = state.last[state.vector][:, self._worker] > copy.last[slots, self._worker]
        if not new.any():
            return
        for data, old, table in zip(self._data, copy.data, layout.tables, strict=False):
            rows = table.rows if new.all() else table.rows[_by_row(new, table.slot_rows)]
            data[rows] = old[rows]
        slots = slots[new]
        self.lineage[slots], self._position[slots] = copy.lineage[slots], copy.position[slots]
        self._last[slots], self._window[slots] = copy.last[slots], copy.window[slots]

    def give(self, mask: Slots, worker: int, batch: int) -> State:
        """Return those of the slots that are known as of this batch of a worker."""
        copy, slots = self._copy, np.flatnonzero(mask)
        now = (copy.lineage[slots] > 0) & (copy.last[slots, worker] == batch)
        now &= copy.tables[slots] == len(copy.specs)
        here = ~now & (self.lineage[slots] > 0) & (self._last[slots, worker] == batch)
        here &= len(self._data) == len(copy.specs)
        found = now | here
        slots, here = slots[found], here[found]

        def pick(old: Ints, new: Ints) -> Ints:
            chosen = here if old.ndim == 1 else here[:, None]
            picked: Ints = np.where(chosen, old[slots], new[slots])
            return picked

        layout = copy.layout_of(slots)
        values = []
        for i, table in enumerate(layout.tables):
            rows, back = table.rows, _by_row(here, table.slot_rows)
            taken = copy.data[i][rows]
            if back.any():
                taken[back] = self._data[i][rows[back]]
            values.append(taken.reshape(-1))
        return State(
            mask_of(slots),
            pick(self.lineage, copy.lineage),
            pick(self._position, copy.position),
            np.arange(len(slots)),
            pick(self._last, copy.last),
            np.where(here[:, None], self._window[slots], copy.window[slots]),
            tuple(values),
        )


def _by_row(slots: "np.ndarray[tuple[int], np.dtype[np.bool_]]", slot_rows: Ints) -> "Slots":
    """Spread a mask of slots over their rows in wire order."""
    return np.repeat(slots, np.diff(slot_rows))
