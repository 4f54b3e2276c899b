"""Which blocks to save next. Pure: distances and a cursor in, block indices out."""

from enum import StrEnum

import numpy as np

from daruma_trainer.layout import Floats, Ints

TILE = 16 << 10


class Selection(StrEnum):
    """spec.checkpoint.selection."""

    PRIORITY = "Priority"
    """SCAR (Qiao et al., 2019, §4.2): the blocks farthest from their last saved value."""
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
        turn = (np.arange(n) - cursor) % max(n, 1)
        chosen = np.lexsort((turn, -distances))[:count]
    return np.sort(chosen).astype(np.int64), (cursor + count) % max(n, 1)


def squared_distances(live: Floats, saved: Floats, starts: Ints, out: Floats) -> None:
    """Write the squared L2 distance of each block into `out`; nothing large is allocated.

    `live` and `saved` are flat and alike; block k is starts[k]..starts[k+1].
    """
    scratch = np.empty(TILE, np.float32)
    for k in range(len(starts) - 1):
        total = 0.0
        for a in range(int(starts[k]), int(starts[k + 1]), TILE):
            b = min(a + TILE, int(starts[k + 1]))
            t = scratch[: b - a]
            np.subtract(live[a:b], saved[a:b], out=t)
            total += float(np.dot(t, t))
        out[k] = total
