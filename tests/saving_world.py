"""A server's shard without sockets, whose store's thread works when it is told to."""

import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.checkpoint.manifest import Manifest, newest_manifest
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import DirectoryStore, Store
from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.errors import StoreFullError
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.background import Background, ByHand
from daruma_trainer.server.cuts import Cuts
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.saving import Saver
from daruma_trainer.server.slots import SlotState

ROWS, COLS = 40, 4


class Full(DirectoryStore):
    """A store without space left while `full` is set."""

    full = False

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        if self.full:
            raise StoreFullError("no space left")
        super().write(name, data)


class World:
    """One of `servers`, one table, no sockets."""

    def __init__(
        self,
        folder: Path,
        servers: int = 1,
        thread: Background | None = None,
        store: Store | None = None,
        incarnation: int = 1,
        index: int = 0,
        **settings: Any,
    ) -> None:
        chosen = Settings(**{"every": 4, "fraction": 0.25, "cuts": True} | settings)
        members = tuple(Member(Role.SERVER, i, 1, f"s{i}", f"a:{i}") for i in range(servers))
        self.membership = Membership("uid", "ns", "job", 1, servers, 1, members, chosen)
        self.folder = folder
        self.store = store or DirectoryStore(folder)
        self.background = ByHand()
        background = thread or self.background
        self.plane = DataPlane(self.membership, index, incarnation)
        spec = TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(SGD(momentum=0.9)))
        assert self.plane.add_table(spec) is None
        self.plane.note_given(np.arange(len(self.plane.slots.ids)))
        self.plane.slots.state[:] = SlotState.READY
        self.saver = Saver(self.plane, self.store, background, self.membership, index)
        self.told: list[dict[str, Any]] = []
        self.cuts = Cuts(
            self.plane, self.saver, self.store, background, index,
            lambda _i, m: self.told.append(m), self.membership,
        )  # fmt: skip

    def begin(self) -> None:
        """Save everything for the first time."""
        self.saver.save_all("running", "", must_not_fail)

    def train(self, batches: int, change: float = 1.0) -> None:
        """Apply pushes: every row moves."""
        for _ in range(batches):
            k = np.arange(len(self.plane.slots.ids))
            batch = int(self.plane.slots.last.max()) + 1
            self.change(slice(None), change)
            self.plane.slots.advance(k, 0, batch, batch)
            self.plane.steps.refresh()

    def change(self, rows: Any, by: float = 1.0) -> None:
        """Move rows (in wire order), as a push does; blocks are rows here."""
        self.plane.shard.tables[0].data[rows] += np.float32(by)
        self.plane.shard.tables[0].changed[rows] = True

    def save(self) -> None:
        """Begin the partial save that is due, measure, copy and write it."""
        self.saver.tick()
        while self.saver.pending:
            self.saver.work(idle=True)
        self.background.run()

    def newest(self) -> Manifest:
        """Return the newest running manifest, every block of it read and whole."""
        found = newest_manifest(self.store, self.membership.prefix, 0, 9)
        assert found is not None
        blocks, damaged = read_blocks(self.store, found[1], found[1].blocks)
        assert not damaged
        assert {b.block for b in blocks} == set(self.plane.shard.tables[0].layout.blocks.tolist())
        return found[1]


def must_not_fail(_written: object, error: str | None) -> None:
    assert error is None


def save_for_ever(folder: Path) -> None:
    """Train, save and compact, and say the number of each manifest once it is durable."""
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    world = World(folder, thread=Background(calls.put))
    world.saver.save_all("running", "", must_not_fail)
    told = 0
    rng = np.random.default_rng(0)
    while True:
        while told == world.saver.saves:
            calls.get(timeout=60)()
        told = world.saver.saves
        assert world.saver.newest is not None
        moved = "moved" if world.saver.moved_total else "not"
        sys.stdout.write(f"{world.saver.newest.path[-15:-5]} {moved}\n")
        sys.stdout.flush()
        world.train(1, 0.0)
        world.change(rng.integers(0, 40, 5), 1.0)
        world.saver.tick()
        while world.saver.pending:
            world.saver.work(idle=True)
