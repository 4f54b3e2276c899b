"""Tests of what a new server reads back: what was lost alone, each block from where it is whole."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import newest_manifest
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import DirectoryStore
from daruma_trainer.contract import Restore, Role, Source, SourceKind, slots_to_hex
from daruma_trainer.errors import StoreAwayError
from daruma_trainer.identity import Identity
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server import restoring
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.cuts import FIRST
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import State
from saving_world import World

ME = Identity("n", "j", Role.SERVER, 0, 9, "")


class Counting(DirectoryStore):
    """Counts the bytes that are read."""

    manifests = 0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._sizes: list[int] = []  # appended by several threads at once

    @property
    def segments(self) -> int:
        return sum(self._sizes)

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        data = super().read(name, offset, length)
        self.manifests += len(data)
        return data

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> Sequence[bytes | memoryview]:
        data = super().read_ranges(name, ranges, into)
        self._sizes.append(sum(len(d) for d in data))
        return data


class Newcomer:
    """Incarnation 9 of a world's server 0, which has lost some of its slots (or all)."""

    def __init__(self, world: World, lost: Sequence[int] | None = None) -> None:
        self.store = Counting(world.folder)
        self.background = ByHand()
        membership = replace(world.membership, initialised=True)
        self.plane = DataPlane(membership, 0, 9)
        self.back = False
        self.lost = self.plane.slots.ids.tolist() if lost is None else list(lost)
        self.plane.slots.state[:] = SlotState.READY
        self.plane.slots.state[self.plane.slots.index_of(np.array(self.lost))] = SlotState.RESTORING
        self.restorer = Restorer(
            self.plane, self.store, self.background, membership.prefix, ME,
            lambda _member, _slots, _number: False, self._complete,
        )  # fmt: skip

    def _complete(self) -> None:
        self.back = True

    def restore(self) -> "Newcomer":
        source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(self.lost))
        self.restorer.begin(Restore(1, 2, ME.id, (source,)))
        self.background.run()
        return self

    @property
    def damaged(self) -> tuple[str, ...]:
        assert self.restorer.report is not None
        return self.restorer.report.damaged

    @property
    def missing(self) -> int:
        assert self.restorer.report is not None
        return self.restorer.report.missing

    def value(self, block: int) -> float:
        """What the first value of a block is (blocks are rows)."""
        table = self.plane.shard.tables[0]
        return float(table.data[table.layout.index_of(np.array([block]))[0], 0])


def saved_world(folder: Path, steps: int = 12, **settings: Any) -> World:
    """A world after some partial saves; each push adds 1 to every value."""
    world = World(folder, **settings)
    world.begin()
    world.background.run()
    for _ in range(steps):
        world.train(1)
        world.save()
    return world


def place_of(world: World, block: int) -> tuple[Path, int, int]:
    """Where the newest record of a block lies."""
    found = newest_manifest(world.store, world.membership.prefix, 0, 9)
    assert found is not None
    place = found[1].blocks[0, block]
    return world.folder / place.segment, place.offset, place.length


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x41
    path.write_bytes(data)


def test_a_new_plan_overtakes_a_read_that_is_under_way(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    new = Newcomer(world)
    source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(new.lost))
    for epoch in (2, 3):
        new.restorer.begin(Restore(1, epoch, ME.id, (source,)))
    new.background.run()
    assert new.back
    np.testing.assert_array_equal(new.plane.slots.last, world.newest().slots.last)


