"""Read blocks of a save by ranges, several at once; what is damaged is named and left out."""

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.checkpoint.manifest import (
    Cut,
    Manifest,
    cuts,
    manifests,
    newest_cut,
    read_manifest,
)
from daruma_trainer.checkpoint.places import BlockKey, Places, Rows
from daruma_trainer.checkpoint.segment import Blocks, BlockState, read_records
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import SavedState
from daruma_trainer.errors import DamagedError, StoreAwayError, StoreError
from daruma_trainer.layout import Ints, slot_of_blocks

CHUNK = 8 << 20
"""Bytes read at once: large enough for a store far away, small enough to be used while hot."""
GIVE_UP = 3
"""Records of one segment that fail in a row, before the rest is taken from elsewhere: one that is
gone must not be asked for each block."""

Take = Callable[[list[Blocks]], None]
"""What is done with the blocks of a chunk. Called from several threads."""


class Memory:
    """Memory for chunks, used again and again: fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def take(self, size: int) -> memoryview:
        """Return memory for so many bytes, which belongs to the caller until it gives it back."""
        try:
            found = self._free.get_nowait()
        except queue.Empty:
            found = memoryview(b"")
        return found if len(found) >= size else np.empty(max(size, CHUNK), np.uint8).data

    def give(self, memory: memoryview) -> None:
        """Nothing looks at it any more."""
        self._free.put(memory)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one segment, by offset."""

    segment: str
    rows: Rows

    @property
    def size(self) -> int:
        """Bytes of all its records."""
        return int(self.rows["length"].sum(dtype=np.int64))

    def ranges(self) -> list[tuple[int, int]]:
        """Neighbouring records are one range."""
        starts = self.rows["offset"].astype(np.int64)
        ends = starts + self.rows["length"]
        new = np.concatenate([[True], starts[1:] != ends[:-1]])
        first, last = np.flatnonzero(new), np.append(np.flatnonzero(new)[1:], len(new)) - 1
        return list(zip(starts[first].tolist(), (ends[last] - starts[first]).tolist(), strict=True))


def chunks_of(places: Places, rows: Rows) -> Iterator[Chunk]:
    """Divide rows by segment, and into what is read at once."""
    for number in np.unique(rows["segment"]).tolist():
        mine = rows[rows["segment"] == number]
        mine = mine[np.argsort(mine["offset"], kind="stable")]
        part = (np.cumsum(mine["length"].astype(np.int64)) - 1) // CHUNK
        for piece in np.split(mine, np.flatnonzero(np.diff(part)) + 1):
            yield Chunk(places.segments[number], piece)


def _read_chunk(
    store: Store, chunk: Chunk, damaged: dict[BlockKey, str], into: memoryview | None = None
) -> list[Blocks]:
    """Read what can be read; what cannot is noted. StoreAwayError: nothing is known of it."""
    data = np.empty(chunk.size, np.uint8).data if into is None else into[: chunk.size]
    try:
        store.read_ranges(chunk.segment, chunk.ranges(), data)
    except StoreAwayError:
        raise
    except StoreError as error:
        if len(chunk.rows) > 1:
            return _read_singly(store, chunk, damaged)
        _note(damaged, chunk, chunk.rows[0], error)
        return []
    found, bad = read_records(data, chunk.rows)
    for i, problem in bad.items():
        _note(damaged, chunk, chunk.rows[i], problem)
    return found


def _read_singly(store: Store, chunk: Chunk, damaged: dict[BlockKey, str]) -> list[Blocks]:
    """Read what lies before a segment's end, or around what the disk lost."""
    found: list[Blocks] = []
    failed = 0
    for i in range(len(chunk.rows)):
        blocks = _read_chunk(store, Chunk(chunk.segment, chunk.rows[i : i + 1]), damaged)
        failed = 0 if blocks else failed + 1
        found += blocks
        if failed == GIVE_UP:
            error = StoreError(f"nor could the {GIVE_UP} records before it be read")
            for row in chunk.rows[i + 1 :]:
                _note(damaged, chunk, row, error)
            break
    return found


