"""Tests of what a server saves and keeps, with a store's thread that works when it is told to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import read_manifest, shard_folder
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.server import saving
from daruma_trainer.server.cuts import FIRST
from saving_world import ROWS, Full, World


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
    store = Full(tmp_path)
    world = World(tmp_path, store=store)
    world.begin()
    world.background.run()
    world.train(4)
    store.full = True
    world.save()
    assert world.saver.error is not None
    store.full = False
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
    world.plane.steps.now = 4
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
    store = Full(tmp_path)
    world = World(tmp_path, store=store)
    store.full = True
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
            world.cuts.receive({"op": "part", "number": number, **other}, 0)
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


def test_a_partial_save_takes_the_blocks_that_moved_most_and_as_many_whatever_the_selection(
    tmp_path: Path,
) -> None:
    sizes = set()
    for selection in ("Priority", "RoundRobin", "Random"):
        world = World(tmp_path / selection, selection=selection)
        world.begin()
        world.background.run()
        world.train(1, 0.5)
        world.change([3, 11, 12, 30], 7.0)
        world.save()
        assert world.saver.newest is not None
        sizes.add(world.saver.newest.bytes)
        if selection == "Priority":
            blocks, _ = read_blocks(world.store, world.newest(), world.newest().blocks)
            moved = {b.block for b in blocks if b.data[0] > 5}
            assert moved == set(world.plane.shard.tables[0].layout.blocks[[3, 11, 12, 30]])
    assert len(sizes) == 1, "equal bytes, so that selections can be compared"


def test_the_distance_of_the_rest_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(1, 0.5)
    world.save()
    assert world.saver.newest is not None
    # A quarter of 40 rows of 4 was saved; the rest is half away.
    assert world.saver.newest.distance == pytest.approx((30 * 4 * 0.25) ** 0.5)


def test_requests_go_first_until_a_pass_was_held_up_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(1)
    now = [100.0]
    monkeypatch.setattr("daruma_trainer.server.saving.time.monotonic", lambda: now[0])
    world.saver.tick()
    world.saver.work(idle=False)
    assert world.saver.pending, "there was something to serve"
    now[0] += 1.0
    world.saver.work(idle=False)
    assert world.saver.pending, "requests come between the choice and the copy"
    world.saver.work(idle=False)
    assert not world.saver.pending, "it would never be saved"


@pytest.mark.parametrize("given", [True, False])
def test_what_comes_between_the_choice_and_the_copy_is_in_the_copy(
    tmp_path: Path, given: bool
) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(1)
    world.saver.tick()
    world.saver.work(idle=True)
    late = replace(world.plane.shard.specs[0], id=1, name="late")
    assert world.plane.add_table(late) is None
    world.train(1)
    if given:
        world.plane.note_given(np.arange(len(world.plane.slots.ids)))
    while world.saver.pending:
        world.saver.work(idle=True)
    world.background.run()
    manifest = world.newest()
    if not given:
        assert len(manifest.tables) == 1, "zeros would come back as its first values"
        return
    assert [table.name for table in manifest.tables][1:] == ["late"]
    assert any(table == 1 for table, _ in manifest.blocks), "what was never saved goes first"
    blocks, _ = read_blocks(world.store, manifest, manifest.blocks)
    assert max(b.position for b in blocks) == world.plane.slots.position.max()


def test_a_pass_that_a_rollback_interrupts_forgets_no_change(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(1)
    world.saver.tick()
    world.plane.slots.state[0] = 1
    world.saver.work(idle=True)
    assert not world.saver.pending
    assert world.plane.shard.tables[0].changed.all()


def test_a_save_that_failed_is_made_up_for(tmp_path: Path) -> None:
    store = Full(tmp_path)
    world = World(tmp_path, store=store)
    world.begin()
    world.background.run()
    world.train(1, 0.0)
    world.change([5], 9.0)
    store.full = True
    world.save()
    store.full = False
    world.train(1, 0.0)
    world.save()
    blocks, _ = read_blocks(world.store, world.newest(), world.newest().blocks)
    assert max(float(b.data[0]) for b in blocks) == 9.0
    assert not list(tmp_path.rglob("*.partial"))


def test_who_was_not_saved_in_its_turn_is_the_next(tmp_path: Path) -> None:
    store = Full(tmp_path)
    world = World(tmp_path, store=store, selection="RoundRobin")
    world.begin()
    world.background.run()
    store.full = True
    world.train(1)
    world.save()
    store.full = False
    layout = world.plane.shard.tables[0].layout
    for turn in range(4):
        world.train(1)
        world.save()
        blocks, _ = read_blocks(world.store, world.newest(), world.newest().blocks)
        saved = {b.block for b in blocks if b.data[0] > 0}
        assert saved == set(layout.blocks[: 10 * (turn + 1)].tolist())


def test_a_first_save_that_failed_is_made_whole_before_the_predecessors_go(tmp_path: Path) -> None:
    old = World(tmp_path)
    old.begin()
    old.background.run()
    store = Full(tmp_path)
    world = World(tmp_path, store=store, incarnation=2)
    store.full = True
    failed: list[str | None] = []
    world.saver.save_all("running", "", lambda _written, error: failed.append(error))
    world.background.run()
    assert failed[0] is not None
    store.full = False
    world.train(4)
    world.save()
    folder = tmp_path / shard_folder(world.membership.prefix, 0, 2)
    newest = read_manifest(world.store, str(max(folder.glob("manifest-*")).relative_to(tmp_path)))
    assert len(newest.blocks) == ROWS, "all of it, though a quarter was due"


def test_cuts_that_come_faster_than_the_store_writes_are_left_out(tmp_path: Path) -> None:
    world = World(tmp_path, running=False)
    for _ in range(5):
        world.train(4)
        world.cuts.tick()
        world.train(4)
        world.cuts.tick()
    assert sum(1 for _ in world.background.jobs) == 1, "one copy of the shard at a time"
    world.background.run()
    assert world.cuts.newest is not None


def test_a_store_that_never_answers_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "STUCK_SECONDS", 0.0)
    world = World(tmp_path)
    world.begin()
    world.saver.tick()
    assert "does not answer" in (world.saver.error or "")
    world.background.run()
    assert world.saver.error is None
