"""How far each block is from its saved value, measured a little at a time between requests.

A pass looks at blocks that changed since they were measured, in tiles that fit the cache, and
yields after each, so that the loop may serve requests meanwhile. Blocks move during a pass: each
distance is of the moment its tile was looked at.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import Assign
from daruma_trainer.server.shard import TableArrays

TILE = 16 << 10
"""Elements looked at between two yields, about 10 µs: larger leaves the cache."""


class Distances:
    """The saved copy of each table, and each block's squared distance to it: L2, or for labels
    their total variation.
    """

    def __init__(self) -> None:
        self.saved: list[Floats] = []
        """Flat, as the tables' data. Written only while no pass runs."""
        self.squared: list[Floats] = []
        self.never: list[NDArray[np.bool_]] = []
        """Blocks that were not saved yet, or whose save was lost."""
        self._scratch = np.empty(TILE, np.float32)
        self._labels = False

    def cover(self, tables: Sequence[TableArrays]) -> None:
        """Make room for tables that came since."""
        for table in tables[len(self.saved) :]:
            blocks = len(table.layout.blocks)
            self._labels |= _labels_of(table) > 0
            self.saved.append(np.zeros(table.data.size, np.float32))
            self.squared.append(np.zeros(blocks, np.float32))
            self.never.append(np.ones(blocks, np.bool_))

    def measure(self, tables: Sequence[TableArrays]) -> Iterator[None]:
        """Bring the distances of all changed blocks up to date; one tile between two yields."""
        for i, table in enumerate(tables[: len(self.saved)]):
            labels = _labels_of(table)
            for stretch in table.layout.stretches:
                live, saved = stretch.of(table.data), stretch.of(self.saved[i])
                out = self.squared[i][stretch.first : stretch.stop]
                changed = table.changed[stretch.first : stretch.stop]
                for a, b in _tiles(changed, max(stretch.size, labels)):
                    # Before it is looked at: a push between two of its tiles counts for the next.
                    changed[a:b] = False
                    if labels:
                        yield from _variation(live[a:b], saved[a:b], labels, out[a:b])
                        continue
                    if b - a == 1:
                        yield from self._one(live[a], saved[a], out[a : a + 1])
                        continue
                    t = self._scratch[: (b - a) * stretch.size].reshape(-1, stretch.size)
                    np.subtract(live[a:b], saved[a:b], out=t)
                    np.matmul(t[:, None, :], t[:, :, None], out=out[a:b].reshape(-1, 1, 1))
                    yield

    def _one(self, live: Floats, saved: Floats, out: Floats) -> Iterator[None]:
        """A block that is a tile or more."""
        total = 0.0
        for a in range(0, len(live), TILE):
            t = self._scratch[: min(TILE, len(live) - a)]
            np.subtract(live[a : a + TILE], saved[a : a + TILE], out=t)
            total += float(np.dot(t, t))
            yield
        out[0] = total

    def all(self) -> Floats:
        """Return the squared distance of each block of all tables; infinite: never saved."""
        parts = zip(self.squared, self.never, strict=True)
        empty = [np.empty(0, np.float32)]
        return np.concatenate([np.where(n, np.float32(np.inf), s) for s, n in parts] or empty)

    def total(self) -> float | None:
        """L2 distance of the whole shard, where all of it is saved and nothing is labels."""
        if self._labels:
            return None
        found = float(np.sqrt(self.all().sum(dtype=np.float64)))
        return found if self.saved and np.isfinite(found) else None

    def saved_now(self, table: int, blocks: Ints) -> None:
        """Their saved copy is what it was when these blocks were marked unchanged."""
        self.squared[table][blocks] = 0.0
        self.never[table][blocks] = False

    def lost(self, rows: Ints) -> None:
        """These blocks, counted over all tables, are to be saved again: their records are bad."""
        edges = np.concatenate([[0], np.cumsum([len(n) for n in self.never])])
        for never, a, b in zip(self.never, edges[:-1], edges[1:], strict=True):
            never[rows[(rows >= a) & (rows < b)] - a] = True


def _labels_of(table: TableArrays) -> int:
    return table.rule.labels if isinstance(table.rule, Assign) else 0


def _variation(live: Floats, saved: Floats, labels: int, out: Floats) -> Iterator[None]:
    """Squared total variation of the labels of each block, times its values."""
    blocks, size = live.shape
    first = np.arange(0, blocks * labels, labels)[:, None]
    change = np.zeros(blocks * labels, np.int64)
    width = max(1, TILE // blocks)
    for a in range(0, size, width):
        for values, sign in ((live, 1), (saved, -1)):
            # What is no label counts as the nearest, NaN as 0: a program's mistake stops no save.
            with np.errstate(invalid="ignore"):
                found = np.clip(values[:, a : a + width], 0, labels - 1).astype(np.int64)
            np.clip(found, 0, labels - 1, out=found)
            found += first
            change += sign * np.bincount(found.reshape(-1), minlength=len(change))
        yield
    out[:] = (np.abs(change).reshape(blocks, labels).sum(axis=1) / 2) ** 2


def _tiles(changed: NDArray[np.bool_], size: int) -> list[tuple[int, int]]:
    """Blocks [a, b) of each tile in which something changed; `size`: what a block takes of it."""
    many = max(1, TILE // size)
    starts = np.arange(0, len(changed), many)
    touched = starts[np.logical_or.reduceat(changed, starts)]
    return [(a, min(a + many, len(changed))) for a in touched.tolist()]
