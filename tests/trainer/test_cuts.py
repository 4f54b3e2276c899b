"""Tests of one server's part in cuts: what a rollback voids, and when the result is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import Cut, newest_cut
from daruma_trainer.contract import SLOTS, ContractError, Member, Role, Rollback
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.server import cuts
from daruma_trainer.server.background import attempt
from daruma_trainer.server.seats import Seats
from daruma_trainer.wire import Push, TablePush, mask_of
from saving_world import Full, World

PREFIX = "ns/job/uid"


def number(step: int, epoch: int = 1) -> str:
    return f"{epoch:08d}-{step:010d}"


def cut_at(world: World, steps: int) -> str:
    """Train, and take a cut of what is there then; returns its number."""
    world.train(steps)
    made = number(world.plane.step, world.cuts.membership.epoch)
    world.cuts.take(made)
    world.background.run()
    return made


def roll_back(world: World, to: str) -> None:
    """Go back to a cut in a new epoch and generation; its values are of no matter here."""
    name = f"{PREFIX}/cuts/{to}.json"
    epoch, generation = world.cuts.membership.epoch + 1, world.cuts.membership.rollback.generation
    world.cuts.membership = replace(
        world.cuts.membership, epoch=epoch, rollback=Rollback(generation + 1, name)
    )
    world.cuts.roll_back()
    cut = Cut.decode(world.store.read(name))
    world.plane.steps.now = cut.step
    world.plane.slots.last[:] = cut.step
    world.cuts.rolled_back(name, cut)


def cut_files(world: World) -> list[str]:
    return [name.removesuffix(".json") for name in world.store.list(f"{PREFIX}/cuts")]


def own_files(world: World) -> list[str]:
    names = world.store.list(f"{PREFIX}/shard-0000/00000001")
    return [n[4:-4] for n in names if n.startswith("cut-") and n.endswith(".seg")]


def test_what_comes_from_another_generation_begins_no_cut(tmp_path: Path) -> None:
    world = World(tmp_path, 2, running=False)
    world.cuts.membership = replace(world.cuts.membership, rollback=Rollback(1, "c"))
    begin = {"op": "begin", "number": number(4), "batches": [7]}
    world.cuts.receive(begin, 0)
    assert world.plane.hold is None, "it was sent before the rollback"
    world.cuts.receive(begin, 2)
    assert world.plane.hold is None, "it was sent after the next one"
    world.cuts.roll_back()
    world.cuts.receive(begin, 1)
    assert world.plane.hold is None, "nothing is loaded yet"
    cut = Cut(number(4), 4, 2, ("m0", "m1"), 10, (4,))
    world.cuts.rolled_back(f"{PREFIX}/cuts/{number(4)}.json", cut)
    world.cuts.receive(begin, 1)
    assert world.plane.hold == (7,)


def edited(world: World, **changes: Any) -> None:
    """The job's owner edits its checkpoints; members hear of it in a new epoch."""
    before = world.cuts.membership
    settings = replace(before.settings, **changes)
    new = replace(before, epoch=before.epoch + 1, settings=settings)
    world.saver.follow(new.settings)
    world.cuts.follow_membership(new)


@pytest.mark.parametrize(("every", "steps"), [(100, 200), (5, 25)])
def test_cuts_and_saves_go_on_where_their_interval_is_edited(
    tmp_path: Path, every: int, steps: int
) -> None:
    world = World(tmp_path, fraction=1.0, every=10)
    world.begin()
    world.background.run()

    def train(steps: int) -> tuple[int, int]:
        """Returns the step of the newest cut and of the newest save."""
        for _ in range(steps):
            world.train(1)
            world.cuts.tick()
            world.save()
        assert world.cuts.newest is not None
        assert world.saver.newest is not None
        return world.cuts.newest.step, world.saver.newest.step

    cut, saved = train(500)
    assert (cut >= 490, saved) == (True, 500)
    edited(world, every=every)
    cut, saved = train(steps)
    assert (cut >= 500 + steps - every, saved) == (True, 500 + steps)


