"""Copy chosen blocks out of a shard: the only part of a save that requests wait for.

Blocks are copied to where they will stand in the segment, so that nothing is copied again when it
is written; into memory that was used before, because fresh memory costs several times the copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daruma_trainer.checkpoint.segment import HEAD_FLOATS, Heads, heads, seal
from daruma_trainer.layout import Floats, Ints, Stretch
from daruma_trainer.server.shard import TableArrays
from daruma_trainer.server.slots import Slots

TOGETHER = 64 << 10
"""Elements of small blocks that are gathered at once before they are spaced out into records."""
ALONE = 4 << 10
"""Blocks of as many elements are copied one by one: that is no slower, and straight."""
SPARE = 2
"""Buffers kept for the next save."""


class Buffers:
    """Memory for saves, used again and again."""

    def __init__(self) -> None:
        self._free: list[Floats] = []
        self.scratch = np.zeros(TOGETHER, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the next save."""
        return self.scratch.nbytes + sum(buffer.nbytes for buffer in self._free)

    def take(self, size: int) -> Floats:
        """Return memory for so many floats, the smallest that there is or else fresh."""
        fit = [i for i, buffer in enumerate(self._free) if buffer.size >= size]
        if not fit:
            return np.empty(size, np.float32)
        return self._free.pop(min(fit, key=lambda i: self._free[i].size))

    def give(self, buffer: Floats) -> None:
        """Keep a buffer for the next."""
        self._free = [*self._free, buffer][-SPARE:]


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of one size of one table, copied."""

    table: int
    stretch: Stretch
    chosen: Ints
    """Ascending, counted from the stretch's first block."""
    records: Floats
    """(blocks, head and payload): a part of the save's buffer."""
    head: Heads

    @property
    def blocks(self) -> Ints:
        """Indices into the table's blocks, in wire order."""
        return self.chosen + self.stretch.first

    def seal(self) -> None:
        """Make the records whole; not on the loop's thread."""
        seal(self.records, self.head)

    def keep(self, saved: Floats) -> None:
        """Write the parameters into the saved copy of the table; not on the loop's thread."""
        into, size = self.stretch.of(saved), self.stretch.size
        many = max(1, TOGETHER // size)
        for a in range(0, len(self.chosen), many):
            values = self.records[a : a + many, HEAD_FLOATS : HEAD_FLOATS + size]
            into[self.chosen[a : a + many]] = values


def record_floats(table: TableArrays) -> Ints:
    """Return the size of each block's record, in floats."""
    return HEAD_FLOATS + table.layout.block_sizes * (1 + len(table.state))


def copy_blocks(
    tables: Sequence[TableArrays], chosen: Sequence[Ints], slots: Slots, buffers: Buffers
) -> tuple[list[Piece], Floats]:
    """Copy the chosen blocks of each table; returns them, and the buffer to give back.

    The records stand in the buffer without gaps: together they are a segment.
    """
    parts = [
        (i, table, stretch, part, HEAD_FLOATS + stretch.size * (1 + len(table.state)))
        for i, (table, mine) in enumerate(zip(tables, chosen, strict=True))
        for stretch in table.layout.stretches
        if len(part := stretch.among(mine))
    ]
    buffer = buffers.take(sum(len(part) * width for *_, part, width in parts))
    pieces: list[Piece] = []
    at = 0
    for i, table, stretch, part, width in parts:
        records = buffer[at : at + len(part) * width].reshape(len(part), width)
        at += records.size
        for n, array in enumerate((table.data, *table.state)):
            begin = HEAD_FLOATS + n * stretch.size
            out = records[:, begin : begin + stretch.size]
            _gather(stretch.of(array), part, out, buffers.scratch)
        pieces.append(Piece(i, stretch, part, records, _heads(table, stretch, part, slots)))
    return pieces, buffer


def _heads(table: TableArrays, stretch: Stretch, part: Ints, slots: Slots) -> Heads:
    at = part + stretch.first
    owner = np.searchsorted(table.layout.slot_blocks, at, side="right") - 1
    head = heads(len(part), len(table.state), stretch.size)
    head["table"], head["block"] = table.layout.table.id, table.layout.blocks[at]
    head["lineage"], head["position"] = slots.lineage[owner], slots.position[owner]
    head["steps"] = table.steps[at]
    return head


def _gather(source: Floats, chosen: Ints, out: Floats, scratch: Floats) -> None:
    """Copy rows of `source`, (blocks, size), to `out`, which has gaps between its rows."""
    size = source.shape[1]
    if len(chosen) == len(source):
        np.copyto(out, source)
    elif size >= ALONE:
        for i, k in enumerate(chosen.tolist()):
            out[i] = source[k]
    else:
        many = TOGETHER // size
        together = scratch[: many * size].reshape(many, size)
        for a in range(0, len(chosen), many):
            some = chosen[a : a + many]
            np.take(source, some, axis=0, out=together[: len(some)], mode="clip")
            out[a : a + many] = together[: len(some)]
