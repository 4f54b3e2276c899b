"""Tables, blocks and slots: which rows of which table lie in which slot, and in which order.

Both sides compute the same layout from the job's uid and its tables, so a push or pull of whole
slots carries no row numbers: rows stand in *wire order*, sorted by (slot, block). A server keeps
its arrays in that order, so each slot is one contiguous range of rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from daruma_trainer.contract import SLOTS, ContractError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

MAX_BLOCK_BYTES = 64 << 10
"""Upper bound of a block. A block is a whole row at least, however long that is."""

BLOCKS_A_SERVER = 64
"""Blocks get small enough that each server has this many, where the table has the rows."""

MAX_TABLES = 4096
MAX_ROWS = 1 << 40
MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One named array of parameters: `shape[0]` rows of the product of the rest.

    Fixed by the first Create and equal for every worker; `rule` is canonical JSON.
    """

    id: int
    name: str
    shape: tuple[int, ...]
    block_rows: int
    rule: str

    @property
    def rows(self) -> int:
        """Number of rows; a scalar has one."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be shorter."""
        return -(-self.rows // self.block_rows)

    def __str__(self) -> str:
        """Describe it to people who compare it with another one."""
        blocks = f"{self.block_rows} row{'' if self.block_rows == 1 else 's'} a block"
        return f"{self.name!r} (shape {self.shape}, {self.rule}, {blocks})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> "TableSpec":
        """Parse and bound a table from the network or a manifest; ContractError if it is none."""
        try:
            shape = tuple(int(n) for n in raw["shape"])
            json.loads(raw["rule"])
            table = cls(
                int(raw["id"]), str(raw["name"]), shape, int(raw["block_rows"]), raw["rule"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"not a table: {error!r}") from error
        within = (
            0 <= table.id < MAX_TABLES
            and 0 < len(table.name) <= MAX_NAME
            and len(shape) <= 16
            and all(0 < n <= MAX_ROWS for n in shape)
            and 0 < table.block_rows <= table.rows
            and table.rows * table.cols <= MAX_ROWS
        )
        if not within:
            raise ContractError(f"table {table.name[:MAX_NAME]!r} is out of bounds: {shape}")
        return table


def choose_block_rows(rows: int, cols: int, servers: int, block_bytes: int | None = None) -> int:
    """Return how many rows make a block.

    `block_bytes` is spec.blockBytes; None chooses: at most 64 KiB, and at least 64 blocks a server.
    """
    by_size = max(1, (block_bytes or MAX_BLOCK_BYTES) // (4 * cols))
    if block_bytes is not None:
        return min(by_size, rows)
    return max(1, min(by_size, rows // (servers * BLOCKS_A_SERVER)))


@lru_cache(maxsize=1024)
def slot_of_blocks(uid: str, table: int, blocks: int) -> Ints:
    """Return the slot of each block of a table; shape (blocks,)."""
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(f"{uid}/{table}/{b}".encode()) % SLOTS for b in range(blocks)),
        np.int64,
        count=blocks,
    )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring blocks of one size in a server's arrays."""

    first: int
    stop: int
    start: int
    """Element at which block `first` begins."""
    size: int
    """Elements of each block."""

    def of(self, array: Floats) -> Floats:
        """Return these blocks of a table's array, (blocks, size), as a view."""
        end = self.start + (self.stop - self.first) * self.size
        return array.reshape(-1)[self.start : end].reshape(-1, self.size)

    def among(self, blocks: Ints) -> Ints:
        """Return those of ascending indices of blocks that lie here, counted from `first`."""
        a, b = np.searchsorted(blocks, [self.first, self.stop])
        return blocks[a:b] - self.first


class TableLayout:
    """The rows of one table that lie in an ascending list of slots, in wire order."""

    def __init__(self, uid: str, table: TableSpec, slots: Ints) -> None:
        self.table = table
        slot_of = slot_of_blocks(uid, table.id, table.blocks)
        mine = np.flatnonzero(np.isin(slot_of, slots))
        order = np.argsort(slot_of[mine], kind="stable")
        self.blocks: Ints = mine[order]
        """Global block ids in wire order."""
        starts = self.blocks * table.block_rows
        sizes = np.minimum(table.block_rows, table.rows - starts)
        self.block_starts: Ints = np.concatenate([[0], np.cumsum(sizes)])
        """Row (in wire order) where block k begins; one more than there are blocks."""
        per_slot = np.searchsorted(slot_of[self.blocks], slots, side="left")
        self.slot_blocks: Ints = np.append(per_slot, len(self.blocks))
        """Index into `blocks` where the k-th slot begins; one more than there are slots."""
        self.slot_rows: Ints = self.block_starts[self.slot_blocks]
        """Row (in wire order) where the k-th slot begins."""

    @cached_property
    def rows(self) -> Ints:
        """Global row numbers in wire order."""
        starts = self.blocks * self.table.block_rows
        sizes = np.diff(self.block_starts)
        offsets = np.arange(int(self.block_starts[-1])) - np.repeat(self.block_starts[:-1], sizes)
        return np.repeat(starts, sizes) + offsets

    @cached_property
    def block_sizes(self) -> Ints:
        """Elements of each block."""
        return np.diff(self.block_starts) * self.table.cols

    @cached_property
    def by_block(self) -> Ints:
        """Indices into `blocks`, by ascending global block."""
        return np.argsort(self.blocks, kind="stable")

    def index_of(self, blocks: Ints) -> Ints:
        """Return the index into `blocks` of each global block, or −1 for one that is not here."""
        order = self.by_block
        if not len(order):
            return np.full(len(blocks), -1)
        at = order[np.minimum(np.searchsorted(self.blocks, blocks, sorter=order), len(order) - 1)]
        return np.where(self.blocks[at] == blocks, at, -1)

    def find(self, rows: Ints) -> Ints:
        """Return where global rows stand in wire order; −1 for one that is not here."""
        blocks, offset = np.divmod(rows, self.table.block_rows)
        at = self.index_of(blocks)
        return np.where(at >= 0, self.block_starts[at] + offset, -1)

    def find_in(self, k: Ints, rows: Ints) -> Ints:
        """Return the same for the slots `k` alone: −1 for a row of another one, too."""
        at = self.find(rows)
        chosen = np.zeros(len(self.slot_blocks) + 1, np.bool_)
        chosen[k + 1] = True  # those that are not here (−1) lie before the first
        return np.where(chosen[np.searchsorted(self.slot_rows, at, "right")], at, -1)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Blocks in wire order, as stretches of equal size: three at most, as one is shorter."""
        sizes = self.block_sizes
        return tuple(
            Stretch(a, b, int(self.block_starts[a]) * self.table.cols, int(sizes[a]))
            for a, b in alike(sizes)
        )


class ShardLayout:
    """All tables restricted to an ascending list of slots: what a server owns, or a push covers."""

    def __init__(self, uid: str, tables: Sequence[TableSpec], slots: Sequence[int] | Ints) -> None:
        self.slots: Ints = np.asarray(slots, np.int64)
        self.tables = [TableLayout(uid, table, self.slots) for table in tables]

    @cached_property
    def slot_bytes(self) -> Ints:
        """Bytes of parameters in each slot; shape (len(slots),)."""
        total = np.zeros(len(self.slots), np.int64)
        for layout in self.tables:
            total += np.diff(layout.slot_rows) * layout.table.cols * 4
        return total


def alike(values: NDArray[Any]) -> list[tuple[int, int]]:
    """Return the [start, stop) ranges of neighbours that are equal: all of `values`, in order."""
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    return [(a, b) for a, b in pairwise([0, *edges.tolist(), len(values)]) if a < b]


def runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the [start, stop) ranges where `mask` holds: slots that one kernel call can take."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