def _note(damaged: dict[BlockKey, str], chunk: Chunk, row: np.void, error: StoreError) -> None:
    key = int(row["table"]), int(row["block"])
    where = f"{chunk.segment} at {int(row['offset'])}"
    damaged[key] = f"block {key[1]} of table {key[0]} in {where}: {error}"


def read_rows(
    store: Store, places: Places, rows: Rows, take: Take, memory: Memory | None = None
) -> dict[BlockKey, str]:
    """Hand blocks to `take`, a chunk at a time; returns a sentence for each that is damaged.

    With `memory` the blocks lie in it, and are gone once `take` returns; otherwise they stay.
    StoreAwayError: the store cannot be asked, so nothing is known of the rest.
    """
    damaged: dict[BlockKey, str] = {}
    chunks = list(chunks_of(places, rows))

    def one(chunk: Chunk) -> None:
        into = None if memory is None else memory.take(chunk.size)
        if blocks := _read_chunk(store, chunk, damaged, into):
            take(blocks)
        # Not after an exception: who knows then who still looks at it.
        if memory is not None and into is not None:
            memory.give(into)

    if len(chunks) == 1:
        one(chunks[0])
    elif chunks:
        with ThreadPoolExecutor(store.readers, "read") as pool:
            list(pool.map(one, chunks))
    return damaged


def read_blocks(
    store: Store, manifest: Manifest, wanted: Iterable[BlockKey]
) -> tuple[list[BlockState], list[str]]:
    """Read blocks by ranges; returns them, and a sentence for each that is missing or damaged."""
    places, keys = manifest.blocks, list(wanted)
    at = places.find(np.array([t << 32 | b for t, b in keys], np.uint64))
    some: list[Blocks] = []
    missing = [key for key, row in zip(keys, at.tolist(), strict=True) if row < 0]
    damaged = read_rows(store, places, places.rows[at[at >= 0]], some.extend)
    order = {key: i for i, key in enumerate(keys)}
    found = [block for blocks in some for block in blocks.singly()]
    found.sort(key=lambda b: order[b.table, b.block])
    sentences = [f"block {b} of table {t}: not in the manifest" for t, b in missing]
    return found, sentences + list(damaged.values())


# A shard's running checkpoint -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What a shard's running checkpoint had of some slots."""

    manifest: Manifest
    """The newest that can be read: it tells what was applied."""
    damaged: tuple[str, ...]
    """A sentence for each damaged thing, and what was taken instead."""


def read_slots(
    store: Store,
    where: tuple[str, int, int],
    slots: Ints,
    begin: Callable[[Manifest], None],
    take: Take,
) -> Found:
    """Read the blocks of some slots, each from the newest save that has it whole.

    `where`: the job's prefix, the shard, and the incarnation that all saves must be older than.
    `begin` is called with the newest manifest before the first block is taken; the blocks are gone
    once `take` returns. What is damaged is looked for in older manifests, then in the full cuts;
    what is nowhere is not taken.
    StoreError: there is no readable manifest. StoreAwayError: the store cannot be asked.
    """
    sentences: list[str] = []
    main: Manifest | None = None
    wanted: NDArray[np.uint64] = np.empty(0, np.uint64)
    damaged: dict[BlockKey, str] = {}
    tried: dict[BlockKey, set[tuple[str, int]]] = {}
    memory = Memory()
    for name, manifest in _sources(store, where):
        if isinstance(manifest, StoreError):
            sentences.append(f"{name}: {manifest}")
            continue
        rows = manifest.blocks.rows
        if main is None:
            main = manifest
            begin(manifest)
            rows = _of_slots(manifest, slots)
        else:
            at = manifest.blocks.find(wanted)
            rows = rows[at[at >= 0]]
            rows = rows[[_is_new(manifest.blocks, row, tried) for row in rows]]
        bad = read_rows(store, manifest.blocks, rows, take, memory)
        for key in _keys(rows):
            if key in bad:
                damaged.setdefault(key, bad[key])
                place = manifest.blocks[key]
                tried.setdefault(key, set()).add((place.segment, place.offset))
            elif key in damaged:
                sentences.append(f"{damaged.pop(key)}; taken from {name}")
        wanted = np.array([t << 32 | b for t, b in damaged], np.uint64)
        if not damaged:
            break
    if main is None:
        raise StoreError(
            f"shard {where[1]} has no readable manifest in the store"
            + "".join(f"; {s}" for s in sentences[:3])
        )
    return Found(main, (*sentences, *(f"{s}; no other save has it" for s in damaged.values())))


