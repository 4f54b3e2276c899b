"""Tests of what a server saves and keeps, with a store's thread that works when it is told to."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import Manifest, newest_manifest
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import DirectoryStore
from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.errors import StoreError, StoreFullError
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.background import Background, Done, Job
from daruma_trainer.server.cuts import FIRST, Cuts
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.saving import Saver
from daruma_trainer.server.slots import SlotState

ROWS, COLS = 40, 4


class ByHand(Background):
    """Jobs wait until the test runs them, in order, as on the store's thread."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Job, Done]] = deque()

    def submit(self, job: Job, done: Done) -> None:
        self.jobs.append((job, done))

    def post(self, call: Callable[[], None]) -> None:
        call()

    def run(self) -> None:
        while self.jobs:
            job, done = self.jobs.popleft()
            try:
                result = job()
            except StoreError as error:
                done(None, error)
            else:
                done(result, None)


class Full(DirectoryStore):
    """A store without space left while `full` is set."""

    full = False

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        if self.full:
            raise StoreFullError("no space left")
        super().write(name, data)


class World:
    """Server 0 of `servers`, one table, no sockets."""

    def __init__(self, folder: Path, servers: int = 1, **settings: Any) -> None:
        chosen = Settings(**{"every": 4, "fraction": 0.25, "cuts": True} | settings)
        members = tuple(Member(Role.SERVER, i, 1, f"s{i}", f"a:{i}") for i in range(servers))
        self.membership = Membership("uid", "ns", "job", 1, servers, 1, members, chosen)
        self.store = Full(folder)
        self.background = ByHand()
        self.plane = DataPlane(self.membership, 0, 1)
        spec = TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(SGD(momentum=0.9)))
        assert self.plane.add_table(spec) is None
        self.plane.slots.state[:] = SlotState.READY
        self.saver = Saver(self.plane, self.store, self.background, self.membership, 0)
        self.told: list[dict[str, Any]] = []
        self.cuts = Cuts(
            self.plane, self.saver, self.store, self.background, 0,
            lambda _i, m: self.told.append(m), self.membership,
        )  # fmt: skip

    def begin(self) -> None:
        """Save everything for the first time."""
        self.saver.save_all("running", "", _must_not_fail)

    def train(self, batches: int, change: float = 1.0) -> None:
        """Apply pushes: every row moves."""
        for _ in range(batches):
            k = np.arange(len(self.plane.slots.ids))
            batch = int(self.plane.slots.last.max()) + 1
            self.plane.shard.tables[0].data += np.float32(change)
            self.plane.shard.tables[0].changed[:] = True
            self.plane.slots.advance(k, 0, batch, batch)
            self.plane.refresh_step()

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


def _must_not_fail(_written: object, error: str | None) -> None:
    assert error is None


def step_until(world: World, condition: Callable[[], bool], limit: int = 200) -> None:
    """Train and save until the condition holds."""
    for _ in range(limit):
        world.train(1)
        world.save()
        if condition():
            return
    raise AssertionError(f"not within {limit} steps")


