"""Move what still lives out of segments that are mostly dead, so that they can be deleted.

Each save may bring along about as many old bytes as it saves new ones: with that a store holds at
most two to three times the live bytes, and no save is much longer than another. The old records
are copied as they are; until a manifest names the copies, the old ones count.
"""

from collections.abc import Sequence

import numpy as np

from daruma_trainer.checkpoint.places import Rows
from daruma_trainer.checkpoint.reading import Chunk
from daruma_trainer.checkpoint.segment import read_records
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.errors import StoreError
from daruma_trainer.layout import Ints
from daruma_trainer.server.log import Log

REWRITE = 2.0
"""Segments are compacted while they hold more than this many times the live bytes."""
WORTH = 0.75
"""A segment of which more than this lives is left as it is."""


def to_move(rows: Rows, sizes: Ints, budget: int) -> Ints:
    """Return which rows to move: `budget` bytes out of the emptiest segments. Pure.

    `sizes`: bytes of each segment that `rows` name.
    """
    live = np.bincount(rows["segment"], weights=rows["length"], minlength=len(sizes))
    if sizes.sum() <= REWRITE * live.sum():
        return np.empty(0, np.int64)
    share = (live / np.maximum(sizes, 1))[rows["segment"]]
    order = np.lexsort((rows["offset"], rows["segment"], share))
    order = order[share[order] <= WORTH]
    fits = np.cumsum(rows["length"][order], dtype=np.int64) <= budget
    chosen: Ints = order[fits]
    return chosen


def compact(store: Store, log: Log, budget: int, into: str) -> tuple[Log, Ints, int]:
    """Bring along what lives in the emptiest segments.

    Returns the log as it is then, which of its rows are damaged, and the bytes written.
    """
    chosen = to_move(log.rows, np.array(log.sizes), budget)
    if not len(chosen):
        return log, chosen, 0
    moved, bad, size = _move(store, log.segments, log.rows[chosen], into)
    rows = log.rows.copy()
    rows[chosen] = moved
    return log.with_rows(rows, into, size), chosen[bad], size


def _move(store: Store, segments: Sequence[str], rows: Rows, name: str) -> tuple[Rows, Ints, int]:
    """Copy records to a new segment, which becomes the last of `segments`.

    Returns the rows as they are then, which of them could not be read, and the bytes written.
    StoreError: the new segment cannot be written.
    """
    data = np.empty(int(rows["length"].sum(dtype=np.int64)), np.uint8)
    moved = rows.copy()
    bad: list[int] = []
    end = 0
    for number in np.unique(rows["segment"]).tolist():
        mine = np.flatnonzero(rows["segment"] == number)
        chunk = Chunk(segments[number], rows[mine])
        try:
            into = data[end : end + chunk.size].data
            store.read_ranges(chunk.segment, chunk.ranges(), into)
        except StoreError:
            bad += mine.tolist()
            continue
        damaged = list(read_records(into, chunk.rows)[1])
        bad += mine[damaged].tolist()
        # What is damaged comes along, and is named by nothing.
        whole = np.delete(mine, damaged)
        lengths = chunk.rows["length"].astype(np.int64)
        moved["segment"][whole] = len(segments)
        moved["offset"][whole] = np.delete(end + np.cumsum(lengths) - lengths, damaged)
        end += chunk.size
    if end:
        store.write(name, data[:end].data)
    return moved, np.array(bad, np.int64), end
