"""Segments: blocks with their optimizer state, each with a checksum, one file a save.

A record is a fixed head, then the block's parameters, then each state array, all float32. Its
first eight bytes are xxh3 over all the rest of it, so a flipped byte anywhere is found, and found
to be this block's. A record says itself which block it is, so it may be copied to another segment.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from daruma_trainer.checkpoint.places import Rows
from daruma_trainer.errors import DamagedError
from daruma_trainer.layout import Floats, Ints, alike

MAGIC = b"DRSG"
HEAD = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "S4"), ("form", "<u2"), ("states", "<u2"),
        ("table", "<u4"), ("block", "<u4"), ("lineage", "<i8"), ("position", "<i8"),
        ("steps", "<i8"), ("size", "<u4"), ("zero", "<u4"),
    ]
)  # fmt: skip
"""A record's first bytes; `size` is the number of values in the block."""
HEAD_FLOATS = HEAD.itemsize // 4
"""A head's place in an array of float32."""
_CHECKED = 8
FORM = 2

Heads = NDArray[np.void]
"""(records,) of HEAD."""


@dataclass(frozen=True, slots=True)
class BlockState:
    """One block as it was at a version of its slot."""

    table: int
    block: int
    lineage: int
    position: int
    steps: int
    """Updates the block had; the optimizer's bias correction goes on from there."""
    data: Floats
    """Flat."""
    state: tuple[Floats, ...]
    """The optimizer's arrays, flat, each as long as `data`."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one size of one table, as they came out of a segment."""

    table: int
    head: Heads
    values: Floats
    """(blocks, 1 + states, size): each block's parameters, then its optimizer's arrays."""

    @property
    def blocks(self) -> Ints:
        """Their global numbers."""
        return self.head["block"].astype(np.int64)

    def singly(self) -> Iterator[BlockState]:
        """Give them one by one, as views."""
        names = ["block", "lineage", "position", "steps"]
        for head, values in zip(self.head[names].tolist(), self.values, strict=True):
            block, lineage, position, steps = head
            yield BlockState(
                self.table, block, lineage, position, steps, values[0], tuple(values[1:])
            )


def heads(count: int, states: int, size: int) -> Heads:
    """Return heads of blocks of one size, in which their identity is still to be filled in."""
    made = np.zeros(count, HEAD)
    made["magic"], made["form"], made["states"], made["size"] = MAGIC, FORM, states, size
    return made


def seal(records: Floats, head: Heads) -> None:
    """Put heads and checksums before payloads that lie in `records`, (n, head and payload)."""
    words = records.view(np.uint32)
    words[:, :HEAD_FLOATS] = head.view(np.uint32).reshape(len(head), HEAD_FLOATS)
    checksums = _checksums(records.data.cast("B"), len(records))
    words[:, : _CHECKED // 4] = checksums.view(np.uint32).reshape(len(head), -1)


def _checksums(data: memoryview, count: int) -> NDArray[np.uint64]:
    """Return those of so many records, equally long, that follow each other."""
    length = len(data) // count
    return np.fromiter(
        (
            xxhash.xxh3_64_intdigest(data[at + _CHECKED : at + length])
            for at in range(0, len(data), length)
        ),
        np.uint64,
        count,
    )


def write_segment(blocks: Iterable[BlockState]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a segment's bytes, and (offset, length) of each block in it."""
    out: list[bytes] = []
    places: list[tuple[int, int]] = []
    at = 0
    for b in blocks:
        head = heads(1, len(b.state), b.data.size)
        for name in ("table", "block", "lineage", "position", "steps"):
            head[name] = getattr(b, name)
        record = np.concatenate([np.zeros(HEAD_FLOATS, np.float32), b.data, *b.state])
        seal(record[None], head)
        out.append(record.tobytes())
        places.append((at, record.nbytes))
        at += record.nbytes
    return b"".join(out), places


def read_records(data: memoryview, rows: Rows) -> tuple[list[Blocks], dict[int, DamagedError]]:
    """Read records that lie in `data` one after another, each as long as its row says.

    Returns the blocks, as views of `data`, and by the row's index what does not fit its record.
    """
    found: list[Blocks] = []
    bad: dict[int, DamagedError] = {}
    at = 0
    for a, b in alike(rows["length"]):
        length = int(rows["length"][a])
        part = data[at : at + length * (b - a)]
        at += len(part)
        if length < HEAD.itemsize:
            bad |= {i: DamagedError(f"a record of {length} bytes") for i in range(a, b)}
            continue
        records = np.frombuffer(part, np.uint8).reshape(b - a, length)
        head = records[:, : HEAD.itemsize].view(HEAD)[:, 0]
        states, table = head["states"].astype(np.int64), head["table"].astype(np.int64)
        problem = _problems(part, head, rows[a:b])
        for i, j in alike(np.where(problem, -1, table << 16 | states)):
            if problem[i]:
                bad |= {a + n: DamagedError(_PROBLEMS[problem[n]]) for n in range(i, j)}
                continue
            values = records[i:j, HEAD.itemsize :].view(np.float32)
            values = values.reshape(j - i, int(states[i]) + 1, int(head["size"][i]))
            found.append(Blocks(int(table[i]), head[i:j], values))
    return found, bad


_PROBLEMS = (
    "",
    "not a record of this format",
    "a record whose length does not fit its head",
    "the checksum does not fit",
    "another block's record",
)


def _problems(data: memoryview, head: Heads, rows: Rows) -> Ints:
    """Return for each record which of _PROBLEMS it has first; 0: it is whole."""
    sizes = head["size"].astype(np.int64) * (head["states"].astype(np.int64) + 1)
    return np.select(
        [
            (head["magic"] != MAGIC) | (head["form"] != FORM),
            rows["length"] != HEAD.itemsize + 4 * sizes,
            _checksums(data, len(rows)) != head["checksum"],
            (head["table"] != rows["table"]) | (head["block"] != rows["block"]),
        ],
        range(1, len(_PROBLEMS)),
    )
