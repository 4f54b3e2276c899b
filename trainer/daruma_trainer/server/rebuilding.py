"""Sums that workers can make again: `add` tables with a rebuilder (`table.on_restored`).

An error in a sum stays for ever, and a restored slot may lack what was added since its copy was
made. So where slots came back from a copy, such a table is cleared once and every worker adds its
part again. Of each slot and worker is kept which batch of that worker the sum contains, beside
the slot's own `applied`: a part stands for all batches up to its number, and what is pushed again
of those is not added.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.layout import Ints
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots
from daruma_trainer.wire import MalformedError, Push, TablePush

WAITING = 1 << 62
"""Of a worker whose part is still to come: none of its pushes is added before it."""


class Sums:
    """The rebuilt tables of one shard; slots are indices into the shard's."""

    def __init__(self, shard: Shard, slots: Slots) -> None:
        self._shard = shard
        self._slots = slots
        self._has: dict[int, Ints] = {}
        """By table, (slots, workers): the last batch that the sum contains."""
        self.inexact = False
        """Whether the slots came from elsewhere: what their sums lack is not known here."""
        self._heard: set[int] = set()
        """Workers that said which tables they can make again."""

    @property
    def active(self) -> bool:
        """Whether there are any: a push is then not the whole of what an update does."""
        return bool(self._has)

    def register(self, worker: int, tables: Iterable[int]) -> None:
        """A worker can rebuild these tables; what was restored before is cleared."""
        self._heard.add(worker)
        for table in tables:
            if table in self._has:
                continue
            if not 0 <= table < len(self._shard.tables):
                raise MalformedError(f"no table {table} to rebuild")
            if self._shard.tables[table].rule.name != "add":
                raise MalformedError(f"table {table} is no sum: only rule add is rebuilt")
            self._has[table] = self._slots.last.copy()
            if self.inexact:
                self._shard.tables[table].data[:] = 0.0
                self._shard.tables[table].changed[:] = True
                self._has[table][:] = WAITING

    def due(self, worker: int) -> list[int]:
        """Return the tables that lack this worker's part."""
        return [t for t, has in self._has.items() if (has[:, worker] == WAITING).any()]

    def lacks(self, k: Ints) -> bool:
        """Whether any worker's part is still to come for one of these slots."""
        return any((has[k] == WAITING).any() for has in self._has.values())

    def lacking(self, workers: int) -> bool:
        """Whether any part is still to come, or may be, as not every worker was heard yet."""
        if self.lacks(np.arange(len(self._slots.ids))):
            return True
        sums = any(table.rule.name == "add" for table in self._shard.tables)
        return self.inexact and sums and len(self._heard) < workers and len(self._slots.ids) > 0

    def add_from(self, push: Push, k: Ints, ready: NDArray[np.bool_]) -> list[TablePush]:
        """Add what a push has for sums to those of the Ready slots in `k` that lack it.

        Returns what it has for other tables: nothing of that was applied.
        """
        others = []
        for part in push.tables:
            if part.table not in self._has:
                others.append(part)
                continue
            has = self._has[part.table]
            new = np.flatnonzero(ready & (has[k, push.worker] < push.first))
            self._shard.apply([part], k, new)
            has[k[new], push.worker] = push.last
        return others

    def rebuild(self, push: Push, k: Ints) -> None:
        """Take a worker's whole part of its batches before `push.first`, where it is missing."""
        for part in push.tables:
            if part.table not in self._has:
                continue  # nobody asks for it any more
            has = self._has[part.table]
            new = np.flatnonzero(self._slots.ready[k] & (has[k, push.worker] == WAITING))
            self._shard.apply([part], k, new)
            has[k[new], push.worker] = push.first - 1

    def rolled_back(self) -> None:
        """All is as of a cut, which is exact: workers register anew."""
        self._has.clear()
        self.inexact = False
