"""The parameters of one shard: arrays in wire order, and how pushes and restores change them."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.histogram import Histogram
from daruma_trainer.layout import Floats, Ints, ShardLayout, TableLayout, TableSpec, alike
from daruma_trainer.rules import TILE, Rule, rule_from_json, state_names
from daruma_trainer.wire import MAX_SLOT_BYTES, TablePush

NORMS = 64
"""How many updates the largest recent norm looks back on."""
SECONDS = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
"""Of an update: from that of a few rows to Adam on gigabytes."""


class TableTooLargeError(ValueError):
    """A slot of the table would not fit a message."""


@dataclass(slots=True)
class TableArrays:
    """One table's part of the shard; rows in wire order."""

    layout: TableLayout
    rule: Rule
    data: Floats
    """(rows, cols)"""
    state: tuple[Floats, ...]
    """The optimizer's arrays, each (rows, cols)."""
    steps: Ints
    """(blocks,): updates each block had, for Adam's bias correction and momentum's first step."""
    changed: NDArray[np.bool_]
    """(blocks,): whether parameters changed since their distance to the saved copy was measured."""


class Shard:
    """All tables of one server. Slots are given as indices into `layout.slots`, ascending."""

    def __init__(self, uid: str, slots: Ints) -> None:
        self.uid = uid
        self.specs: list[TableSpec] = []
        self.layout = ShardLayout(uid, [], slots)
        self.tables: list[TableArrays] = []
        self.norms: deque[float] = deque(maxlen=NORMS)
        self.update_seconds = Histogram(SECONDS)
        """Seconds that each update took, in the tables alone: one push's, or all that a step makes
        of the workers' (`Sync`) once the last of them is there."""
        self.clock: Callable[[], float] = time.monotonic
        """Seconds since whenever."""

    def create(self, spec: TableSpec) -> None:
        """Add a table of zeros; ContractError for a bad rule, TableTooLargeError for its size."""
        rule = rule_from_json(spec.rule)
        layout = TableLayout(self.uid, spec, self.layout.slots)
        sizes = np.diff(layout.slot_rows) * spec.cols * 4
        # Replicas get a slot with its optimizer's arrays in one message.
        room = MAX_SLOT_BYTES // max(2, 2 + len(state_names(rule)))
        if len(sizes) and int(sizes.max()) > room:
            raise TableTooLargeError(
                f"table {spec.name!r} has slots of {int(sizes.max())} bytes, at most "
                f"{room}: split it into several tables"
            )
        shape = (int(layout.block_starts[-1]), spec.cols)
        self.tables.append(
            TableArrays(
                layout,
                rule,
                np.zeros(shape, np.float32),
                tuple(np.zeros(shape, np.float32) for _ in state_names(rule)),
                np.zeros(len(layout.blocks), np.int64),
                np.ones(len(layout.blocks), np.bool_),
            )
        )
        self.specs.append(spec)
        self.layout = ShardLayout(self.uid, self.specs, self.layout.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, without the optimizer's state."""
        return sum(t.data.nbytes for t in self.tables)

    def row_offsets(self, table: int, k: Ints) -> Ints:
        """Where each slot of `k` begins in an array of just these slots; one more than slots."""
        rows = self.tables[table].layout.slot_rows
        if _adjacent(k):
            return np.asarray(rows[k[0] : k[-1] + 2] - rows[k[0]])
        return np.concatenate([[0], np.cumsum(rows[k + 1] - rows[k])])

    def check(self, parts: Sequence[TablePush], k: Ints) -> str | None:
        """Say what is wrong with a push for the slots `k`, or None. Nothing is changed yet."""
        for part in parts:
            if part.table >= len(self.tables):
                return f"no table {part.table}"
            spec = self.specs[part.table]
            if part.rows is None:
                expected = int(self.row_offsets(part.table, k)[-1]) * spec.cols
                if part.values.size != expected:
                    return f"{spec.name}: {part.values.size} values, expected {expected}"
            elif part.values.size != len(part.rows) * spec.cols or not _ascending(
                part.rows, spec.rows
            ):
                return f"{spec.name}: rows are not ascending numbers below {spec.rows}"
        return None

    def apply(self, parts: Sequence[TablePush], k: Ints, new: Ints) -> None:
        """Apply a checked push for the slots `k` to those that `new` (indices into `k`) names."""
        change = 0.0
        for part in parts:
            if part.rows is None:
                change += self._apply_dense(part, k, new)
            else:
                change += self.apply_rows(part, k[new])
        self.norms.append(math.sqrt(change))

    def _apply_dense(self, part: TablePush, k: Ints, new: Ints) -> float:
        table = self.tables[part.table]
        offsets = self.row_offsets(part.table, k)
        values = part.values.reshape(-1, table.layout.table.cols)
        change = 0.0
        for a, b in _consecutive(k, new):
            rows = slice(int(offsets[a]), int(offsets[b]))
            change += self.update(part.table, int(k[a]), int(k[b - 1]) + 1, values[rows], part.lr)
        return change

    def update(self, table: int, begin: int, end: int, values: Floats, lr: float) -> float:
        """Apply values to the slots begin..end−1; returns the squared norm of the change."""
        arrays = self.tables[table]
        blocks = arrays.layout.slot_blocks
        first, stop = int(blocks[begin]), int(blocks[end])
        if first == stop:
            return 0.0
        arrays.changed[first:stop] = True
        steps = arrays.steps[first:stop]
        steps += 1
        cuts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), stop - first]
        base = int(arrays.layout.block_starts[first])
        change = 0.0
        for a, b in pairwise(cuts):
            rows = slice(
                int(arrays.layout.block_starts[first + a]),
                int(arrays.layout.block_starts[first + b]),
            )
            change += arrays.rule.apply(
                arrays.data[rows].reshape(-1),
                values[rows.start - base : rows.stop - base].reshape(-1),
                tuple(s[rows].reshape(-1) for s in arrays.state),
                lr,
                int(steps[a]),
            )
        return change

    def apply_rows(self, part: TablePush, k: Ints) -> float:
        """Apply those of single rows that lie in the slots `k`; returns as `update` does."""
        if part.rows is None:
            raise ValueError("no single rows")
        arrays = self.tables[part.table]
        at = arrays.layout.find_in(k, part.rows)
        mine = np.flatnonzero(at >= 0)
        at, values = at[mine], part.values.reshape(-1, arrays.layout.table.cols)
        blocks = np.searchsorted(arrays.layout.block_starts, at, "right") - 1
        touched = np.unique(blocks)
        arrays.changed[touched] = True
        arrays.steps[touched] += 1
        steps = arrays.steps[blocks][:, None]
        change = 0.0
        # As many rows at once as stay in the cache while they are worked on.
        count = max(1, TILE // values.shape[1])
        for a in range(0, len(at), count):
            some = slice(a, a + count)
            rows = at[some]
            data, state = arrays.data[rows], tuple(s[rows] for s in arrays.state)
            change += arrays.rule.apply(data, values[mine[some]], state, part.lr, steps[some])
            arrays.data[rows] = data
            for array, new in zip(arrays.state, state, strict=True):
                array[rows] = new
        return change

    def values(self, k: Ints) -> tuple[Floats, ...]:
        """Copy the parameters of the slots `k`, a table at a time, rows in wire order."""
        return tuple(
            _copy(table.data, table.layout.slot_rows, k).reshape(-1) for table in self.tables
        )

    def whole(self, k: Ints) -> tuple[tuple[Floats, ...], tuple[Ints, ...]]:
        """Copy all of the slots `k`: of each table its parameters, then the optimizer's arrays;
        and of each table the step counters of their blocks."""
        arrays = tuple(
            _copy(array, table.layout.slot_rows, k).reshape(-1)
            for table in self.tables
            for array in (table.data, *table.state)
        )
        return arrays, tuple(_copy(t.steps, t.layout.slot_blocks, k) for t in self.tables)

    def set_whole(self, k: Ints, arrays: Sequence[Floats], steps: Sequence[Ints]) -> None:
        """Overwrite the slots `k` by what `whole` gave; ValueError if it does not fit."""
        flat = iter(arrays)
        todo: list[tuple[NDArray[Any], Ints, NDArray[Any]]] = []
        for table, counters in zip(self.tables, steps, strict=True):
            for array in (table.data, *table.state):
                values = next(flat, np.empty(0, np.float32)).reshape(-1, array.shape[1])
                todo.append((array, table.layout.slot_rows, values))
            todo.append((table.steps, table.layout.slot_blocks, counters))
        for _, starts, values in todo:
            expected = int((starts[k + 1] - starts[k]).sum())
            if len(values) != expected:
                raise ValueError(f"{len(values)} rows or blocks for slots of {expected}")
        ranges = _consecutive(k, np.arange(len(k)))
        for array, starts, values in todo:
            at = 0
            for a, b in ranges:
                into = array[starts[k[a]] : starts[k[b - 1] + 1]]
                into[:] = values[at : at + len(into)]
                at += len(into)
        for table in self.tables:
            blocks = table.layout.slot_blocks
            for a, b in ranges:
                table.changed[blocks[k[a]] : blocks[k[b - 1] + 1]] = True

    def set_values(self, k: Ints, values: Mapping[int, Floats]) -> None:
        """Overwrite the parameters of the slots `k`, by table; sizes must fit (ValueError)."""
        for i, flat in values.items():
            table = self.tables[i]
            offsets = self.row_offsets(i, k)
            rows = table.layout.slot_rows
            new = flat.reshape(-1, table.layout.table.cols)
            if len(new) != offsets[-1]:
                raise ValueError(f"table {i}: {len(new)} rows for slots of {offsets[-1]}")
            blocks = table.layout.slot_blocks
            for a, b in _consecutive(k, np.arange(len(k))):
                table.changed[blocks[k[a]] : blocks[k[b - 1] + 1]] = True
                table.data[rows[k[a]] : rows[k[b - 1] + 1]] = new[offsets[a] : offsets[b]]

    def reset_optimizer(self, k: Ints) -> None:
        """Zero the optimizer's state of the slots `k`, with step counters of their own."""
        for table in self.tables:
            for s in k.tolist():
                blocks = slice(
                    int(table.layout.slot_blocks[s]), int(table.layout.slot_blocks[s + 1])
                )
                rows = slice(int(table.layout.slot_rows[s]), int(table.layout.slot_rows[s + 1]))
                table.steps[blocks] = 0
                for array in table.state:
                    array[rows] = 0.0

    @property
    def update_norm(self) -> float | None:
        """The largest L2 norm of the last 64 updates; None before the first."""
        return max(self.norms, default=None)


def _copy(array: NDArray[Any], starts: Ints, k: Ints) -> NDArray[Any]:
    """Copy what belongs to the slots `k`; slot k begins at starts[k]."""
    pieces = [
        array[starts[k[a]] : starts[k[b - 1] + 1]] for a, b in _consecutive(k, np.arange(len(k)))
    ]
    # A single piece is a view of memory that the next push changes.
    return np.concatenate(pieces) if len(pieces) > 1 else (pieces or [array[:0]])[0].copy()


def _ascending(rows: Ints, limit: int) -> bool:
    if not len(rows):
        return True
    return bool(rows[0] >= 0 and rows[-1] < limit and (np.diff(rows) > 0).all())


def _consecutive(k: Ints, chosen: Ints) -> list[tuple[int, int]]:
    """Ranges [a, b) of `k` that are all chosen and follow each other in the shard.

    Both ascend, each number once.
    """
    slots = k[chosen]
    if _adjacent(slots):
        return [(int(chosen[0]), int(chosen[-1]) + 1)]
    # What lies between two chosen ones leaves a gap in the slots, too.
    ranges = alike(slots - np.arange(len(slots)))
    return [(int(chosen[a]), int(chosen[b - 1]) + 1) for a, b in ranges]


def _adjacent(k: Ints) -> bool:
    """Whether numbers, ascending and each once, have no gap; not of none."""
    return len(k) > 0 and bool(k[-1] - k[0] == len(k) - 1)
