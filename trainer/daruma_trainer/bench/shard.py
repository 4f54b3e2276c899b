"""One shard in this process, with the loop and the store's thread that a server has."""

import contextlib
import os
import queue
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.checkpoint.manifest import newest_manifest, shard_folder
from daruma_trainer.checkpoint.places import Places
from daruma_trainer.checkpoint.store import open_store
from daruma_trainer.contract import (
    SLOTS,
    Member,
    Membership,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    slots_to_hex,
)
from daruma_trainer.errors import StoreError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.server.saving import Saver
from daruma_trainer.server.slots import SlotState

DEADLINE = 120.0
COLS = 256


class Shard:
    """A shard of one table of plain SGD, saved to a store as a server does it."""

    def __init__(self, uri: str, megabytes: int, block_bytes: int, settings: Settings) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        settings = replace(settings, store=uri, block_bytes=block_bytes)
        members = (Member(Role.SERVER, 0, 1, "s", "a:1"),)
        name = f"bench-{os.getpid()}"
        self.membership = Membership("bench", "bench", name, 1, 1, 1, members, settings)
        self._store = open_store(uri)
        self._background = Background(self._calls.put)
        self.plane = DataPlane(self.membership, 0, 1)
        rows = megabytes * 1_000_000 // (4 * COLS)
        spec = TableSpec(
            0, "t", (rows, COLS), max(1, block_bytes // (4 * COLS)), rule_to_json(SGD())
        )
        self.plane.add_table(spec)
        self.plane.note_given(np.arange(len(self.plane.slots.ids)))
        self.plane.slots.state[:] = SlotState.READY
        self.data = self.plane.shard.tables[0].data
        rng = np.random.default_rng(0)
        self.data[:] = rng.random(self.data.shape, np.float32)
        # Some rows move far, most a little.
        self._gradient = rng.random(self.data.shape, np.float32)
        self._gradient *= rng.random((rows, 1), np.float32) ** 8
        self.saver = Saver(self.plane, self._store, self._background, self.membership, 0)

    def begin(self) -> None:
        """Save everything for the first time."""
        ended: list[str | None] = []
        self.saver.save_all("running", "", lambda _written, error: ended.append(error))
        self.run_until(lambda: bool(ended))
        if ended[0] is not None:
            raise BenchError(f"the first save failed: {ended[0]}")
        self.settle()

    def push(self) -> None:
        """Apply one push of the whole shard."""
        slots = self.plane.slots
        k = np.arange(SLOTS)
        self.plane.shard.update(0, 0, SLOTS, self._gradient, 1e-3)
        batch = int(slots.last[0, 0]) + 1
        slots.advance(k, 0, batch, batch)
        self.plane.steps.refresh()

    def turn(self, think: float) -> None:
        """What the loop does after a push until the next one comes, `think` seconds later."""
        self.saver.tick()
        until = time.monotonic() + think
        if not think:
            self._call(0.0)
            self.saver.work(idle=False)
        while (left := until - time.monotonic()) > 0:
            if self.saver.pending:
                self._call(0.0)
                self.saver.work(idle=True)
            else:
                self._call(left)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let the loop turn without pushes."""
        end = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > end:
                raise BenchError(f"not done within {DEADLINE:.0f} s; {self.saver.error}")
            self.saver.work(idle=True)
            self._call(0.0 if self.saver.pending else 0.05)

    def settle(self) -> None:
        """Let saves that were begun end."""
        ended: list[object] = []
        self.run_until(lambda: not self.saver.pending)
        self._background.submit(lambda: None, lambda _result, _error: ended.append(1))
        self.run_until(lambda: bool(ended))

    def places(self) -> Places:
        """Where the newest save's blocks lie. BenchError: there is none."""
        found = newest_manifest(self._store, self.membership.prefix, 0, 9)
        if found is None:
            raise BenchError("no manifest can be read")
        return found[1].blocks

    def restored(self) -> float:
        """Restore everything to a new shard; returns the seconds it took."""
        ended: list[object] = []
        membership = replace(self.membership, initialised=True)
        plane = DataPlane(membership, 0, 9)
        me = Identity(membership.namespace, membership.name, Role.SERVER, 0, 9, "")
        restorer = Restorer(
            plane, self._store, self._background, membership.prefix, me,
            lambda _member, _slots, _number: False, lambda: ended.append(1),
        )  # fmt: skip
        source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(range(SLOTS)))
        started = time.monotonic()
        restorer.begin(Restore(1, 2, me.id, (source,)))
        self.run_until(lambda: bool(ended))
        return time.monotonic() - started

    def close(self) -> None:
        """End the store's thread, and remove what was saved."""
        self._background.close(DEADLINE)
        folder = shard_folder(self.membership.prefix, 0, 1)
        with contextlib.suppress(StoreError):  # what went wrong with it was said before
            for name in self._store.list(folder):
                self._store.delete(f"{folder}/{name}")

    def _call(self, wait: float) -> None:
        try:
            call = self._calls.get(timeout=wait) if wait else self._calls.get_nowait()
        except queue.Empty:
            return
        call()
