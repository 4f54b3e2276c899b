"""Hand a shard over to its successor: frozen, then given whole over HTTP.

What is sent has the form of a save: a manifest, then a segment with every block, its optimizer's
state and its checksum. So the successor reads it with the code that reads a checkpoint.
"""

import struct
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException
from math import inf
from typing import Protocol

from daruma_trainer.checkpoint.manifest import Manifest, SlotStates
from daruma_trainer.checkpoint.places import Place, Places
from daruma_trainer.checkpoint.reading import chunks_of
from daruma_trainer.checkpoint.segment import HEAD as RECORD
from daruma_trainer.checkpoint.segment import Blocks, BlockState, read_records, write_segment
from daruma_trainer.errors import DamagedError, StoreError
from daruma_trainer.server.data import DataPlane

ANSWER_SECONDS = 5.0
"""For the predecessor to answer, and for each piece of what it sends."""
TRANSFER_SECONDS = 120.0
"""For the whole shard to come."""
FREEZE_SECONDS = 5.0
"""For the predecessor to hear that it is to hand over."""
HEAD = struct.Struct("<4sIQ")
MAGIC = b"DRHO"
MAX_MANIFEST = 256 << 20
MAX_SHARD = 1 << 40


class _Readable(Protocol):
    def read(self, amount: int, /) -> bytes: ...


def pack(plane: DataPlane, uid: str, index: int) -> Iterator[bytes | bytearray]:
    """Give a frozen shard in pieces, a block each: the first says how much comes."""
    places: dict[tuple[int, int], Place] = {}
    size = 0
    for block in _blocks(plane):
        length = RECORD.itemsize + block.data.nbytes * (1 + len(block.state))
        places[block.table, block.block] = Place("", size, length)
        size += length
    slots = plane.slots
    states = SlotStates(slots.ids, slots.lineage, slots.position, slots.last, slots.window)
    manifest = Manifest(
        uid,
        index,
        plane.incarnation,
        0,
        plane.step,
        tuple(plane.shard.specs[: plane.complete_tables]),
        Places.of(places),
        states,
    ).encode()
    yield HEAD.pack(MAGIC, len(manifest), size) + manifest
    for block in _blocks(plane):
        yield write_segment([block])[0]


def fetch(agent: str, token: str) -> tuple[Manifest, list[Blocks], list[str]]:
    """Ask a predecessor for its shard: what `pack` gave, and a sentence for each damaged block.

    StoreError: it does not answer, or is not frozen. DamagedError: what it sends is no shard.
    """
    import urllib.request  # it is slow to import, and few servers need it

    request = urllib.request.Request(
        f"http://{agent}/v1/shard", headers={"Authorization": f"Bearer {token}"}
    )
    # A proxy that the pod may have for its store has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + FREEZE_SECONDS
    while True:
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return unpack(answer, time.monotonic() + TRANSFER_SECONDS)
        except (OSError, HTTPException) as error:
            refused = getattr(error, "code", None) == HTTPStatus.UNAUTHORIZED
            gone = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            if refused or gone or time.monotonic() > deadline:
                raise StoreError(f"{agent} does not hand its shard over: {error}") from error
        # The word that it is to freeze is still on its way, or it is busy.
        time.sleep(0.02)


def unpack(stream: _Readable, deadline: float = inf) -> tuple[Manifest, list[Blocks], list[str]]:
    """Read what `pack` gave, until `deadline` (monotonic).

    DamagedError: it is something else, ends too early, or takes too long.
    """
    magic, length, size = HEAD.unpack(_exactly(stream, HEAD.size))
    if magic != MAGIC or length > MAX_MANIFEST or size > MAX_SHARD:
        raise DamagedError("not a shard that is handed over")
    manifest = Manifest.decode(_exactly(stream, length))
    blocks: list[Blocks] = []
    damaged: list[str] = []
    for chunk in chunks_of(manifest.blocks, manifest.blocks.rows):
        if time.monotonic() > deadline:
            raise DamagedError(f"the shard did not come within {TRANSFER_SECONDS:.0f} s")
        found, bad = read_records(memoryview(_exactly(stream, chunk.size)), chunk.rows)
        blocks += found
        for i, error in bad.items():
            table, block = int(chunk.rows["table"][i]), int(chunk.rows["block"][i])
            damaged.append(f"block {block} of table {table}, as it was handed over: {error}")
    return manifest, blocks, damaged


def _exactly(stream: _Readable, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise DamagedError(f"the shard that is handed over ends {size - len(data)} bytes early")
    return data


def _blocks(plane: DataPlane) -> Iterator[BlockState]:
    """All blocks, as views: nothing changes a frozen shard."""
    slots = plane.slots
    for table in plane.shard.tables[: plane.complete_tables]:
        layout = table.layout
        for s in range(len(slots.ids)):
            for b in range(int(layout.slot_blocks[s]), int(layout.slot_blocks[s + 1])):
                rows = slice(int(layout.block_starts[b]), int(layout.block_starts[b + 1]))
                yield BlockState(
                    layout.table.id, int(layout.blocks[b]), int(slots.lineage[s]),
                    int(slots.position[s]), int(table.steps[b]), table.data[rows].reshape(-1),
                    tuple(a[rows].reshape(-1) for a in table.state),
                )  # fmt: skip
