"""Where every block of a shard lies in its running checkpoint. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from daruma_trainer.checkpoint.places import ROW, Places, Rows, compressed
from daruma_trainer.layout import Ints
from daruma_trainer.server.copying import Piece


@dataclass(frozen=True, slots=True)
class Log:
    """Rows stand table by table in wire order; one of length 0 was not saved yet."""

    segments: Sequence[str] = ()
    sizes: Sequence[int] = ()
    """Bytes of each segment, dead ones included."""
    rows: Rows = field(default_factory=lambda: np.zeros(0, ROW))

    @property
    def places(self) -> Places:
        """What a manifest says of it."""
        return Places(self.segments, self.rows[self.rows["length"] > 0])

    def with_save(self, pieces: Sequence[Piece], segment: str, base: Ints) -> "Log":
        """Return the log after a save. `base`: the row at which each table begins, and the end."""
        rows = np.zeros(base[-1], ROW)
        rows[: len(self.rows)] = self.rows
        at = 0
        for piece in pieces:
            mine, length = base[piece.table] + piece.blocks, 4 * piece.records.shape[1]
            rows["table"][mine], rows["block"][mine] = piece.head["table"], piece.head["block"]
            rows["segment"][mine], rows["length"][mine] = len(self.segments), length
            rows["offset"][mine] = at + length * np.arange(len(mine))
            at += piece.records.nbytes
        return self.with_rows(rows, segment, at)

    def with_rows(self, rows: Rows, segment: str, size: int) -> "Log":
        """Return a log of these rows, some of which may lie in a new segment, the last one."""
        names = [*self.segments, segment]
        size_of = dict(zip(names, [*self.sizes, size], strict=True))
        alive, rows = compressed(names, rows)
        return Log(alive, [size_of[name] for name in alive], rows)
