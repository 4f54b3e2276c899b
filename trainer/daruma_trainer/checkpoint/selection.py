"""Which blocks to save next. Pure: distances and sizes in, block indices out.

All selections may spend the same bytes: what a save uses less or more than its share, because
blocks are saved whole, the next ones have or lack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from daruma_trainer.layout import Floats, Ints


class Selection(StrEnum):
    """spec.checkpoint.selection; DISTANCE is for comparison only."""

    PRIORITY = "Priority"
    """The blocks whose squared distance to their saved value is largest *for their bytes*: no other
    choice of as many bytes leaves less distance. Where blocks are equally large, that is SCAR's."""
    ROUND_ROBIN = "RoundRobin"
    RANDOM = "Random"
    DISTANCE = "Distance"
    """SCAR (Qiao et al., 2019): the blocks farthest from their saved value, however large."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one save leaves for the next."""

    cursor: int = 0
    """Where it is a block's turn."""
    left: int = 0
    """Bytes that were not spent; negative: those that were spent beyond the share."""


def select(
    how: Selection,
    blocks: tuple[Floats, Ints],
    fraction: float,
    turn: Turn,
    shuffled: Callable[[int], Ints],
) -> tuple[Ints, Turn]:
    """Return the indices of the blocks to save, ascending and at least one, and the next turn.

    `blocks`: the squared distance of each (infinite: never saved), and its size in bytes.
    `shuffled`: returns 0 to n - 1 in random order. Ties go to the lower index beyond the cursor, so
    that blocks that never change are saved in turn all the same.
    """
    distances, sizes = blocks
    n = len(distances)
    if not n:
        return np.empty(0, np.int64), turn
    budget = fraction * int(sizes.sum()) + turn.left
    if how is Selection.ROUND_ROBIN:
        order = (turn.cursor + np.arange(n)) % n
    elif how is Selection.RANDOM:
        order = shuffled(n)
    else:
        far = distances
        if how is Selection.PRIORITY:
            far = np.divide(distances, sizes, dtype=np.float32)
        order = _farthest(far, sizes, budget, turn.cursor)
    chosen = order[: _fitting(sizes[order], budget)]
    most = int(sizes.max())
    left = max(-most, min(most, round(budget - int(sizes[chosen].sum()))))
    return np.sort(chosen).astype(np.int64), Turn((turn.cursor + len(chosen)) % n, left)


def _farthest(far: Floats, sizes: Ints, budget: float, cursor: int) -> Ints:
    """Return blocks, the farthest first: at least as many as may be chosen."""
    # A diverged block (NaN) is as far away as can be. From the cursor on, so that what is as far
    # as others comes in its turn.
    far = np.roll(np.where(np.isnan(far), np.float32(np.inf), far), -cursor)
    n, most = len(far), max(1, int(budget // sizes.min()) + 1)
    found = np.arange(n)
    if most < n:
        # Requests wait for this: sorting all of a shard's blocks takes far longer.
        found = np.flatnonzero(far >= np.partition(far, n - most)[n - most])
    # By distance, then by turn. What is not negative orders as its bits do; a stable sort, which
    # is what this amounts to, takes several times as long.
    keys = ~far[found].view(np.uint32) * np.uint64(1 << 32) + found.astype(np.uint64)
    at = np.sort(keys).astype(np.uint32).astype(np.int64)
    order: Ints = (at + cursor) % n
    return order


def _fitting(sizes: Ints, budget: float) -> int:
    """Return how many of the first come nearest to the budget; at least one."""
    spent = np.cumsum(sizes)
    n = int(np.searchsorted(spent, budget))
    if n < len(spent) and spent[n] - budget <= budget - (spent[n - 1] if n else 0):
        n += 1
    return max(1, n)
