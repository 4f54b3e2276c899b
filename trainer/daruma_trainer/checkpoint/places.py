"""Where a save's blocks lie: one row a block, as arrays, because a shard may have many."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.layout import Ints

BlockKey = tuple[int, int]
"""(table id, global block)."""

ROW = np.dtype(
    [("table", "<u4"), ("block", "<u4"), ("segment", "<u4"), ("length", "<u4"), ("offset", "<u8")]
)
Rows = NDArray[np.void]
"""(blocks,) of ROW; `segment` is an index into the list of segments' names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block's record lies: a segment's full name in the store, so that a new incarnation
    can name the segments it was restored from."""

    segment: str
    offset: int
    length: int


class Places(Mapping[BlockKey, Place]):
    """All blocks of one save. Treat the arrays as constants."""

    def __init__(self, segments: Sequence[str], rows: Rows) -> None:
        self.segments = tuple(segments)
        self.rows = rows
        keys = keys_of(rows)
        self._order: Ints = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    @classmethod
    def of(cls, places: Mapping[BlockKey, Place]) -> "Places":
        """Take them from a mapping."""
        segments = sorted({p.segment for p in places.values()})
        number = {name: i for i, name in enumerate(segments)}
        rows = [(*key, number[p.segment], p.length, p.offset) for key, p in places.items()]
        return cls(segments, np.array(rows, ROW))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(zip(self.rows["table"].tolist(), self.rows["block"].tolist(), strict=True))

    def __getitem__(self, key: BlockKey) -> Place:
        at = self.find(np.array([key[0] << 32 | key[1]], np.uint64))
        if at[0] < 0:
            raise KeyError(key)
        row: Any = self.rows[at[0]]
        return Place(self.segments[row["segment"]], int(row["offset"]), int(row["length"]))

    def find(self, keys: NDArray[np.uint64]) -> Ints:
        """Return the row of each key, or −1."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._order[at], -1)


def keys_of(rows: Rows) -> NDArray[np.uint64]:
    """Return one number a block that orders as (table, block) does."""
    keys: NDArray[np.uint64] = rows["table"].astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= rows["block"]
    return keys


def compressed(segments: Sequence[str], rows: Rows) -> tuple[list[str], Rows]:
    """Drop the names of segments in which no row (but those of length 0) lies any more."""
    rows = rows.copy()
    named = np.zeros(len(segments) + 1, np.bool_)
    named[rows["segment"][rows["length"] > 0]] = True
    rows["segment"] = np.maximum(np.cumsum(named) - 1, 0)[rows["segment"]]
    return [name for name, used in zip(segments, named, strict=False) if used], rows
