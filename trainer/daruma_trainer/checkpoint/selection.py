"""Which blocks to save next. Pure: distances and a cursor in, block indices out."""

from enum import StrEnum

import numpy as np

from daruma_trainer.layout import Floats, Ints


class Selection(StrEnum):
    """spec.checkpoint.selection."""

    PRIORITY = "Priority"
    """SCAR (Qiao et al., 2019): the blocks farthest from their last saved value."""
    ROUND_ROBIN = "RoundRobin"
    RANDOM = "Random"


def select(
    how: Selection, distances: Floats, count: int, cursor: int, rng: np.random.Generator
) -> tuple[Ints, int]:
    """Return the indices of `count` blocks, ascending, and the cursor for the next time.

    `distances` has one entry a block (infinite: never saved). Ties of Priority go to the lower
    index beyond the cursor, so that blocks that never change are saved in turn all the same.
    """
    n = len(distances)
    count = min(count, n)
    if how is Selection.ROUND_ROBIN:
        chosen = (cursor + np.arange(count)) % max(n, 1)
    elif how is Selection.RANDOM:
        chosen = rng.choice(n, count, replace=False)
    else:
        # A diverged block (NaN) is as far away as can be.
        far = np.where(np.isnan(distances), np.float32(np.inf), distances)
        limit = np.partition(far, n - count)[n - count] if count else np.float32(np.inf)
        beyond, ties = np.flatnonzero(far > limit), np.flatnonzero(far == limit)
        ties = np.roll(ties, -int(np.searchsorted(ties, cursor)))
        chosen = np.concatenate([beyond, ties[: count - len(beyond)]])
    return np.sort(chosen).astype(np.int64), (cursor + count) % max(n, 1)