def test_fewer_saves_are_kept_where_that_is_edited(tmp_path: Path) -> None:
    world = World(tmp_path, every=4, keep=4, cuts=False)
    world.begin()
    world.background.run()
    folder = tmp_path / f"{PREFIX}/shard-0000/00000001"

    def save(times: int) -> int:
        for _ in range(times):
            world.train(4)
            world.save()
        return len(list(folder.glob("manifest-*")))

    assert save(8) == 4
    edited(world, keep=2)
    assert save(2) == 2


@pytest.mark.parametrize(
    "wrong", [{"index": 7}, {"index": -1}, {"batches": []}, {"batches": [1, 2]}, {"step": "x"}, {}]
)
def test_a_part_that_is_none_is_refused_and_spoils_no_cut(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    world = World(tmp_path, 2)
    whole = {"op": "part", "number": number(4), "index": 1, "manifest": "m", "size": 1, "step": 4}
    parts = (whole | {"batches": [4]} | wrong) if wrong else whole
    with pytest.raises(ContractError):
        world.cuts.receive(parts, 0)
    cut_at(world, 4)
    assert cut_files(world) == []
    world.cuts.receive(whole | {"batches": [4]}, 0)
    world.background.run()
    assert cut_files(world) == [number(4)]


@pytest.mark.parametrize("jobs", [0, 1], ids=["its part is written", "its file is written"])
def test_a_cut_that_a_rollback_overtakes_is_not_the_newest(tmp_path: Path, jobs: int) -> None:
    world = World(tmp_path, running=False)
    first = cut_at(world, 4)
    world.train(4)
    world.cuts.take(number(8))
    for _ in range(jobs):
        job, done = world.background.jobs.popleft()
        done(*attempt(job))
    roll_back(world, first)
    world.background.run()
    assert world.cuts.newest is not None
    assert world.cuts.newest.path == f"{PREFIX}/cuts/{first}.json"
    # The next one is taken, and nothing of the other counts.
    following = cut_at(world, 4)
    assert world.cuts.newest.path == f"{PREFIX}/cuts/{following}.json"
    assert cut_files(world) == [first, following]


def test_what_a_rollback_left_behind_displaces_no_cut_that_is_whole(tmp_path: Path) -> None:
    world = World(tmp_path, running=False)
    first, damaged = cut_at(world, 4), cut_at(world, 4)
    roll_back(world, first)
    # Not before a newer one is complete: it may be whole after all.
    assert cut_files(world) == [first, damaged]
    following = cut_at(world, 4)
    assert cut_files(world) == own_files(world) == [first, following]
    last = cut_at(world, 4)
    assert cut_files(world) == own_files(world) == [following, last]


def test_the_cut_before_the_newest_stays_until_a_newer_is_complete(tmp_path: Path) -> None:
    world = World(tmp_path, 2, running=False)
    numbers = []
    for step in (4, 8, 12):
        world.train(4)
        numbers.append(number(step))
        world.cuts.take(numbers[-1])
        world.background.run()
        if step == 12:
            assert cut_files(world) == numbers[:2], "a part of the third is still to come"
            assert own_files(world) == numbers
        part = {"index": 1, "manifest": "m", "size": 1, "step": step, "batches": [step]}
        world.cuts.receive({"op": "part", "number": numbers[-1], **part}, 0)
        world.background.run()
    assert cut_files(world) == own_files(world) == numbers[1:]


@pytest.mark.parametrize("servers", [1, 2], ids=["all exist", "none exists: a shard gives no part"])
def test_cuts_that_are_over_take_no_memory(tmp_path: Path, servers: int) -> None:
    world = World(tmp_path, servers, running=False)
    world.cuts.take(cuts.FIRST)
    for _ in range(40):
        cut_at(world, 4)
        assert len(world.cuts._taken) <= 2
        assert len(world.cuts._parts) <= cuts.MAX_OPEN
    world.cuts.take_final("f")
    cut_at(world, 4)
    world.train(4)
    before = world.saver.bytes_total
    for asked_for_again in (cuts.FIRST, "f", number(164)):
        world.cuts.take(asked_for_again)
    world.background.run()
    assert world.saver.bytes_total == before, "each is taken once"


def test_what_killed_coordinators_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    world = World(tmp_path, running=False)
    cut_at(world, 4)
    folder = tmp_path / PREFIX / "cuts"
    left, live = (folder / f"{number(step)}.json.77-1.partial" for step in (4, 12))
    left.touch()
    live.touch()
    cut_at(world, 4)
    assert (left.exists(), live.exists()) == (False, True)


def with_sum(folder: Path) -> World:
    """A restored server with a table of rule `add`, that has one worker."""
    world = World(folder, running=False)
    spec = TableSpec(1, "sum", (40, 4), 1, rule_to_json(Add()))
    assert world.plane.add_table(spec) is None
    world.plane.sums.inexact = True
    return world


def rebuild(world: World) -> None:
    part = TablePush(1, 1.0, np.full((40, 4), 3.0, np.float32))
    push = Push(0, 5, 5, 1, 0, mask_of(np.arange(SLOTS)), (part,))
    world.plane.sums.rebuild(push, np.arange(len(world.plane.slots.ids)))


def test_the_result_is_not_taken_before_sums_have_their_parts(tmp_path: Path) -> None:
    world = with_sum(tmp_path)
    world.cuts.take_final("f")
    world.cuts.tick()
    assert not world.background.jobs, "the worker may be able to make its part again"
    world.plane.sums.register(0, [1])
    world.cuts.tick()
    assert not world.background.jobs, "it is, and has not done so yet"
    rebuild(world)
    world.cuts.tick()
    world.background.run()
    assert world.cuts.final == f"{PREFIX}/cuts/f.json"
    assert (world.plane.shard.tables[1].data == 3.0).all()


def test_the_result_does_not_wait_for_parts_that_nobody_can_make(tmp_path: Path) -> None:
    world = with_sum(tmp_path)
    world.plane.sums.register(0, [])
    world.cuts.take_final("f")
    world.background.run()
    assert world.cuts.final is not None


def test_no_cut_is_taken_of_sums_that_lack_parts(tmp_path: Path) -> None:
    world = with_sum(tmp_path)
    world.cuts.receive({"op": "begin", "number": number(4), "batches": [0]}, 0)
    world.cuts.tick()
    assert not world.background.jobs
    world.plane.sums.register(0, [1])
    rebuild(world)
    world.cuts.tick()
    world.background.run()
    found = newest_cut(world.store, PREFIX)
    assert found is not None
    assert found[1].number == number(4)


def test_a_cut_does_not_wait_for_a_worker_that_was_lost(tmp_path: Path) -> None:
    world = World(tmp_path)
    plane = world.plane
    worker = Member(Role.WORKER, 0, 1, "w0", "a:1")
    plane.steps.seats = Seats(
        replace(world.membership, members=(*world.membership.members, worker))
    )
    world.train(4)
    world.cuts.receive({"op": "begin", "number": number(4), "batches": [7]}, 0)
    assert plane.hold == (7,)
    lost = replace(worker, incarnation=2, address=None)
    plane.follow(replace(world.membership, members=(*world.membership.members, lost)))
    world.cuts.tick()
    assert plane.hold is None, "or the others' pushes would wait for it"
    world.background.run()
    found = newest_cut(world.store, PREFIX)
    assert found is not None
    assert found[1].batches == (4,)


def test_a_result_that_could_not_be_saved_is_saved_again_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("daruma_trainer.server.cuts.time.monotonic", lambda: now[0])
    store = Full(tmp_path)
    store.full = True
    world = World(tmp_path, store=store, running=False, every=0)
    world.cuts.take_final("f")
    world.background.run()
    assert world.saver.error == "no space left"
    store.full = False
    world.cuts.tick()
    assert not world.background.jobs, "not as fast as it fails"
    now[0] += cuts.AGAIN_SECONDS
    world.cuts.tick()
    world.background.run()
    assert world.cuts.final == f"{PREFIX}/cuts/f.json"


def test_a_rollback_voids_the_result_that_was_to_be_saved(tmp_path: Path) -> None:
    world = World(tmp_path, running=False, every=0)
    world.train(4)
    world.cuts.take(number(4))
    world.background.run()
    world.plane.sums.inexact = True
    world.plane.add_table(TableSpec(1, "sum", (40, 4), 1, rule_to_json(Add())))
    world.cuts.take_final("f")
    world.plane.sums.rolled_back()
    roll_back(world, number(4))
    world.cuts.tick()
    world.background.run()
    assert world.cuts.final is None, "workers go on from the cut, and end again"
