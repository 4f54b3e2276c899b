"""`Sync`: one update a step, made of all workers' contributions, always in worker order.

The order is fixed so that a run in which a server failed ends bit for bit like the one without.
Contributions are kept in one buffer a worker, the size of the shard; a worker is never more than
a step ahead of a slot, because it pulls a step from every shard before it computes the next.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import numpy as np

from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots
from daruma_trainer.wire import Push, TablePush


class TwoWritersError(ValueError):
    """Two workers assigned the same row in one step."""


Made = list[TablePush]
"""What a step changed, as one push: the mean or sum of each table, then single rows."""
Stepped = Callable[[int, Sequence[int], Ints, Made | None], None]
"""Told of a step: its number, the workers, the slots, and what it was; None: not in one push."""


class Barrier:
    """Contributions to the next step of each slot."""

    def __init__(self, shard: Shard, slots: Slots) -> None:
        self._shard = shard
        self._slots = slots
        self._batch: dict[int, Ints] = {}
        """By worker, for each slot: the batch whose contribution is in the buffer; 0: none."""
        self._values: dict[int, list[Floats]] = {}
        self._lr: dict[tuple[int, int], dict[int, float]] = {}
        """By (worker, batch): the learning rate of each table that was pushed whole. Slots may be a
        step apart, so that one has a worker's next batch in the buffer and another still this."""
        self._rows: dict[tuple[int, int], list[tuple[TablePush, Ints]]] = {}
        """By (worker, batch): single rows, with the slots that they were pushed for."""
        self._early: dict[tuple[int, int, bytes], tuple[Push, Ints, Ints]] = {}
        """By (worker, batch, slots): pushes whose worker's part of an earlier step still waits."""

    def contribute(self, push: Push, k: Ints, new: Ints) -> None:
        """Keep a checked push for the slots k[new]; again for the same batch changes nothing."""
        single = [part for part in push.tables if part.rows is not None]
        if single and len(new):
            self._check_writers(push, single)
        self._keep(push, k, new)

    def _keep(self, push: Push, k: Ints, new: Ints) -> None:
        w = push.worker
        have = self._batch.setdefault(w, np.zeros(len(self._slots.ids), np.int64))
        buffers = self._values.setdefault(w, [])
        for table in self._shard.tables[len(buffers) :]:
            buffers.append(np.zeros_like(table.data))
        fresh = new[have[k[new]] != push.last]
        # A replica that was promoted may lack several steps, which all come at once.
        waits = have[k[fresh]] > self._slots.last[k[fresh], w]
        if waits.any():
            self._early[w, push.last, push.slots.tobytes()] = push, k, fresh[waits]
            fresh = fresh[~waits]
        if not len(fresh):
            return
        dense = {part.table: part for part in push.tables if part.rows is None}
        for i, table in enumerate(self._shard.tables):
            rows, cols = table.layout.slot_rows, table.layout.table.cols
            if i in dense:
                offsets = self._shard.row_offsets(i, k)
                values = dense[i].values.reshape(-1, cols)
            for s in fresh.tolist():
                into = buffers[i][rows[k[s]] : rows[k[s] + 1]]
                into[:] = values[offsets[s] : offsets[s + 1]] if i in dense else 0.0
        self._lr[w, push.last] = {i: part.lr for i, part in dense.items()}
        single = [part for part in push.tables if part.rows is not None]
        if single:
            kept = self._rows.setdefault((w, push.last), [])
            kept.extend((part, k[fresh]) for part in single)
        have[k[fresh]] = push.last

    def reduce(self, active: Collection[int], stepped: Stepped) -> bool:
        """Apply every step for which all active workers contributed; True if there was one.

        `stepped` is called after each, for slots to which the same workers contributed.
        """
        workers = sorted(active)
        if not workers:
            return False
        for w in workers:
            # One that entered after this step gives nothing to it, and may have given nothing yet.
            self._batch.setdefault(w, np.zeros(len(self._slots.ids), np.int64))
        any_step = False
        while True:
            # A slot's next step is the first batch that some active worker has not applied there.
            step = self._slots.last[:, workers].min(axis=1) + 1
            can = self._slots.ready.copy()
            for w in workers:
                can &= (self._batch[w] == step) | (self._slots.last[:, w] >= step)
            if not can.any():
                return any_step
            for t in np.unique(step[can]).tolist():
                self._apply_step(np.flatnonzero(can & (step == t)), int(t), workers, stepped)
            any_step = True
            self._keep_early()

    def _keep_early(self) -> None:
        early, self._early = self._early, {}
        for push, k, new in early.values():
            self._keep(push, k, new[self._slots.last[k[new], push.worker] < push.last])

    def _apply_step(self, k: Ints, step: int, workers: list[int], stepped: Stepped) -> None:
        # After a recovery some slots may have a worker's part of this step already, or lost it. A
        # worker that was lost and is not waited for may have given its part to some: it counts.
        givers = sorted(self._batch)
        gave = np.stack([self._batch[w][k] == step for w in givers], axis=1)
        for pattern in np.unique(gave, axis=0):
            same = k[(gave == pattern).all(axis=1)]
            parts = [w for w, g in zip(givers, pattern, strict=True) if g]
            made = self._apply(same, step, parts)
            done = sorted({*workers, *parts})
            for w in done:
                self._slots.mark(same, w, step, step)
            self._slots.position[same] += 1
            stepped(step, done, same, made)
        if (self._slots.last[:, workers] >= step).all():
            self._rows = {key: rows for key, rows in self._rows.items() if key[1] > step}
            self._lr = {key: rates for key, rates in self._lr.items() if key[1] > step}

    def _apply(self, k: Ints, step: int, parts: list[int]) -> Made | None:
        change = 0.0
        made: Made = []
        at_once = True
        for i, table in enumerate(self._shard.tables):
            # Of a worker whose batch leaves the table out the gradient is 0.
            touched = [w for w in parts if i in self._lr[w, step]]
            totals: list[Floats] = []
            for a, b in _ranges(k):
                rows = slice(int(table.layout.slot_rows[a]), int(table.layout.slot_rows[b]))
                if not touched or rows.start == rows.stop:
                    continue
                total = self._values[touched[0]][i][rows].copy()
                for w in touched[1:]:
                    total += self._values[w][i][rows]
                if table.rule.gradient and len(parts) > 1:
                    total *= np.float32(1 / len(parts))
                lr = self._lr[touched[0], step][i]
                change += self._shard.update(i, a, b, total, lr)
                totals.append(total)
            if totals:
                total = totals[0] if len(totals) == 1 else np.concatenate(totals)
                made.append(TablePush(i, self._lr[touched[0], step][i], total))
        for w in parts:
            for part, slots in self._rows.get((w, step), []):
                mine = np.intersect1d(slots, k)
                self._shard.apply_rows(part, mine)
                made.append(part)
                at_once &= len(mine) == len(k)
        self._shard.norms.append(math.sqrt(change))
        return made if at_once else None

    def _check_writers(self, push: Push, single: list[TablePush]) -> None:
        for (worker, batch), kept in self._rows.items():
            if worker == push.worker or batch != push.last:
                continue
            for part in single:
                if self._shard.tables[part.table].rule.name != "assign" or part.rows is None:
                    continue
                for other, _ in kept:
                    if other.table == part.table and other.rows is not None:
                        both = np.intersect1d(other.rows, part.rows)
                        if len(both):
                            raise TwoWritersError(
                                f"row {int(both[0])} of table {part.table} was assigned by "
                                f"workers {worker} and {push.worker} in step {batch}"
                            )

    def drop(self) -> None:
        """Forget all contributions (a rollback)."""
        self._batch.clear()
        self._lr.clear()
        self._rows.clear()
        self._early.clear()


def _ranges(k: Ints) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(k) != 1) + 1
    edges = [0, *breaks.tolist(), len(k)]
    return [(int(k[a]), int(k[b - 1]) + 1) for a, b in pairwise(edges)]