def _sources(
    store: Store, where: tuple[str, int, int]
) -> Iterator[tuple[str, Manifest | StoreError]]:
    """All saves of a shard, the best first."""
    prefix, shard, below = where
    yield from manifests(store, prefix, shard, below)
    for name, cut in cuts(store, prefix):
        if shard >= len(cut.shards):
            continue
        try:
            yield name, read_manifest(store, cut.shards[shard])
        except StoreAwayError:
            raise
        except StoreError as error:
            yield name, error


def _of_slots(manifest: Manifest, slots: Ints) -> Rows:
    """The rows of all blocks in these slots."""
    rows = manifest.blocks.rows
    mine = np.zeros(len(rows), np.bool_)
    for table in manifest.tables:
        slot_of = slot_of_blocks(manifest.uid, table.id, table.blocks)
        at = np.flatnonzero((rows["table"] == table.id) & (rows["block"] < table.blocks))
        mine[at] = np.isin(slot_of[rows["block"][at]], slots)
    return rows[mine]


def _keys(rows: Rows) -> list[BlockKey]:
    return list(zip(rows["table"].tolist(), rows["block"].tolist(), strict=True))


def _is_new(places: Places, row: np.void, tried: dict[BlockKey, set[tuple[str, int]]]) -> bool:
    """Whether this record of a block was not found damaged already, under another manifest."""
    key = int(row["table"]), int(row["block"])
    return (places.segments[row["segment"]], int(row["offset"])) not in tried.get(key, set())


# Cuts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CutPart:
    """A shard's part of a cut, all of it."""

    cut: Cut
    manifest: Manifest
    blocks: list[Blocks]


@dataclass(frozen=True, slots=True)
class Unread:
    """A cut that could not be loaded."""

    problem: str
    away: bool = False
    """The store could not be asked: the cut may be whole."""
    older: SavedState | None = None
    """Else the newest cut before it that exists, or if there is none, the newest."""


def try_cut(store: Store, prefix: str, name: str, shard: int) -> CutPart | Unread:
    """Read a shard's part of a cut, or say what is wrong, and which cut there is instead.

    StoreAwayError: the store cannot be asked.
    """
    try:
        return _read_cut(store, name, shard)
    except StoreAwayError:
        raise
    except StoreError as error:
        older = newest_cut(store, prefix, before=name)
        if older is None and name.rpartition("/")[2] not in store.list(f"{prefix}/cuts"):
            # It was removed since the operator heard of it: newer ones were taken.
            older = newest_cut(store, prefix)
        return Unread(str(error), older=None if older is None else saved_state(*older))


def saved_state(name: str, cut: Cut) -> SavedState:
    """Return what a report says of a cut."""
    return SavedState(name, cut.step, cut.size, 0.0)


def _read_cut(store: Store, name: str, shard: int) -> CutPart:
    """Raise StoreError where some of it is not whole."""
    cut = Cut.decode(store.read(name))
    if shard >= len(cut.shards):
        raise DamagedError(f"{name} is a cut of {len(cut.shards)} servers")
    manifest = read_manifest(store, cut.shards[shard])
    blocks: list[Blocks] = []
    damaged = read_rows(store, manifest.blocks, manifest.blocks.rows, blocks.extend)
    if damaged:
        raise DamagedError(f"{name}: {next(iter(damaged.values()))}")
    return CutPart(cut, manifest, blocks)
