"""Manifests: what a shard's newest save consists of. A checkpoint exists when its manifest does.

A manifest of kind `running` is replaced by every save and mixes blocks of several ages; one of
kind `cut` holds one consistent state. Both have the same form, so both are read by the same code.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from daruma_trainer.checkpoint.places import ROW, Places, compressed
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import SLOTS, ContractError
from daruma_trainer.errors import DamagedError, StoreAwayError, StoreError
from daruma_trainer.layout import Ints, TableSpec

MAX_WORKERS = 1 << 20


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
    blocks: Places
    slots: SlotStates
    kind: str = "running"

    def encode(self) -> bytes:
        """Return the file's bytes: a line with the checksum, a line of JSON, then arrays."""
        segments, rows = compressed(self.blocks.segments, self.blocks.rows)
        slots = self.slots
        head = {
            "uid": self.uid, "shard": self.shard, "incarnation": self.incarnation,
            "number": self.number, "step": self.step, "kind": self.kind,
            "tables": [t.to_json() for t in self.tables], "segments": segments,
            "blocks": len(rows), "slots": slots.last.shape[0], "workers": slots.last.shape[1],
        }  # fmt: skip
        arrays = (rows, slots.ids, slots.lineage, slots.position, slots.last, slots.window)
        line = json.dumps(head, separators=(",", ":")).encode()
        return _sealed(b"\n".join([line, b"".join(a.tobytes() for a in arrays)]))

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Read what `encode` wrote; DamagedError if it is anything else."""
        line, _, body = _unsealed(data, "manifest").partition(b"\n")
        try:
            raw = json.loads(line)
            blocks, n, workers = int(raw["blocks"]), int(raw["slots"]), int(raw["workers"])
            if not (0 <= n <= SLOTS and 0 <= workers <= MAX_WORKERS and blocks >= 0):
                raise DamagedError(f"a manifest of {n} slots, {workers} workers, {blocks} blocks")
            parts = np.array([blocks * ROW.itemsize, *[8 * n] * 3, *[8 * n * workers] * 2])
            ends = np.cumsum(parts)
            if ends[-1] != len(body):
                raise DamagedError(f"a manifest with {len(body)} bytes, {ends[-1]} were expected")
            names = [str(s) for s in raw["segments"]]
            rows = np.frombuffer(body, ROW, blocks)
            if len(rows) and int(rows["segment"].max()) >= len(names):
                raise DamagedError("a manifest that names no segment for a block")
            ids, lineage, position, last, window = (
                np.frombuffer(body[a - size : a], np.int64).copy()
                for a, size in zip(ends[1:].tolist(), parts[1:].tolist(), strict=True)
            )
            return cls(
                raw["uid"], raw["shard"], raw["incarnation"], raw["number"], raw["step"],
                tuple(TableSpec.from_json(t) for t in raw["tables"]), Places(names, rows),
                SlotStates(
                    ids, lineage, position, last.reshape(n, workers),
                    window.view(np.uint64).reshape(n, workers),
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


def manifests(
    store: Store, prefix: str, shard: int, below: int
) -> Iterator[tuple[str, Manifest | StoreError]]:
    """Read a shard's running manifests of incarnations less than `below`, the newest first.

    An incarnation that died before its first manifest is passed over; of one that cannot be read
    comes the error. StoreAwayError: the store cannot be asked.
    """
    top = f"{prefix}/shard-{shard:04d}"
    for incarnation in sorted((i for i in store.list(top) if i.isdigit()), reverse=True):
        if int(incarnation) >= below:
            continue
        names = [n for n in store.list(f"{top}/{incarnation}") if n.startswith("manifest-")]
        for name in reversed(names):
            full = f"{top}/{incarnation}/{name}"
            try:
                yield full, read_manifest(store, full)
            except StoreAwayError:
                raise
            except StoreError as error:
                yield full, error


def newest_manifest(
    store: Store, prefix: str, shard: int, below: int
) -> tuple[str, Manifest] | None:
    """Find the newest of `manifests` that can be read."""
    for name, found in manifests(store, prefix, shard, below):
        if isinstance(found, Manifest):
            return name, found
    return None


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


def cuts(store: Store, prefix: str, before: str | None = None) -> Iterator[tuple[str, Cut]]:
    """Read the files of all cuts that exist and can be read, the newest first.

    `before`: the file of a cut; those before it alone. StoreAwayError: the store cannot be asked.
    """
    for name in reversed(store.list(f"{prefix}/cuts")):
        full = f"{prefix}/cuts/{name}"
        if before is not None and full >= before:
            continue
        try:
            cut = Cut.decode(store.read(full))
        except StoreAwayError:
            raise
        except StoreError:
            continue
        yield full, cut


def newest_cut(store: Store, prefix: str, before: str | None = None) -> tuple[str, Cut] | None:
    """Find the first of `cuts`."""
    return next(cuts(store, prefix, before), None)
