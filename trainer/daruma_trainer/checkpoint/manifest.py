"""Manifests: what a shard's newest save consists of. A checkpoint exists when its manifest does.

A manifest of kind `running` is replaced by every save and mixes blocks of several ages; one of
kind `cut` holds one consistent state. Both have the same form, so both are read by the same code.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from daruma_trainer.checkpoint.segment import BlockState, read_block
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import SLOTS, ContractError
from daruma_trainer.errors import DamagedError, StoreError
from daruma_trainer.layout import Ints, TableSpec

MAX_MANIFEST = 256 << 20

BlockKey = tuple[int, int]
"""(table id, global block)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block's record lies: a segment's full name in the store, so that a new incarnation
    can name the segments it was restored from."""

    segment: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class SlotStates:
    """Versions and applied vectors of some slots, as they were when a block of them was saved."""

    ids: Ints
    lineage: Ints
    position: Ints
    last: Ints
    """(slots, workers)"""
    window: NDArray[np.uint64]
    """(slots, workers)"""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One shard's save."""

    uid: str
    shard: int
    incarnation: int
    number: int
    step: int
    tables: tuple[TableSpec, ...]
    blocks: Mapping[BlockKey, Place]
    slots: SlotStates
    kind: str = "running"

    def encode(self) -> bytes:
        """Return the file's bytes: a line with the checksum, then JSON."""
        segments = sorted({p.segment for p in self.blocks.values()})
        number = {name: i for i, name in enumerate(segments)}
        body = json.dumps(
            {
                "uid": self.uid, "shard": self.shard, "incarnation": self.incarnation,
                "number": self.number, "step": self.step, "kind": self.kind,
                "tables": [t.to_json() for t in self.tables],
                "segments": segments,
                "blocks": [
                    [t, b, number[p.segment], p.offset, p.length]
                    for (t, b), p in self.blocks.items()
                ],
                "slots": {
                    "ids": self.slots.ids.tolist(), "lineage": self.slots.lineage.tolist(),
                    "position": self.slots.position.tolist(), "last": self.slots.last.tolist(),
                    "window": self.slots.window.tolist(),
                },
            },
            separators=(",", ":"),
        ).encode()  # fmt: skip
        return _sealed(body)

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Read what `encode` wrote; DamagedError if it is anything else."""
        body = _unsealed(data, "manifest")
        try:
            raw = json.loads(body)
            names, slots = raw["segments"], raw["slots"]
            n = len(slots["ids"])
            # A server of a small model may hold no block at all.
            workers = -1 if n else 0
            return cls(
                raw["uid"], raw["shard"], raw["incarnation"], raw["number"], raw["step"],
                tuple(TableSpec.from_json(t) for t in raw["tables"]),
                {(t, b): Place(names[s], o, size) for t, b, s, o, size in raw["blocks"]},
                SlotStates(
                    np.array(slots["ids"], np.int64), np.array(slots["lineage"], np.int64),
                    np.array(slots["position"], np.int64),
                    np.array(slots["last"], np.int64).reshape(n, workers),
                    np.array(slots["window"], np.uint64).reshape(n, workers),
                ),
                raw["kind"],
            )  # fmt: skip
        except (LookupError, TypeError, ValueError, OverflowError, ContractError) as error:
            raise DamagedError(f"a manifest of another form: {error!r}") from error


def _sealed(body: bytes) -> bytes:
    """Put a line with the checksum before a text."""
    return b"%016x\n" % xxhash.xxh3_64_intdigest(body) + body


def _unsealed(data: bytes, what: str) -> bytes:
    """Return the text again; DamagedError if it is not whole."""
    head, _, body = data.partition(b"\n")
    if head != b"%016x" % xxhash.xxh3_64_intdigest(body):
        raise DamagedError(f"a {what} whose checksum does not fit")
    return body


def read_manifest(store: Store, name: str) -> Manifest:
    """Read a manifest; StoreError if it is gone, DamagedError if it is not whole."""
    return Manifest.decode(store.read(name))


def shard_folder(prefix: str, shard: int, incarnation: int) -> str:
    """Return the folder that one incarnation of a shard writes to, and nobody else."""
    return f"{prefix}/shard-{shard:04d}/{incarnation:08d}"


def newest_manifest(
    store: Store, prefix: str, shard: int, below: int
) -> tuple[str, Manifest] | None:
    """Find a shard's newest readable running manifest of an incarnation less than `below`.

    An incarnation that died before its first manifest is passed over, as are damaged ones.
    """
    top = f"{prefix}/shard-{shard:04d}"
    for incarnation in sorted((i for i in store.list(top) if i.isdigit()), reverse=True):
        if int(incarnation) >= below:
            continue
        names = [n for n in store.list(f"{top}/{incarnation}") if n.startswith("manifest-")]
        for name in reversed(names):
            full = f"{top}/{incarnation}/{name}"
            try:
                return full, read_manifest(store, full)
            except StoreError:
                continue
    return None


def read_blocks(
    store: Store, manifest: Manifest, wanted: Iterable[BlockKey]
) -> tuple[list[BlockState], list[str]]:
    """Read blocks by ranges; returns them, and a sentence for each that is missing or damaged."""
    found: list[BlockState] = []
    damaged: list[str] = []
    for key in wanted:
        place = manifest.blocks.get(key)
        where = f"block {key[1]} of table {key[0]}"
        if place is None:
            damaged.append(f"{where}: not in the manifest")
            continue
        try:
            block = read_block(store.read(place.segment, place.offset, place.length))
        except StoreError as error:
            damaged.append(f"{where} in {place.segment} at {place.offset}: {error}")
            continue
        if (block.table, block.block) == key:
            found.append(block)
        else:
            damaged.append(f"{where} in {place.segment} at {place.offset}: another block's record")
    return found, damaged


# Cuts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """A consistent state of all shards. It exists when its file does, which is written last."""

    number: str
    """`<epoch>-<step>`, padded so that names sort as numbers do."""
    step: int
    servers: int
    shards: tuple[str, ...]
    """The manifest of each shard, by index."""
    size: int
    """Bytes of parameters and optimizer state."""
    batches: tuple[int, ...]
    """For each worker the last batch that is in all slots."""

    def encode(self) -> bytes:
        """Return the file's bytes, in a manifest's form."""
        body = json.dumps(
            {
                "number": self.number, "step": self.step, "servers": self.servers,
                "shards": self.shards, "size": self.size, "batches": self.batches,
            }
        )  # fmt: skip
        return _sealed(body.encode())

    @classmethod
    def decode(cls, data: bytes) -> "Cut":
        """Read what `encode` wrote; DamagedError if it is anything else."""
        try:
            raw: dict[str, Any] = json.loads(_unsealed(data, "cut"))
            shards = tuple(str(s) for s in raw["shards"])
            batches = tuple(int(b) for b in raw["batches"])
            cut = cls(raw["number"], raw["step"], raw["servers"], shards, raw["size"], batches)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(f"not a cut: {error!r}") from error
        if not 0 < cut.servers <= SLOTS or len(shards) != cut.servers:
            raise DamagedError(f"a cut of {cut.servers} servers with {len(shards)} manifests")
        return cut


def cut_number(epoch: int, step: int) -> str:
    """Name a cut so that names sort as (epoch, step) do."""
    return f"{epoch:08d}-{step:010d}"


def cut_name(prefix: str, number: str) -> str:
    """Return the name of a cut's file."""
    return f"{prefix}/cuts/{number}.json"


def newest_cut(store: Store, prefix: str) -> tuple[str, Cut] | None:
    """Find the newest cut that exists and can be read."""
    for name in reversed(store.list(f"{prefix}/cuts")):
        full = f"{prefix}/cuts/{name}"
        try:
            return full, Cut.decode(store.read(full))
        except StoreError:
            continue
    return None
