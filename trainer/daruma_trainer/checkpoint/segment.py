"""Segments: blocks with their optimizer state, each with a checksum, one file a save.

A record is a fixed head, then the block's parameters, then each state array, all float32. Its
first eight bytes are xxh3 over all the rest of it, so a flipped byte anywhere is found, and found
to be this block's. A record says itself which block it is, so it may be copied to another segment.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from daruma_trainer.errors import DamagedError
from daruma_trainer.layout import Floats

MAGIC = b"DRSG"
HEAD = np.dtype(
    [
        ("checksum", "<u8"), ("magic", "S4"), ("form", "<u2"), ("states", "<u2"),
        ("table", "<u4"), ("block", "<u4"), ("lineage", "<i8"), ("position", "<i8"),
        ("steps", "<i8"), ("size", "<u4"), ("zero", "<u4"),
    ]
)  # fmt: skip
"""A record's first bytes; `size` is the number of values in the block."""
_HEAD = struct.Struct("<Q4sHHIIqqqII")
"""The same, to read one: for a few numbers numpy is slow, and a shard has thousands of heads."""
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


def heads(count: int, states: int, size: int) -> Heads:
    """Return heads of blocks of one size, in which their identity is still to be filled in."""
    made = np.zeros(count, HEAD)
    made["magic"], made["form"], made["states"], made["size"] = MAGIC, FORM, states, size
    return made


def seal(records: Floats, head: Heads) -> None:
    """Put heads and checksums before payloads that lie in `records`, (n, head and payload)."""
    words = records.view(np.uint32)
    words[:, :HEAD_FLOATS] = head.view(np.uint32).reshape(len(head), HEAD_FLOATS)
    data, length = records.data.cast("B"), 4 * records.shape[1]
    checksums = np.fromiter(
        (
            xxhash.xxh3_64_intdigest(data[at + _CHECKED : at + length])
            for at in range(0, len(data), length)
        ),
        np.uint64,
        count=len(head),
    )
    words[:, : _CHECKED // 4] = checksums.view(np.uint32).reshape(len(head), -1)


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


def check_record(record: memoryview) -> tuple[int, ...]:
    """Return a whole record's states, table, block, lineage, position, steps and size.

    DamagedError says what does not fit.
    """
    if len(record) < HEAD.itemsize:
        raise DamagedError(f"a record of {len(record)} bytes")
    checksum, magic, form, states, *rest, size, _ = _HEAD.unpack_from(record)
    if magic != MAGIC or form != FORM:
        raise DamagedError("not a record of this format")
    if len(record) != HEAD.itemsize + 4 * size * (states + 1):
        raise DamagedError(f"a record of {len(record)} bytes for {size} values, {states} states")
    if xxhash.xxh3_64_intdigest(record[_CHECKED:]) != checksum:
        raise DamagedError("the checksum does not fit")
    return states, *rest, size


def read_block(record: bytes | memoryview) -> BlockState:
    """Read one record, exactly; its arrays are views of it. DamagedError: what does not fit."""
    view = memoryview(record)
    states, table, block, lineage, position, steps, size = check_record(view)
    values = np.frombuffer(view, np.float32, offset=HEAD.itemsize).reshape(states + 1, size)
    return BlockState(table, block, lineage, position, steps, values[0], tuple(values[1:]))