def test_training_may_outrun_the_first_save(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.train(4)
    world.save()
    world.newest()
    step_until(world, lambda: world.newest().step > 8)


def test_every_block_can_be_read_after_every_save_and_old_files_go(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    for _ in range(100):
        world.train(1)
        world.save()
        world.newest()
    files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(n.startswith("manifest-") for n in files) == world.membership.settings.keep
    # Each save is of a quarter; old segments are rewritten before they are twice what lives.
    assert sum(n.startswith("segment-") for n in files) < 12
    live = sum(p.length for p in world.newest().blocks.values())
    held = sum(p.stat().st_size for p in tmp_path.rglob("segment-*"))
    assert held < 4 * live


def test_a_slot_without_blocks_loses_nothing(tmp_path: Path) -> None:
    """What was applied to it is all that it is, so it is as new as the save."""
    world = World(tmp_path)
    world.begin()
    world.background.run()
    step_until(world, lambda: world.saver.newest is not None and world.saver.newest.step >= 20)
    manifest = world.newest()
    layout = world.plane.shard.tables[0].layout
    empty = np.diff(layout.slot_blocks) == 0
    assert empty.any()
    assert (manifest.slots.last[empty] == manifest.step).all()
    assert (manifest.slots.last[~empty] <= manifest.step).all()


def test_a_failed_save_does_not_claim_what_it_did_not_write(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(4)
    world.store.full = True
    world.save()
    assert world.saver.error is not None
    world.store.full = False
    world.train(4)
    world.save()
    assert world.saver.error is None
    manifest = world.newest()
    blocks, _ = read_blocks(world.store, manifest, manifest.blocks)
    layout = world.plane.shard.tables[0].layout
    owner = {
        int(b): int(np.searchsorted(layout.slot_blocks, i, side="right")) - 1
        for i, b in enumerate(layout.blocks)
    }
    newest: dict[int, float] = {}
    for b in blocks:
        newest[owner[b.block]] = max(newest.get(owner[b.block], 0.0), float(b.data[0]))
    # Each push adds 1, so a slot's newest block tells which push was its last.
    assert {s: int(manifest.slots.last[s, 0]) for s in newest} == newest
    assert {0.0, 8.0} == set(newest.values())


def test_after_a_rollback_nothing_of_the_abandoned_lineage_is_the_newest(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    step_until(world, lambda: world.newest().step >= 20)
    world.plane.shard.tables[0].data[:] = 4.0
    world.plane.shard.tables[0].changed[:] = True
    world.plane.slots.last[:] = 4
    world.plane.step = 4
    ended: list[bool] = []
    world.saver.rolled_back(4, lambda: ended.append(True))
    assert not ended, "not before it is durable"
    world.background.run()
    assert ended
    manifest = world.newest()
    assert manifest.step == 4
    assert int(manifest.slots.last.max()) == 4
    blocks, _ = read_blocks(world.store, manifest, manifest.blocks)
    assert {float(b.data[0]) for b in blocks} == {4.0}
    step_until(world, lambda: world.newest().step > 4, limit=4)


def test_a_rollback_goes_on_when_the_store_is_full(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.full = True
    ended: list[bool] = []
    world.saver.rolled_back(0, lambda: ended.append(True))
    world.background.run()
    assert ended
    assert world.saver.error == "no space left"


@pytest.mark.parametrize("servers", [1, 2])
def test_files_of_old_cuts_go(tmp_path: Path, servers: int) -> None:
    world = World(tmp_path, servers, running=False)
    world.cuts.take(FIRST)
    for step in range(1, 6):
        world.train(4)
        number = f"00000001-{4 * step:010d}"
        world.cuts.take(number)
        world.background.run()
        if servers == 2:
            other = {"index": 1, "manifest": "m", "size": 1, "step": 4 * step, "batches": [4]}
            world.cuts.receive({"op": "part", "number": number, **other})
        world.background.run()
    assert world.cuts.newest is not None
    assert world.cuts.newest.step == 20
    cuts = sorted(p.name for p in tmp_path.rglob("cuts/*.json"))
    assert cuts == ["00000001-0000000016.json", "00000001-0000000020.json"]
    own = sorted(p.name for p in tmp_path.rglob("cut-*.seg"))
    assert own == ["cut-00000001-0000000016.seg", "cut-00000001-0000000020.seg"]


def test_one_that_follows_keeps_the_newest_whatever_it_hears(tmp_path: Path) -> None:
    world = World(tmp_path, running=False)
    for step in (4, 8, 12):
        world.cuts.take(f"00000001-{step:010d}")
        world.background.run()
    for told in (12, 8, 4, 12):  # a former coordinator's report is old
        world.cuts.follow(f"ns/job/uid/cuts/00000001-{told:010d}.json")
        world.background.run()
    own = sorted(p.name for p in tmp_path.rglob("cut-*.seg"))
    assert own == ["cut-00000001-0000000008.seg", "cut-00000001-0000000012.seg"]
