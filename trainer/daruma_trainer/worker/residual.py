"""How gradients come late to a server that was away (spec.recovery.replay.combine: Auto).

A long sum taken at once overshoots: what was computed far back points somewhere else by now. So the
replay's own push only marks its batches, and their gradients ride on the batches that follow, as
the residual does in compression with error feedback: the first takes one mean gradient along, and
each later one half as much more (momentum: in as many steps as it remembers), for as long as its
own gradient still points the same way. Where it turns, the replay has gone far enough, and the
rest is dropped. Each ride is part of a batch: applied at most once, and sent again with it.

Adam and Adagrad are scale-free, a gradient more would be a step more: there the mean of the replay
and the mean with the next gradient is taken, and that is all. docs/benchmarks/replay.md measures.

Where gradients are of single rows a batch takes along those that the replay has, and its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.contract import Replay
from daruma_trainer.layout import Floats, TableLayout
from daruma_trainer.rules import SGD, Rule
from daruma_trainer.wire import TablePush
from daruma_trainer.worker.accumulating import MAX_COUNT, Accumulation, Part, scale_free
from daruma_trainer.worker.copies import Group

if TYPE_CHECKING:
    from daruma_trainer.worker.pushes import Update

GROWTH = 1.5
"""Each ride is so much longer than the one before. With 2 some cells of the benchmark rose above
what they were without a replay; with less only time is lost."""


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean gradient of a table's rows of one server, in wire order."""

    values: Floats
    lr: float
    scale_free: bool
    touched: NDArray[np.bool_] | None = None
    """Which rows it is a gradient of; None: all of them."""


@dataclass(frozen=True, slots=True)
class Ride:
    """What one batch takes along for one server."""

    means: Mapping[int, Mean]
    batches: float
    """How many mean gradients, where a rule counts them (SGD)."""

    def board(self, groups: Sequence[Group], number: int, parts: list[TablePush]) -> None:
        """Add it to the parts of a server's message `number`; their values are nobody else's."""
        for i, part in enumerate(parts):
            mean = self.means.get(part.table)
            if mean is None or not (mean.scale_free or part.lr > 0):
                continue
            start = sum(_rows(group, part.table) for group in groups[:number])
            share = 1.0 if mean.scale_free else self.batches * mean.lr / part.lr
            parts[i] = _joined(part, mean, share, start, groups[number].layout.tables[part.table])


class Residual:
    """What a server's replay has not sent yet."""

    def __init__(self, means: Mapping[int, Mean], left: float, remembers: float) -> None:
        self._means = means
        self._remembers = remembers
        """Steps for which a gradient counts: 1 ÷ (1 − momentum)."""
        self.left = left
        """Mean gradients that may still ride."""
        self._next = 1.0
        counted = [m.lr * float(np.linalg.norm(m.values)) for m in _counted(means).values()]
        self._way = math.hypot(*counted) * remembers
        """How far one of them moves the parameters (L2)."""

    @classmethod
    def of(
        cls, done: Accumulation, rules: Sequence[Rule], limits: Replay, moved: float | None
    ) -> "Residual | None":
        """Take the gradients out of an accumulation that is about to be sent."""
        means: dict[int, Mean] = {}
        weight, remembers = 0.0, 1.0
        for table in [t for t in done.parts if rules[t].gradient]:
            part, rule = done.parts.pop(table), rules[table]
            part.average()
            weight = max(weight, part.weight)
            means[table] = Mean(part.values, part.lr, scale_free(rule), part.mask)
            if isinstance(rule, SGD):
                remembers = max(remembers, 1 / (1 - rule.momentum))
        if not means:
            return None
        found = cls(means, weight, remembers)
        if moved is not None and found._way > 0 and math.isfinite(found._way):
            # No farther than trust × the way that the part went in as many steps before.
            found.left = min(weight, limits.trust * moved * weight / found._way)
        return found

    @property
    def gap(self) -> float:
        """How far what is left would move the parameters (L2)."""
        return self.left * self._way

    def ride(self, updates: Sequence["Update"], groups: Sequence[Group]) -> Ride | None:
        """Say what a batch takes along; None: nothing, and the rest is not sent either."""
        batches = min(self._next, self.left)
        if self._next > 1.0 and not self._agrees(updates, groups):
            self.left = 0.0
            return None
        ride = Ride(self._means, batches)
        self._next *= GROWTH ** (1 / self._remembers)
        self._means = _counted(self._means)
        self.left = self.left - batches if self._means else 0.0
        return ride

    def give_back(self, into: Accumulation) -> None:
        """The server is away again: what is left is the beginning of its next accumulation."""
        for table, mean in self._means.items():
            worth = self.left
            part = Part(
                mean.lr, mean.values * np.float32(worth), weight=worth, rates=worth * mean.lr
            )
            if mean.touched is not None:
                part.touched = np.packbits(mean.touched, bitorder="little")
                if mean.scale_free:
                    part.counts = mean.touched * np.uint16(min(max(worth, 1.0), MAX_COUNT))
            if not mean.scale_free:
                part.farthest = self.left * mean.lr * float(np.linalg.norm(mean.values))
                part.gap = part.farthest * self._remembers
            into.parts[table] = part

    def _agrees(self, updates: Sequence["Update"], groups: Sequence[Group]) -> bool:
        """Whether a batch's own gradient still points the way of the replay.

        One of single rows that the replay has none of says nothing.
        """
        slope, silent = 0.0, False
        for update in updates:
            mean = self._means.get(update.table)
            if mean is None:
                continue
            start = 0
            for group in groups:
                layout = group.layout.tables[update.table]
                at, mine = np.arange(len(layout.rows)), layout.rows
                if update.rows is not None:
                    at = layout.find(update.rows)
                    mine = np.flatnonzero(at >= 0)
                    at = at[mine]
                    silent |= mean.touched is not None and not mean.touched[start + at].any()
                slope += mean.lr * float(np.vdot(mean.values[start + at], update.values[mine]))
                start += len(layout.rows)
        return slope > 0 or (silent and slope == 0)


def _counted(means: Mapping[int, Mean]) -> dict[int, Mean]:
    return {table: mean for table, mean in means.items() if not mean.scale_free}


def _rows(group: Group, table: int) -> int:
    return int(group.layout.tables[table].block_starts[-1])


def _joined(
    part: TablePush, mean: Mean, share: float, start: int, layout: TableLayout
) -> TablePush:
    """Return a batch's part with a share of the mean, whose rows of this message begin there."""
    own = mean.values[start : start + len(layout.rows)]
    here = there = np.ones(len(own), np.bool_)
    values = part.values
    if part.rows is not None:
        at = layout.find(part.rows)
        values, here = np.zeros_like(own), np.zeros(len(own), np.bool_)
        values[at], here[at] = part.values, True
    if mean.touched is not None:
        there = mean.touched[start : start + len(own)]
    values += own * np.float32(share)
    if mean.scale_free:
        values[here & there] *= np.float32(0.5)
    if part.rows is None or mean.touched is None:
        return TablePush(part.table, part.lr, values)
    rows = np.flatnonzero(here | there)
    rows = rows[np.argsort(layout.rows[rows])]
    return TablePush(part.table, part.lr, values[rows], layout.rows[rows])
