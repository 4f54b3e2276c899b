"""What a worker keeps for a server that is away: one sum, however long the outage.

Of each table only the rows of that server, in wire order. What is kept also says how far apart the
worker's view and the true parameters are because of it (elastic consistency: Nadiradze et al.,
AAAI 2021, bound E‖x − v‖ for their theory; here x is where the view would be, had each of these
batches been applied when it was made). Pure bookkeeping, like `pushes`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.contract import SLOTS
from daruma_trainer.layout import Floats, Ints, TableLayout
from daruma_trainer.rules import SGD, Adam, Rule
from daruma_trainer.wire import Slots, TablePush
from daruma_trainer.worker.copies import Group

if TYPE_CHECKING:
    from daruma_trainer.worker.pushes import Update

MAX_COUNT = np.iinfo(np.uint16).max


@dataclass(slots=True)
class Part:
    """One table's rows of a server that is away."""

    lr: float
    values: Floats
    """(rows, cols) in wire order: gradients summed, changes summed, or the newest values."""
    touched: NDArray[np.uint8] | None = None
    """Which rows it says something of, a bit each; None: all of them."""
    counts: NDArray[np.uint16] | None = None
    """By row, where a rule is scale-free: how many batches gave it a gradient; None: all."""
    weight: float = 0.0
    """How many batches it is worth: a table that the program does not use in a step gets none."""
    rates: float = 0.0
    """Sum of their learning rates."""
    farthest: float = 0.0
    """The largest lr × ‖sum‖ that there was on the way."""
    gap: float = 0.0
    """See `Accumulation.gap`."""

    def average(self) -> None:
        """Make the sum of gradients their mean.

        Over the batches, as many of which then make the sum. But where a rule is scale-free the
        mean is worth one gradient: of a single row that is one of those that it got.
        """
        if self.counts is not None:
            self.values /= np.maximum(self.counts, 1).astype(np.float32)[:, None]
        else:
            self.values *= np.float32(1 / self.weight)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """The same as `touched`, by row."""
        if self.touched is None:
            return None
        bits = np.unpackbits(self.touched, count=len(self.values), bitorder="little")
        return bits.astype(np.bool_)

    def rows(self, start: int, stop: int) -> Ints | None:
        """Indices of the rows it says something of, from `start`; None: all."""
        if self.touched is None:
            return None
        bits = np.unpackbits(self.touched[start >> 3 : (stop + 7) >> 3], bitorder="little")
        return np.flatnonzero(bits[start & 7 : (start & 7) + stop - start])


