"""`Sync`: one update a step, made of all workers' contributions, always in worker order.

The order is fixed so that a run in which a server failed ends bit for bit like the one without.
Contributions of whole tables are kept in one buffer a worker, the size of the shard; a worker is
never more than a step ahead of a slot, because it pulls a step from every shard before it computes
the next. Of single rows a gradient's mean is over the same workers: one that gave a row nothing
gave it 0, and a row that nobody gave does not move. A table that some give by rows and others whole
is updated whole.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import cast

import numpy as np

from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots
from daruma_trainer.wire import Push, TablePush


class TwoWritersError(ValueError):
    """Two workers assigned the same row in one step."""


Made = list[TablePush]
"""What a step changed, as one push: of each table the mean or sum, or else single rows."""
Stepped = Callable[[int, Sequence[int], Ints, Made | None], None]
"""Told of a step: its number, the workers, the slots, and what it was; None: not in one push."""


class Barrier:
    """Contributions to the next step of each slot."""

    def __init__(self, shard: Shard, slots: Slots) -> None:
        self._shard = shard
        self._slots = slots
        self._batch: dict[int, Ints] = {}
        """By worker, for each slot: the batch whose contribution is in the buffer; 0: none."""
        self._values: dict[tuple[int, int], Floats] = {}
        """By (worker, table): what was pushed whole."""
        self._lr: dict[tuple[int, int], dict[int, float]] = {}
        """By (worker, batch): the learning rate of each table that was pushed. Slots may be a step
        apart, so that one has a worker's next batch in the buffer and another still this."""
        self._rows: dict[tuple[int, int], dict[int, list[tuple[TablePush, Ints]]]] = {}
        """By (worker, batch), by table: single rows, with the slots that they were pushed for."""
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
        fresh = new[have[k[new]] != push.last]
        # A replica that was promoted may lack several steps, which all come at once.
        waits = have[k[fresh]] > self._slots.last[k[fresh], w]
        if waits.any():
            self._early[w, push.last, push.slots.tobytes()] = push, k, fresh[waits]
            fresh = fresh[~waits]
        if not len(fresh):
            return
        rates = self._lr.setdefault((w, push.last), {})
        single = self._rows.setdefault((w, push.last), {})
        for part in push.tables:
            rates[part.table] = part.lr
            if part.rows is not None:
                single.setdefault(part.table, []).append((part, k[fresh]))
                continue
            table, offsets = self._shard.tables[part.table], self._shard.row_offsets(part.table, k)
            rows, values = table.layout.slot_rows, part.values.reshape(-1, table.layout.table.cols)
            buffer = self._buffer(w, part.table)
            for s in fresh.tolist():
                buffer[rows[k[s]] : rows[k[s] + 1]] = values[offsets[s] : offsets[s + 1]]
        have[k[fresh]] = push.last

    def _buffer(self, worker: int, table: int) -> Floats:
        if (worker, table) not in self._values:
            self._values[worker, table] = np.zeros_like(self._shard.tables[table].data)
        return self._values[worker, table]

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
            began = self._shard.clock()
            made = self._apply(same, step, parts)
            self._shard.update_seconds.observe(self._shard.clock() - began)
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
            whole = [w for w in touched if i not in self._rows[w, step]]
            if table.rule.gradient and touched and not whole:
                made.append(self._mean_of_rows(i, k, step, parts))
                change += self._shard.apply_rows(made[-1], k)
                continue
            if table.rule.gradient:
                for w in set(touched) - set(whole):
                    self._spread(w, i, k, step)
                whole = touched
            if whole:
                lr = self._lr[whole[0], step][i]
                share = 1 / len(parts) if table.rule.gradient else 1.0
                moved, total = self._update(i, k, whole, lr, share)
                change += moved
                made.append(TablePush(i, lr, total))
        for w in parts:
            for part, slots in self._changes(w, step):
                mine = np.intersect1d(slots, k)
                change += self._shard.apply_rows(part, mine)
                made.append(part)
                at_once &= len(mine) == len(k)
        self._shard.norms.append(math.sqrt(change))
        return made if at_once else None

    def _update(
        self, table: int, k: Ints, givers: Sequence[int], lr: float, share: float
    ) -> tuple[float, Floats]:
        """Reduce what workers gave whole; returns the change's squared norm, and what it was."""
        change, totals = 0.0, []
        for a, b in _ranges(k):
            rows = slice(*self._shard.tables[table].layout.slot_rows[[a, b]].tolist())
            total = self._values[givers[0], table][rows].copy()
            for w in givers[1:]:
                total += self._values[w, table][rows]
            if share != 1.0:
                total *= np.float32(share)
            change += self._shard.update(table, a, b, total, lr)
            totals.append(total)
        return change, totals[0] if len(totals) == 1 else np.concatenate(totals)

    def _changes(self, worker: int, step: int) -> list[tuple[TablePush, Ints]]:
        """Return single rows that are no gradients, with their slots: made one after the other."""
        tables = self._shard.tables
        given = self._rows[worker, step].items()
        return [one for i, single in given if not tables[i].rule.gradient for one in single]

    def _given(self, worker: int, table: int, k: Ints, step: int) -> Iterator[tuple[Ints, Floats]]:
        """Return rows in the slots `k` that a worker gave, in wire order, with their values."""
        layout = self._shard.tables[table].layout
        for part, slots in self._rows[worker, step].get(table, []):
            at = layout.find_in(np.intersect1d(slots, k), cast("Ints", part.rows))
            yield at[at >= 0], part.values.reshape(-1, layout.table.cols)[at >= 0]

    def _mean_of_rows(self, table: int, k: Ints, step: int, parts: list[int]) -> TablePush:
        """Reduce the rows that workers gave a table in the slots `k`."""
        layout = self._shard.tables[table].layout
        given = [found for w in parts for found in self._given(w, table, k, step)]
        rows = np.unique(np.concatenate([layout.rows[at] for at, _ in given]))
        total = np.zeros((len(rows), layout.table.cols), np.float32)
        for at, values in given:
            total[np.searchsorted(rows, layout.rows[at])] += values
        if len(parts) > 1:
            total *= np.float32(1 / len(parts))
        lr = next(self._lr[w, step][table] for w in parts if table in self._lr[w, step])
        return TablePush(table, lr, total, rows)

    def _spread(self, worker: int, table: int, k: Ints, step: int) -> None:
        """Write single rows into the buffer of what was pushed whole."""
        buffer, layout = self._buffer(worker, table), self._shard.tables[table].layout
        for a, b in _ranges(k):
            buffer[layout.slot_rows[a] : layout.slot_rows[b]] = 0.0
        for at, values in self._given(worker, table, k, step):
            buffer[at] = values

    def _check_writers(self, push: Push, single: list[TablePush]) -> None:
        for (worker, batch), kept in self._rows.items():
            if worker == push.worker or batch != push.last:
                continue
            for part in single:
                if self._shard.tables[part.table].rule.name != "assign" or part.rows is None:
                    continue
                for other, _ in kept.get(part.table, []):
                    both = np.intersect1d(cast("Ints", other.rows), part.rows)
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