@pytest.mark.parametrize("chunk", [8 << 20, 256])
def test_all_comes_back_as_it_was_saved(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes at once, or in many parts that lie in the same memory one after another."""
    monkeypatch.setattr("daruma_trainer.checkpoint.reading.CHUNK", chunk)
    world = saved_world(tmp_path)
    manifest = world.newest()
    new = Newcomer(world).restore()
    assert new.back
    assert (new.missing, new.damaged) == (0, ())
    np.testing.assert_array_equal(new.plane.slots.last, manifest.slots.last)
    blocks, _ = read_blocks(world.store, manifest, manifest.blocks)
    assert len({float(b.data[0]) for b in blocks}) > 2, "of several ages"
    table = new.plane.shard.tables[0]
    for b in blocks:
        i = table.layout.index_of(np.array([b.block]))[0]
        np.testing.assert_array_equal(table.data[i], b.data)
        np.testing.assert_array_equal(table.state[0][i], b.state[0])
        assert table.steps[i] == b.steps


def test_only_the_blocks_of_the_lost_slots_are_read(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    layout = world.plane.shard.tables[0].layout
    ids = world.plane.slots.ids
    lost = [int(s) for s in ids if s % 4 == 1]
    mine = np.isin(np.repeat(ids, np.diff(layout.slot_blocks)), lost)
    bytes_of = sum(world.newest().blocks[0, int(b)].length for b in layout.blocks[mine])
    assert 0 < mine.sum() < len(mine) / 2
    new = Newcomer(world, lost).restore()
    assert new.back
    assert bytes_of <= new.store.segments <= 1.1 * bytes_of


def test_a_damaged_block_alone_comes_from_the_save_before(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    good = Newcomer(world).restore()
    values = {b: good.value(b) for b in range(40)}
    newest = max(values.values())
    block = next(b for b, v in values.items() if v == newest)
    path, offset, length = place_of(world, block)
    for at in range(offset, offset + length, 5):
        flip(path, at)
        new = Newcomer(world).restore()
        assert new.back, at
        assert new.missing == 0
        assert {b for b in values if new.value(b) != values[b]} == {block}, at
        assert new.value(block) < newest
        assert len(new.damaged) == 1
        assert f"block {block} of table 0" in new.damaged[0]
        assert "taken from" in new.damaged[0]
        flip(path, at)


def test_a_block_that_no_running_checkpoint_has_comes_from_the_full_cut(tmp_path: Path) -> None:
    world = saved_world(tmp_path, 0)
    world.cuts.take(FIRST)
    world.background.run()
    for _ in range(20):
        world.train(1)
        world.save()
    # Both manifests that are kept name this record.
    values = {b: Newcomer(world).restore().value(b) for b in range(40)}
    block = min(values, key=lambda b: values[b])
    path, offset, _ = place_of(world, block)
    flip(path, offset + 70)
    new = Newcomer(world).restore()
    assert new.back
    assert new.value(block) == 0.0, "the cut was taken at the beginning"
    assert "cuts/" in new.damaged[0]


def test_a_block_that_is_nowhere_makes_its_slot_missing(tmp_path: Path) -> None:
    world = saved_world(tmp_path, 0)
    path, offset, _ = place_of(world, 7)
    flip(path, offset)
    new = Newcomer(world).restore()
    assert not new.back
    assert new.missing == 1
    assert "no other save has it" in new.damaged[0]


def test_a_damaged_manifest_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    newest = max(p for p in tmp_path.rglob("manifest-*"))
    for at in range(0, newest.stat().st_size, 3001):
        flip(newest, at)
        new = Newcomer(world).restore()
        assert new.back, at
        assert newest.name in new.damaged[0]
        flip(newest, at)


@pytest.mark.parametrize("kind", ["manifest", "segment"])
def test_truncation_anywhere_restores_something_complete_or_says_so(
    tmp_path: Path, kind: str
) -> None:
    world = saved_world(tmp_path, 3)
    newest = max(tmp_path.rglob(f"{kind}-*"))
    good = newest.read_bytes()
    # Most of a manifest is slots; that every cut is noticed is tested beside its decoder.
    for size in range(0, len(good), 3001 if kind == "manifest" else 5):
        newest.write_bytes(good[:size])
        new = Newcomer(world).restore()
        assert new.back or new.missing, size
        assert new.damaged, size
        if kind == "manifest":
            assert new.back, "the one before is whole"
    newest.unlink()
    new = Newcomer(world).restore()
    assert new.back or (new.missing and new.damaged)


def test_without_any_manifest_all_is_missing(tmp_path: Path) -> None:
    world = World(tmp_path)
    new = Newcomer(world).restore()
    assert not new.back
    assert new.missing == len(new.lost)
    assert "no readable manifest" in new.damaged[0]


class Away(Counting):
    """A store that cannot be asked for what is named so."""

    away = ""

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        if self.away and self.away in name:
            raise StoreAwayError("503")
        return super().read(name, offset, length)

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> Sequence[bytes | memoryview]:
        if self.away and self.away in name:
            raise StoreAwayError("503")
        return super().read_ranges(name, ranges, into)


@pytest.mark.parametrize("away", ["manifest-", "segment-"])
def test_a_store_that_is_away_is_asked_again_and_nothing_is_taken_for_damaged(
    tmp_path: Path, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("daruma_trainer.server.restoring.time.monotonic", lambda: now[0])
    world = saved_world(tmp_path)
    new = Newcomer(world)
    store = new.restorer.store = Away(tmp_path)
    store.away = away
    new.restore()
    assert (new.back, new.missing, new.damaged) == (False, 0, ())
    assert new.restorer.waiting == "503"
    store.away = ""
    new.restorer.tick()
    assert not new.background.jobs, "not at once"
    now[0] += restoring.AGAIN_SECONDS
    new.restorer.tick()
    new.background.run()
    assert (new.back, new.missing, new.damaged) == (True, 0, ())
    assert new.restorer.waiting is None


def test_a_newer_plan_does_not_wait_for_what_a_former_one_waited_for(tmp_path: Path) -> None:
    new = Newcomer(saved_world(tmp_path))
    store = new.restorer.store = Away(tmp_path)
    store.away = "manifest-"
    new.restore()
    assert new.restorer.waiting is not None
    new.restorer.begin(Restore(1, 3, ME.id, ()))
    assert new.restorer.waiting is None
    assert new.missing == len(new.lost)
    assert new.restorer.report is not None
    assert new.restorer.report.epoch == 3, "whose finding that is"


def test_what_a_former_plan_still_reads_is_not_taken(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    new = Newcomer(world)
    source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(new.lost))
    new.restorer.begin(Restore(1, 2, ME.id, (source,)))
    new.restorer.begin(Restore(1, 3, ME.id, ()))
    new.background.run()
    assert new.missing == len(new.lost)
    assert not new.plane.shard.tables


def peer_state(world: World, ids: np.ndarray[Any, Any]) -> State:
    k = world.plane.slots.index_of(ids)
    return world.plane.state(k, 1)


def test_a_copy_comes_in_as_many_messages_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "split_slots", lambda layout: np.array_split(layout.slots, 3))
    world = saved_world(tmp_path)
    new = Newcomer(world)
    assert new.plane.add_table(world.plane.shard.specs[0]) is None
    asked: list[np.ndarray[Any, Any]] = []

    def fetch(_member: str, ids: np.ndarray[Any, Any], _number: int) -> bool:
        asked.append(ids)
        return True

    new.restorer.fetch = fetch
    source = Source(SourceKind.PEER, slots_to_hex(new.lost), "worker-0-1")
    new.restorer.begin(Restore(1, 2, ME.id, (source,)))
    assert sum(len(ids) for ids in asked) == len(new.lost)
    for ids in (*asked[:2], asked[0], asked[2]):  # one of them twice
        assert not new.back
        new.restorer.on_copy("worker-0-1", 0, peer_state(world, ids))
    assert new.back
    assert (new.plane.shard.tables[0].data == world.plane.shard.tables[0].data).all()
    report = new.restorer.report
    assert report is not None
    assert report.sources == {"peer": len(new.lost)}


def from_peer(new: Newcomer, world: World, *, stored: bool) -> Mapping[str, int]:
    """Restore all from a peer, moments from the store where there is one; says whence they came."""
    assert new.plane.add_table(world.plane.shard.specs[0]) is None
    new.restorer.fetch = lambda _member, _ids, _number: True
    sources = [Source(SourceKind.PEER, slots_to_hex(new.lost), "worker-0-1")]
    if stored:
        sources.append(Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(new.lost)))
    new.restorer.begin(Restore(1, 2, ME.id, tuple(sources)))
    new.restorer.on_copy("worker-0-1", 0, peer_state(world, np.array(new.lost)))
    new.background.run()
    assert new.back
    report = new.restorer.report
    assert report is not None
    assert report.sources == {"peer": len(new.lost)}
    return report.moments


def test_a_promoted_replica_offers_what_came_meanwhile_as_what_it_is(tmp_path: Path) -> None:
    """To the next plan, which may find nobody else who has it."""
    world = saved_world(tmp_path)
    world.plane.slots.lineage[:] = 5
    new = Newcomer(world)
    assert new.plane.add_table(world.plane.shard.specs[0]) is None
    new.plane.slots.lineage[:], new.plane.slots.position[:] = 1, 100
    new.restorer.promoted(new.plane.slots.index_of(np.array(new.lost)), 1, served=False)
    new.restorer.fetch = lambda _member, _ids, _number: True
    kinds = (SourceKind.PEER, SourceKind.RUNNING_CHECKPOINT)
    sources = tuple(Source(kind, slots_to_hex(new.lost), "worker-0-1") for kind in kinds)
    new.restorer.begin(Restore(1, 2, ME.id, sources))
    new.restorer.on_copy("worker-0-1", 0, peer_state(world, np.array(new.lost)))
    assert not new.back, "the moments are on their way"
    found = {(part.lineage, part.position) for part in new.restorer.offered}
    assert found == set(zip([5] * 1024, world.plane.slots.position.tolist(), strict=False))


def test_the_report_says_where_moments_came_from(tmp_path: Path) -> None:
    world = saved_world(tmp_path / "a")
    slots = len(world.plane.slots.ids)
    assert from_peer(Newcomer(world), world, stored=False) == {"reset": slots}
    assert from_peer(Newcomer(world), world, stored=True) == {"runningCheckpoint": slots}
    new = Newcomer(world).restore()
    assert new.restorer.report is not None
    assert new.restorer.report.moments == {"runningCheckpoint": slots}
    # A block that cannot be read in any save: its slot's moments begin again.
    first = saved_world(tmp_path / "b", 0)
    path, offset, _ = place_of(first, 7)
    flip(path, offset)
    found = from_peer(Newcomer(first), first, stored=True)
    assert found == {"runningCheckpoint": slots - 1, "reset": 1}


def test_nothing_is_said_of_moments_where_there_are_none(tmp_path: Path) -> None:
    world = World(tmp_path)
    plain = replace(world.plane.shard.specs[0], rule=rule_to_json(SGD()))
    other = DataPlane(world.membership, 0, 1)
    assert other.add_table(plain) is None
    other.slots.state[:] = SlotState.READY
    world.plane = other
    assert from_peer(Newcomer(world), world, stored=True) == {}


def test_after_a_rollback_nothing_of_a_restore_is_taken(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    new = Newcomer(world)
    source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(new.lost))
    new.restorer.begin(Restore(1, 2, ME.id, (source,)))
    new.restorer.drop()
    new.background.run()
    assert not new.back
    assert new.restorer.report is None
    assert not new.plane.shard.tables


def test_a_table_made_during_a_restore_is_no_obstacle(tmp_path: Path) -> None:
    world = saved_world(tmp_path)
    new = Newcomer(world)
    source = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(new.lost))
    new.restorer.begin(Restore(1, 2, ME.id, (source,)))
    assert new.plane.add_table(world.plane.shard.specs[0]) is None
    late = replace(world.plane.shard.specs[0], id=1, name="late")
    assert new.plane.add_table(late) is None
    new.background.run()
    assert new.back
    new.plane.restored(np.arange(len(new.plane.slots.ids)))
    assert [new.plane.beginning.wants_values(table) for table in (0, 1)] == [False, True]
    assert new.plane.complete_tables == 1, "of the other there is nothing to save"
