"""The stream's messages: see `wire` for what they are made of."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daruma_trainer.layout import Ints
from daruma_trainer.wire import (
    BITMAP,
    MAX_WORKERS,
    Frame,
    MalformedError,
    Push,
    Slots,
    State,
    bitmap,
    decode_push,
    decode_state,
    encode_state,
    from_bitmap,
)

NUMBER = struct.Struct("<qI")
"""Number of the message in its stream; how many workers' batches an update is."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What a replica has, for each slot of the shard in order; lineage 0: nothing."""

    lineage: Ints
    position: Ints


def encode_versions(versions: Versions) -> list[Frame]:
    """Write the answer to FOLLOW."""
    return [np.concatenate([versions.lineage, versions.position]).astype(np.int64).tobytes()]


def decode_versions(frame: Frame, slots: int) -> Versions:
    """Read it; MalformedError if it is not of so many slots."""
    if len(frame) != 16 * slots:
        raise MalformedError(f"versions of {len(frame)} bytes for {slots} slots")
    both = np.frombuffer(frame, np.int64)
    return Versions(both[:slots], both[slots:])


def encode_update(
    number: int, mask: Slots, workers: Sequence[int], push: Sequence[Frame]
) -> list[Frame]:
    """Write an UPDATE: a push as it came (without its header), and for which slots it counts."""
    who = np.array(workers, "<u4").tobytes()
    return [b"".join([NUMBER.pack(number, len(workers)), bitmap(mask), who, push[0]]), *push[1:]]


def decode_update(frames: Sequence[Frame]) -> tuple[int, Slots, list[int], Push, list[Frame]]:
    """Read it: the number, the slots, the workers, the push, and the push's frames."""
    meta = memoryview(frames[1])
    if len(meta) < NUMBER.size + BITMAP:
        raise MalformedError("an update without its meta")
    number, count = NUMBER.unpack_from(meta)
    begin = NUMBER.size + BITMAP
    if not 0 < count <= MAX_WORKERS or len(meta) < begin + 4 * count:
        raise MalformedError(f"an update of {count} workers' batches")
    mask = from_bitmap(meta[NUMBER.size : begin])
    workers = np.frombuffer(meta, "<u4", count, begin).tolist()
    push = [meta[begin + 4 * count :], *frames[2:]]
    return number, mask, workers, decode_push([b"", *push]), push


def encode_whole(number: int, state: State) -> list[Frame]:
    """Write whole slots."""
    meta, *data = encode_state(state)
    return [NUMBER.pack(number, 0) + bytes(meta), *data]


def decode_whole(frames: Sequence[Frame]) -> tuple[int, State]:
    """Read them: the number, and the slots."""
    meta = memoryview(frames[1])
    if len(meta) < NUMBER.size:
        raise MalformedError("whole slots without their meta")
    number, _ = NUMBER.unpack_from(meta)
    return number, decode_state([b"", meta[NUMBER.size :], *frames[2:]])
