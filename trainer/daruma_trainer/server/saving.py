"""What a server saves, and when: the running checkpoint, cuts, and the final state.

A request is held up only while the chosen blocks are copied; writing happens on the background
thread. The copy of what is saved (SCAR's running checkpoint) stays in memory for the distances.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import xxhash

from daruma_trainer.checkpoint.manifest import (
    BlockKey,
    Manifest,
    Place,
    SlotStates,
    shard_folder,
)
from daruma_trainer.checkpoint.segment import BlockState, write_segment
from daruma_trainer.checkpoint.selection import Selection, select, squared_distances
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import Membership, SavedState
from daruma_trainer.errors import StoreError
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.shard import TableArrays

LOG = logging.getLogger("daruma.server")
REWRITE = 2.0
"""When segments hold this many times the live bytes, everything is saved anew and they go."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Blocks copied at one moment, ready to be written."""

    manifest: Manifest
    blocks: list[BlockState]
    segment: str
    name: str


@dataclass(frozen=True, slots=True)
class Written:
    """A save that became durable."""

    name: str
    manifest: Manifest
    size: int
    seconds: float


class Saver:
    """Saves of one incarnation of one shard, into a folder of its own."""

    def __init__(
        self,
        plane: DataPlane,
        store: Store,
        background: Background,
        membership: Membership,
        index: int,
    ) -> None:
        self._plane = plane
        self._store = store
        self._background = background
        self._settings = membership.settings
        self._uid = membership.job_uid
        self._index = index
        self._prefix = membership.prefix
        self._folder = shard_folder(membership.prefix, index, plane.incarnation)
        self._number = 0
        self._cursor = 0
        self._turn = 0
        self._writing = 0
        self._rng = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{self._uid}/{index}".encode()))
        self._saved: list[Floats] = []
        self._never: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []
        self._places: dict[BlockKey, Place] = {}
        self._slots: SlotStates | None = None
        self._sizes: dict[str, int] = {}
        self._kept: list[str] = []
        self.newest: SavedState | None = None
        self.newest_at = 0.0
        self.bytes_total = 0
        self.seconds: list[float] = []
        self.error: str | None = None

    @property
    def every(self) -> float:
        """Steps between two partial saves: r·C; 0: none."""
        on = self._settings.running and self._settings.every
        return self._settings.every * self._settings.fraction if on else 0.0

    def tick(self) -> None:
        """Begin the partial save that is due, if there is one and the last has ended."""
        if not self.every or self._writing or not self._plane.slots.ready.all():
            return
        turn = int(self._plane.step / self.every)
        if turn <= self._turn:
            return
        self._turn = turn
        if sum(self._sizes.values()) > REWRITE * max(1, self._live_bytes()):
            chosen = [np.arange(len(t.layout.blocks)) for t in self._plane.shard.tables]
        else:
            chosen = self._select()
        self._write_running(self._copy(chosen, "running"), lambda _written, _error: None)

    def save_all(
        self, kind: str, number: str, done: Callable[[Written | None, str | None], None]
    ) -> None:
        """Save every block: a cut (a name of its own), or a first manifest (kind `running`).

        `done(written, error)` runs on the loop's thread once it is durable or has failed.
        """
        chosen = [np.arange(len(t.layout.blocks)) for t in self._plane.shard.tables]
        snapshot = self._copy(chosen, kind, number)
        if kind == "running":
            self._write_running(snapshot, done)
        else:
            self._write(snapshot, lambda w, e: done(w, None if e is None else str(e)))

    def rolled_back(self, step: int, then: Callable[[], None]) -> None:
        """Everything is as it was at `step`; `then()` runs once the running checkpoint is, too.

        Blocks of the abandoned lineage must not be restored into this one: their `applied` names
        batches that are to come again. A store that fails does not hold the rollback up.
        """
        self._turn = int(step / self.every) if self.every else 0
        if self._settings.running:
            self.save_all("running", "", lambda _written, _error: then())
        else:
            then()

    def forget_cuts(self, newest: str) -> None:
        """Delete this shard's files of cuts before `newest` that do not exist (any more)."""
        prefix, store, folders = self._prefix, self._store, self._folders

        def clean() -> None:
            exist = {n.removesuffix(".json") for n in store.list(f"{prefix}/cuts")}
            for folder in folders():
                for name in store.list(folder):
                    number = name.split(".")[0].removeprefix("cut-")
                    if name.startswith("cut-") and number < newest and number not in exist:
                        store.delete(f"{folder}/{name}")

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def _folders(self) -> list[str]:
        """Return the folders of this incarnation and of those before it."""
        top, _, own = self._folder.rpartition("/")
        return [f"{top}/{name}" for name in self._store.list(top) if name <= own]

    def _forget_predecessors(self) -> None:
        """This incarnation's first save is durable: older running checkpoints are of no use."""
        store, folders, own = self._store, self._folders, self._folder

        def clean() -> None:
            for folder in folders():
                for name in store.list(folder) if folder != own else []:
                    if name.startswith(("manifest-", "segment-")):
                        store.delete(f"{folder}/{name}")

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def distance(self) -> float | None:
        """L2 distance between the live shard and what is saved, where all of it is."""
        if not self._saved or any(n.any() for n in self._never):
            return None
        total = 0.0
        for table, saved in zip(self._plane.shard.tables, self._saved, strict=False):
            out = np.zeros(1, np.float32)
            ends = np.array([0, saved.size])
            squared_distances(table.data.reshape(-1), saved, ends, out)
            total += float(out[0])
        return float(np.sqrt(total))

    def _select(self) -> list[Ints]:
        tables = self._tables()
        counts = [len(t.layout.blocks) for t in tables]
        distances = np.zeros(sum(counts), np.float32)
        at = 0
        for i, table in enumerate(tables):
            part = distances[at : at + counts[i]]
            starts = table.layout.block_starts * table.layout.table.cols
            squared_distances(table.data.reshape(-1), self._saved[i], starts, part)
            part[self._never[i]] = np.inf
            at += counts[i]
        count = max(1, round(self._settings.fraction * len(distances)))
        how = Selection(self._settings.selection)
        chosen, self._cursor = select(how, distances, count, self._cursor, self._rng)
        edges = np.concatenate([[0], np.cumsum(counts)])
        return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(edges)]

    def _tables(self) -> list[TableArrays]:
        tables = self._plane.shard.tables
        for table in tables[len(self._saved) :]:
            self._saved.append(np.zeros(table.data.size, np.float32))
            self._never.append(np.ones(len(table.layout.blocks), np.bool_))
        return tables

    def _copy(self, chosen: list[Ints], kind: str, number: str = "") -> Snapshot:
        """Copy the chosen blocks of each table: the only part that requests wait for."""
        self._number += 1
        running = kind == "running"
        base = f"{self._number:010d}" if running else number
        segment = f"{self._folder}/{'segment' if running else 'cut'}-{base}.seg"
        slots = self._plane.slots
        blocks: list[BlockState] = []
        tables = self._tables()
        # What was applied to a slot without blocks is all that it is: it is as new as the save.
        touched = np.ones(len(slots.ids), np.bool_)
        for table in tables:
            touched &= np.diff(table.layout.slot_blocks) == 0
        for i, table in enumerate(tables):
            layout, cols = table.layout, table.layout.table.cols
            owner = np.searchsorted(layout.slot_blocks, chosen[i], side="right") - 1
            touched[owner] = True
            for b, s in zip(chosen[i].tolist(), owner.tolist(), strict=True):
                rows = slice(int(layout.block_starts[b]), int(layout.block_starts[b + 1]))
                data = table.data[rows].reshape(-1).copy()
                if running:
                    self._saved[i][rows.start * cols : rows.stop * cols] = data
                    self._never[i][b] = False
                state = tuple(a[rows].reshape(-1).copy() for a in table.state)
                version = slots.version(s)
                blocks.append(
                    BlockState(
                        layout.table.id, int(layout.blocks[b]), version.lineage, version.position,
                        int(table.steps[b]), data, state,
                    )
                )  # fmt: skip
        manifest = Manifest(
            self._uid, self._index, self._plane.incarnation, self._number, self._plane.step,
            tuple(self._plane.shard.specs), {}, self._slot_states(touched, running), kind,
        )  # fmt: skip
        name = f"{self._folder}/{'manifest' if running else 'cut'}-{base}.json"
        return Snapshot(manifest, blocks, segment, name)

    def _slot_states(
        self, touched: np.ndarray[tuple[int], np.dtype[np.bool_]], running: bool
    ) -> SlotStates:
        """A slot's `applied` in a running checkpoint is that of its most recently saved block."""
        live = self._plane.slots
        now = SlotStates(
            live.ids,
            live.lineage.copy(),
            live.position.copy(),
            live.last.copy(),
            live.window.copy(),
        )
        if not running:
            return now
        if self._slots is not None and self._slots.last.shape == now.last.shape:
            old = self._slots
            for array, before in (
                (now.lineage, old.lineage),
                (now.position, old.position),
                (now.last, old.last),
                (now.window, old.window),
            ):
                array[~touched] = before[~touched]
        return now

    def _write_running(
        self, snapshot: Snapshot, done: Callable[[Written | None, str | None], None]
    ) -> None:
        def finished(written: Written | None, error: StoreError | None) -> None:
            self._writing -= 1
            self._failed(error)
            if written is not None:
                self._note(written)
            else:
                # What was to be saved is not: its distance must not look small the next time.
                for never in self._never:
                    never[:] = True
            done(written, None if error is None else str(error))

        # A manifest names what the ones before it saved, so the next waits until this is durable.
        self._writing += 1
        self._write(snapshot, finished)

    def _write(
        self, snapshot: Snapshot, done: Callable[[Written | None, StoreError | None], None]
    ) -> None:
        store = self._store
        before = dict(self._places) if snapshot.manifest.kind == "running" else {}

        def write() -> Written:
            started = time.monotonic()
            data, places = write_segment(snapshot.blocks)
            store.write(snapshot.segment, data)
            for block, (offset, length) in zip(snapshot.blocks, places, strict=True):
                before[block.table, block.block] = Place(snapshot.segment, offset, length)
            manifest = replace(snapshot.manifest, blocks=before)
            # The data is durable before anything names it.
            store.write(snapshot.name, manifest.encode())
            return Written(snapshot.name, manifest, len(data), time.monotonic() - started)

        self._background.submit(write, done)

    def _note(self, written: Written) -> None:
        self.error = None
        self._places = dict(written.manifest.blocks)
        self._slots = written.manifest.slots
        live = {p.segment for p in self._places.values()}
        self._sizes = {s: n for s, n in self._sizes.items() if s in live}
        for place in self._places.values():
            self._sizes.setdefault(place.segment, written.size)
        if not self._kept:
            self._forget_predecessors()
        self._kept.append(written.name)
        self.bytes_total += written.size
        self.seconds.append(written.seconds)
        self.newest_at = time.monotonic()
        self.newest = SavedState(
            written.name, written.manifest.step, written.size, 0.0, self.distance()
        )
        self._retire(written.manifest)

    def _retire(self, newest: Manifest) -> None:
        """Delete manifests beyond `keep`, and segments here that none of the others names."""
        drop, self._kept = self._kept[: -self._settings.keep], self._kept[-self._settings.keep :]
        if not drop:
            return
        store, folder, kept = self._store, self._folder, list(self._kept)

        def clean() -> None:
            for name in drop:
                store.delete(name)
            named = {p.segment for p in newest.blocks.values()}
            # A save of all that was begun meanwhile is not to be touched.
            until = f"segment-{newest.number:010d}"
            for name in kept[:-1]:
                named |= {p.segment for p in Manifest.decode(store.read(name)).blocks.values()}
            for name in store.list(folder):
                old = name.startswith("segment-") and name < until
                if old and f"{folder}/{name}" not in named:
                    store.delete(f"{folder}/{name}")

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def _live_bytes(self) -> int:
        return sum(p.length for p in self._places.values())

    def _failed(self, error: StoreError | None) -> None:
        if error is not None:
            self.error = str(error)
            LOG.warning("a save failed: %s", error)
