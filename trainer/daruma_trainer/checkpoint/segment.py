"""Segments: blocks with their optimizer state, each with a checksum, one file a save.

A record is a fixed header, then the block's parameters, then each state array, all float32. The
checksum is xxh3 over the header (without itself) and the payload, so a flipped byte anywhere is
found, and found to be this block's.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from daruma_trainer.errors import DamagedError
from daruma_trainer.layout import Floats

MAGIC = b"DRSG"
RECORD = struct.Struct("<4sHHIIqqqIIQ")
_CHECKED = RECORD.size - 8
MAX_RECORD = 1 << 30


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


def write_segment(blocks: Iterable[BlockState]) -> tuple[bytearray, list[tuple[int, int]]]:
    """Return a segment's bytes, and (offset, length) of each block in it."""
    out = bytearray()
    places: list[tuple[int, int]] = []
    for b in blocks:
        payload = b"".join(np.ascontiguousarray(a).data.cast("B") for a in (b.data, *b.state))
        head = RECORD.pack(
            MAGIC, 1, len(b.state), b.table, b.block, b.lineage, b.position, b.steps,
            b.data.size, 0, 0,
        )[:_CHECKED]  # fmt: skip
        digest = xxhash.xxh3_64(head)
        digest.update(payload)
        places.append((len(out), RECORD.size + len(payload)))
        out += head
        out += digest.intdigest().to_bytes(8, "little")
        out += payload
    return out, places


def read_block(record: bytes | memoryview) -> BlockState:
    """Read one record, exactly; DamagedError says what does not fit."""
    view = memoryview(record)
    if len(view) < RECORD.size:
        raise DamagedError(f"a record of {len(view)} bytes")
    magic, form, states, table, block, lineage, position, steps, size, _, digest = (
        RECORD.unpack_from(view)
    )
    if magic != MAGIC or form != 1:
        raise DamagedError("not a record of this format")
    if len(view) != RECORD.size + 4 * size * (states + 1):
        raise DamagedError(f"a record of {len(view)} bytes for {size} values and {states} states")
    found = xxhash.xxh3_64(view[:_CHECKED])
    found.update(view[RECORD.size :])
    if found.intdigest() != digest:
        raise DamagedError("the checksum does not fit")
    values = np.frombuffer(view, np.float32, offset=RECORD.size).reshape(states + 1, size)
    return BlockState(table, block, lineage, position, steps, values[0], tuple(values[1:]))
