"""What a server saves, and when: the running checkpoint, cuts, and the final state.

A request is held up only while the chosen blocks are copied. Distances are measured in slices
between requests; encoding, writing and compaction happen on the background thread. The copy of
what is saved (SCAR's running checkpoint) stays in memory for the distances.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import xxhash

from daruma_trainer.checkpoint.manifest import Manifest, SlotStates, shard_folder
from daruma_trainer.checkpoint.places import ROW, Places
from daruma_trainer.checkpoint.selection import Selection, Turn, select
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import Membership, SavedState, Settings
from daruma_trainer.errors import StoreError
from daruma_trainer.histogram import Histogram
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.background import Background
from daruma_trainer.server.compacting import compact
from daruma_trainer.server.copying import Buffers, Piece, copy_blocks, record_floats
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.keeping import Keeper
from daruma_trainer.server.log import Log
from daruma_trainer.server.measuring import Distances
from daruma_trainer.server.shard import TableArrays

LOG = logging.getLogger("daruma.server")
STUCK_SECONDS = 120.0
"""A save that takes longer is said to be stuck; nothing else can be done about it."""
SLICE_SECONDS = 0.001
"""The distance pass works so long, then looks whether there is something to serve."""
PATIENCE_SECONDS = 0.05
"""So long a pass gives way to every request. Then it gets a slice between any two turns, and if
those are long, as those of large pushes are, a longer one:"""
SHARE = 1 / 8
"""of the time that was spent on serving since the last slice."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Of a save: from a directory's to a slow bucket's."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Blocks copied at one moment, ready to be written."""

    manifest: Manifest
    pieces: list[Piece]
    buffer: Floats
    segment: str
    name: str

    @property
    def size(self) -> int:
        """Bytes of the segment."""
        return sum(piece.records.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Written:
    """A save that became durable."""

    name: str
    manifest: Manifest
    size: int
    """Bytes of blocks that were copied for it."""
    seconds: float
    log: Log = field(default_factory=Log)
    moved: int = 0
    """Bytes that compaction wrote."""
    bad: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rows of the log whose records were found damaged."""


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
        self._folder = shard_folder(membership.prefix, index, plane.incarnation)
        self.files = Keeper(
            store, background, (membership.prefix, self._folder), self._settings.keep, self._failed
        )
        self._number = 0
        self._choice = Turn()
        self._turn = 0
        self._writing = 0
        self._began_at = 0.0
        self._whole = False
        """Whether every block of this incarnation, in this generation, is durable."""
        self._distances = Distances()
        self._measuring: Iterator[None] | None = None
        self._chosen: tuple[list[Ints], Turn] | None = None
        """What the pass ended in: blocks of each table, and what the choice leaves for the next."""
        self._due_at = 0.0
        self._worked_at = 0.0
        self._buffers = Buffers()
        self._log = Log()
        self._slots: SlotStates | None = None
        self.newest: SavedState | None = None
        self.newest_at = 0.0
        self.saves = 0
        self.bytes_total = 0
        self.moved_total = 0
        """Bytes that compaction wrote; part of `bytes_total`."""
        self.seconds = Histogram(SECONDS)
        """How long each save took to become durable, on the background thread."""
        self.copied_seconds = 0.0
        """What requests waited for the newest partial save."""
        self.error: str | None = None

    @property
    def every(self) -> float:
        """Steps between two partial saves: r·C; 0: none."""
        on = self._settings.running and self._settings.every
        return self._settings.every * self._settings.fraction if on else 0.0

    def follow(self, settings: Settings) -> None:
        """Take settings that the job's owner may have edited."""
        before, self._settings = self.every, settings
        self.files.keep = settings.keep
        if self.every != before:
            self._turn = int(self._plane.step / self.every) if self.every else 0

    @property
    def memory(self) -> int:
        """Bytes of arrays that are kept between saves: the saved copy, and buffers."""
        return sum(saved.nbytes for saved in self._distances.saved) + self._buffers.nbytes

    @property
    def pending(self) -> bool:
        """Whether a distance pass, or the copy after it, is to go on as soon as there is time."""
        return self._measuring is not None

    def tick(self) -> None:
        """Begin the partial save that is due, if there is one and the last has ended."""
        if self._writing and time.monotonic() - self._began_at > STUCK_SECONDS:
            self.error = f"a save is under way for {STUCK_SECONDS:.0f} s: the store does not answer"
        if not self.every or self._writing or not self._plane.slots.ready.all():
            return
        turn = int(self._plane.step / self.every)
        if turn <= self._turn or self._measuring is not None:
            return
        self._turn = turn
        if not self._whole:
            # A part would be mixed with what its predecessors, or another generation, had.
            self.save_all("running", "", lambda _written, _error: None)
            return
        tables = self._tables()
        # Where everything is saved there is nothing to choose.
        all_of_it = self._settings.fraction >= 1
        self._measuring = iter(()) if all_of_it else self._distances.measure(tables)
        self._chosen = None
        self._due_at = self._worked_at = time.monotonic()

    def work(self, *, idle: bool) -> None:
        """Go on with the distance pass for a slice; at its end choose, in the next call copy."""
        now = time.monotonic()
        if self._measuring is None or not (idle or now - self._due_at > PATIENCE_SECONDS):
            return
        if not self._plane.slots.ready.all():
            self._measuring = None
            return
        until = now + max(SLICE_SECONDS, 0.0 if idle else SHARE * (now - self._worked_at))
        for _ in self._measuring:
            self._worked_at = time.monotonic()
            if self._worked_at > until:
                return
        if self._chosen is None or len(self._chosen[0]) != len(self._plane.shard.tables):
            # A call of its own: a request need not wait for the choice and for the copy.
            self._chosen = self._select()
            return
        before, started = self._choice, time.monotonic()
        self._measuring, (chosen, self._choice) = None, self._chosen
        snapshot = self._copy(chosen, "running")
        self.copied_seconds = time.monotonic() - started

        def done(written: Written | None, _error: str | None) -> None:
            if written is None:
                # Or whoever is saved in turn would be saved a whole round later.
                self._choice = before

        self._write_running(snapshot, done)

    def save_all(
        self, kind: str, number: str, done: Callable[[Written | None, str | None], None]
    ) -> None:
        """Save every block: a cut (a name of its own), or a first manifest (kind `running`).

        `done(written, error)` runs on the loop's thread once it is durable or has failed.
        """
        chosen = [np.arange(len(t.layout.blocks)) for t in self._plane.shard.tables]
        snapshot = self._copy(chosen, kind, number)
        if kind == "running":
            self._measuring, self._whole = None, False

            def whole(written: Written | None, error: str | None) -> None:
                self._whole = written is not None
                done(written, error)

            self._write_running(snapshot, whole)
            return

        def finished(written: Written | None, error: StoreError | None) -> None:
            self._buffers.give(snapshot.buffer)
            self.error = None
            self._failed(error)
            if written is not None:
                self.bytes_total += written.size
                self.seconds.observe(written.seconds)
            done(written, None if error is None else str(error))

        self._background.submit(lambda: self._write(snapshot), finished)

    def rolled_back(self, step: int, then: Callable[[], None]) -> None:
        """Everything is as it was at `step`; `then()` runs once the running checkpoint is, too.

        Blocks of the abandoned lineage must not be restored into this one: their `applied` names
        batches that are to come again. A store that fails does not hold the rollback up.
        """
        self._turn = int(step / self.every) if self.every else 0

        def saved(written: Written | None, _error: str | None) -> None:
            if written is not None:
                # Those before it are of the abandoned lineage: nobody may fall back to them.
                self.files.only_newest()
            then()

        if self._settings.running:
            self.save_all("running", "", saved)
        else:
            then()

    def _select(self) -> tuple[list[Ints], Turn]:
        tables = self._tables()
        sizes = np.concatenate([4 * record_floats(t) for t in tables] or [np.empty(0, np.int64)])
        chosen, turn = select(
            Selection(self._settings.selection), (self._distances.all(), sizes),
            self._settings.fraction, self._choice, self._shuffled,
        )  # fmt: skip
        edges = np.concatenate([[0], np.cumsum([len(t.layout.blocks) for t in tables])])
        return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(edges)], turn

    @cached_property
    def _shuffled(self) -> Callable[[int], Ints]:
        # Made where it is asked for: most servers never need numpy.random, and start without it.
        seed = xxhash.xxh3_64_intdigest(f"{self._uid}/{self._index}".encode())
        return np.random.default_rng(seed).permutation

    def _tables(self) -> list[TableArrays]:
        tables = self._plane.shard.tables
        self._distances.cover(tables)
        return tables

    def _copy(self, chosen: list[Ints], kind: str, number: str = "") -> Snapshot:
        """Copy the chosen blocks of each table: the only part that requests wait for."""
        self._number += 1
        running = kind == "running"
        base = f"{self._number:010d}" if running else number
        segment = f"{self._folder}/{'segment' if running else 'cut'}-{base}.seg"
        slots, complete = self._plane.slots, self._plane.complete_tables
        tables, chosen = self._tables()[:complete], chosen[:complete]
        pieces, buffer = copy_blocks(tables, chosen, slots, self._buffers)
        # What was applied to a slot without blocks is all that it is: it is as new as the save.
        touched = np.ones(len(slots.ids), np.bool_)
        for table in tables:
            touched &= np.diff(table.layout.slot_blocks) == 0
        for table, mine in zip(tables, chosen, strict=True):
            touched[np.searchsorted(table.layout.slot_blocks, mine, side="right") - 1] = True
            if running:
                table.changed[mine] = False
        manifest = Manifest(
            self._uid, self._index, self._plane.incarnation, self._number, self._plane.step,
            tuple(self._plane.shard.specs[:complete]), Places((), np.zeros(0, ROW)),
            self._slot_states(touched, running), kind,
        )  # fmt: skip
        name = f"{self._folder}/{'manifest' if running else 'cut'}-{base}.json"
        return Snapshot(manifest, pieces, buffer, segment, name)

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
        log = self._log
        moved_to = snapshot.segment.replace(".seg", "-moved.seg")

        def write() -> Written:
            written = self._write(snapshot, log, moved_to)
            for piece in snapshot.pieces:
                piece.keep(self._distances.saved[piece.table])
            return written

        def finished(written: Written | None, error: StoreError | None) -> None:
            self._writing -= 1
            self.files.wrote((snapshot.segment, snapshot.name))
            if written is None or written.moved:
                self.files.wrote((moved_to,))
            self._failed(error)
            if written is not None:
                self._note(snapshot, written)
            else:
                self._buffers.give(snapshot.buffer)
                for piece in snapshot.pieces:
                    # It is as far from the saved copy as it was before.
                    self._plane.shard.tables[piece.table].changed[piece.blocks] = True
            done(written, None if error is None else str(error))

        # A manifest names what the ones before it saved, so the next waits until this is durable.
        self._writing += 1
        self._began_at = time.monotonic()
        self._background.submit(write, finished)

    def _write(self, snapshot: Snapshot, before: Log | None = None, moved_to: str = "") -> Written:
        """Make a save durable, on the background thread: the data before what names it."""
        started = time.monotonic()
        for piece in snapshot.pieces:
            piece.seal()
        data = snapshot.buffer.view(np.uint8)[: snapshot.size].data
        self._store.write(snapshot.segment, data)
        base = np.cumsum([0, *(len(t.layout.blocks) for t in self._plane.shard.tables)])
        log = (before or Log()).with_save(snapshot.pieces, snapshot.segment, base)
        moved, bad = 0, np.zeros(0, np.int64)
        if before is not None:
            log, bad, moved = compact(self._store, log, snapshot.size, moved_to)
        manifest = replace(snapshot.manifest, blocks=log.places)
        self._store.write(snapshot.name, manifest.encode())
        seconds = time.monotonic() - started
        return Written(snapshot.name, manifest, len(data), seconds, log, moved, bad)

    def _note(self, snapshot: Snapshot, written: Written) -> None:
        self.error = None
        self._log = written.log
        self._slots = written.manifest.slots
        for piece in snapshot.pieces:
            self._distances.saved_now(piece.table, piece.blocks)
        self._distances.lost(written.bad)
        self._recycle(snapshot.buffer)
        self.saves += 1
        self.moved_total += written.moved
        self.bytes_total += written.size + written.moved
        self.seconds.observe(written.seconds)
        self.newest_at = time.monotonic()
        self.newest = SavedState(
            written.name, written.manifest.step, written.size, 0.0, self._distances.total()
        )
        self.files.add(written.name, written.log.segments)

    def _recycle(self, buffer: Floats) -> None:
        """Keep a save's memory for the next; after a full save make some of a partial one's size.

        It is touched here, because the first touch of fresh memory costs more than the copy.
        """
        tables = self._plane.shard.tables
        sizes = np.concatenate([record_floats(t) for t in tables] or [np.empty(0, np.int64)])
        # A share, and what the save before may have left and a block may go beyond it.
        share = self._settings.fraction * sizes.sum() + 2 * sizes.max(initial=0)
        need = int(min(share, sizes.sum())) if self.every else 0
        if self._settings.cuts or buffer.size <= 2 * need:
            self._buffers.give(buffer)
        if 0 < 2 * need < buffer.size:
            self._background.submit(
                lambda: np.full(need, 0.0, np.float32),
                lambda made, _error: self._buffers.give(made),
            )

    def _failed(self, error: StoreError | None) -> None:
        if error is not None:
            self.error = str(error)
            LOG.warning("a save failed: %s", error)