class Accumulation:
    """Batches first..last of one worker for one server, as one update."""

    def __init__(self, batch: int, now: float) -> None:
        self.first = self.last = batch
        self.count = 0
        self.since = now
        """Monotonic time of the first batch."""
        self.full = False
        """A batch was held beside it: from then on it takes none, or it would overtake that one."""
        self.parts: dict[int, Part] = {}
        self.unacked: Slots = np.ones(SLOTS, np.bool_)
        """Once it is sent: slots (of its server) that have not said that they are done with it."""
        self.applied = False
        """All of those slots have said it; it is kept until it is covered."""
        self.overlaps = False
        """A slot has some of its batches already: they count as lost."""

    def add(
        self,
        batch: int,
        updates: Sequence["Update"],
        groups: Sequence[Group],
        rules: Sequence[Rule],
        view: Sequence[Floats],
    ) -> None:
        """Take a batch's part for the server of these `groups`; `view`: what was last pulled."""
        self.last = batch
        self.count += 1
        for update in updates:
            layouts = [group.layout.tables[update.table] for group in groups]
            rule, part = rules[update.table], self.parts.get(update.table)
            if part is None:
                size = sum(int(layout.block_starts[-1]) for layout in layouts)
                shape = size, update.values.shape[1]
                part = Part(update.lr, np.zeros(shape, np.float32))
                if update.rows is not None:
                    part.touched = np.zeros(-(-size // 8), np.uint8)
                    if scale_free(rule):
                        part.counts = np.zeros(size, np.uint16)
                self.parts[update.table] = part
            if update.rows is None:
                _add_dense(part, update, layouts, rule)
            else:
                _add_rows(part, update, layouts, rule)
            part.weight += 1
            part.rates += update.lr
            part.gap = _gap(part, rule, layouts, view[update.table])

    @property
    def gap(self) -> float:
        """How far from the view these batches would have moved the server's parameters (L2).

        Exactly for plain SGD, `add` and `assign`; a bound for the others (`_gap`).
        """
        return math.hypot(*(part.gap for part in self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are kept."""
        return sum(
            array.nbytes
            for part in self.parts.values()
            for array in (part.values, part.touched, part.counts)
            if array is not None
        )

    def cut(self, groups: Sequence[Group]) -> list[tuple[TablePush, ...]]:
        """Return what goes into each of the server's messages: views of what is kept."""
        cut: list[tuple[TablePush, ...]] = []
        begins = dict.fromkeys(self.parts, 0)
        for group in groups:
            pushes = []
            for table, part in self.parts.items():
                layout, start = group.layout.tables[table], begins[table]
                begins[table] = stop = start + int(layout.block_starts[-1])
                rows, values = part.rows(start, stop), part.values[start:stop]
                if rows is None:
                    pushes.append(TablePush(table, part.lr, values))
                elif len(rows):
                    numbers = layout.rows[rows]
                    order = np.argsort(numbers)
                    pushes.append(TablePush(table, part.lr, values[rows[order]], numbers[order]))
            cut.append(tuple(pushes))
        return cut


def _add_dense(part: Part, update: "Update", layouts: Sequence[TableLayout], rule: Rule) -> None:
    share = _share(part, update, rule)
    part.touched = part.counts = None
    start = 0
    for layout in layouts:
        mine = update.values[layout.rows]
        into = part.values[start : start + len(mine)]
        start += len(mine)
        if rule.name == "assign":
            np.copyto(into, mine)
        else:
            if share != 1.0:
                mine *= share
            into += mine


def _add_rows(part: Part, update: "Update", layouts: Sequence[TableLayout], rule: Rule) -> None:
    if update.rows is None:
        raise ValueError("a dense update by rows")
    share = _share(part, update, rule)
    start, way = 0, 0.0
    for layout in layouts:
        at = layout.find(update.rows)
        mine = np.flatnonzero(at >= 0)
        index, values = at[mine] + start, update.values[mine]
        start += int(layout.block_starts[-1])
        if rule.name == "assign":
            part.values[index] = values
        else:
            part.values[index] += values * share
        way += _norm(values) ** 2
        if part.touched is not None:
            bits = np.left_shift(1, index & 7).astype(np.uint8)
            np.bitwise_or.at(part.touched, index >> 3, bits)
        if part.counts is not None:
            part.counts[index] += part.counts[index] < MAX_COUNT
    # Rows move at times of their own: no farther than all of it one after the other.
    part.farthest += update.lr * math.sqrt(way)


def _share(part: Part, update: "Update", rule: Rule) -> np.float32:
    """Take an update's rate; return the share with which its gradient counts.

    Where the rate changed during the outage each gradient of SGD counts with its own, as a share of
    the larger one.
    """
    if rule.name != "sgd" or update.lr == part.lr:
        part.lr = update.lr
        return np.float32(1.0)
    rate = max(part.lr, update.lr)
    part.values *= np.float32(part.lr / rate)
    part.lr = rate
    return np.float32(update.lr / rate)


def scale_free(rule: Rule) -> bool:
    """Whether twice the gradient is the same step (Adam, Adagrad): one more is a step more."""
    return rule.gradient and not isinstance(rule, SGD)


def _gap(part: Part, rule: Rule, layouts: Sequence[TableLayout], view: Floats) -> float:
    """How far a table's batches would have moved its rows, one after the other; an upper bound.

    SGD: lr × ‖sum‖, exactly. With momentum μ a gradient goes on to count, older ones more, up to
    1 ÷ (1 − μ); so by Abel's summation no farther than the farthest partial sum ÷ (1 − μ). What
    weight decay, and momentum from before the outage, would have moved is not in it. Of single rows
    each has partial sums of its own: there it is all gradients' lengths ÷ (1 − μ).
    Adam and Adagrad move no parameter by more than the rate times a constant a step.
    """
    if isinstance(rule, SGD):
        length = part.lr * _norm(part.values)
        part.farthest = max(part.farthest, length)
        return part.farthest / (1 - rule.momentum) if rule.momentum else length
    if rule.name == "add":
        return _norm(part.values)
    if rule.name == "assign":
        return _change(part, layouts, view)
    steepest = _steepest(rule) if isinstance(rule, Adam) else 1.0
    mask, size = part.mask, part.values.size
    if mask is not None:
        size = int(mask.sum()) * part.values.shape[1]
    return part.rates * math.sqrt(size) * steepest


def _norm(values: Floats) -> float:
    flat = values.reshape(-1)
    return math.sqrt(float(np.dot(flat, flat)))


def _change(part: Part, layouts: Sequence[TableLayout], view: Floats) -> float:
    """How far the newest values are from those that were last pulled."""
    total, start = 0.0, 0
    for layout in layouts:
        stop = start + int(layout.block_starts[-1])
        rows, values, old = part.rows(start, stop), part.values[start:stop], layout.rows
        if rows is not None:
            values, old = values[rows], old[rows]
        total += _norm(values - view[old]) ** 2
        start = stop
    return math.sqrt(total)


def _steepest(rule: Adam) -> float:
    """The most rates that Adam moves a parameter in a step, whatever its gradients were.

    By Cauchy and Schwarz |m| ≤ (1 − β₁) ÷ √((1 − β₂)(1 − β₁²÷β₂)) × √v; 7.3 with the usual βs.
    """
    left = (1 - rule.beta2) * (1 - rule.beta1**2 / rule.beta2) if rule.beta2 else 0.0
    return max(1.0, (1 - rule.beta1) / math.sqrt(left)) if left > 0 else math.inf
