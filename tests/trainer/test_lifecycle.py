"""Tests of a shard's life: rollbacks to cuts that are damaged, or whose store is away."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.checkpoint.store import DirectoryStore, Store
from daruma_trainer.contract import (
    Member,
    Membership,
    Restore,
    Role,
    Rollback,
    Source,
    SourceKind,
    slots_to_hex,
)
from daruma_trainer.errors import StoreAwayError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server import lifecycle
from daruma_trainer.server.lifecycle import Lifecycle
from daruma_trainer.wire import Kind
from saving_world import World

SECONDS = 30.0
PREFIX = "ns/job/uid"
FIRST, SECOND, THIRD = (f"{PREFIX}/cuts/00000001-{step:010d}.json" for step in (4, 8, 12))
SHARD = f"{PREFIX}/shard-0000/00000001"


class Around:
    """The loop, run by hand."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.stopped: int | None = None

    def post(self, call: Callable[[], None]) -> None:
        self.calls.put(call)

    def stop(self, code: int) -> None:
        self.stopped = code

    def publish(self) -> None:
        pass

    def fetch(self, member: str, ids: Ints, number: int) -> bool:
        return False

    def tell_workers(self, kind: Kind, message: dict[str, Any]) -> None:
        pass

    def tell_cut(self, index: int, message: dict[str, Any]) -> None:
        pass

    @property
    def counted_on(self) -> bool:
        return False


class Newcomer:
    """Incarnation 9 of the only server of a world that has taken three cuts."""

    def __init__(self, folder: Path) -> None:
        world = World(folder, running=False, keep=3)
        for _ in range(3):
            world.train(4)
            world.cuts.take(f"00000001-{world.plane.step:010d}")
            world.background.run()
        self.folder = folder
        self.around = Around()
        self.life = Lifecycle(Identity("ns", "job", Role.SERVER, 0, 9, ""), self.around)
        settings = replace(world.membership.settings, store=f"file://{folder}")
        mine = Member(Role.SERVER, 0, 9, "s0", "a:0")
        self.membership: Membership = replace(
            world.membership, epoch=9, members=(mine,), settings=settings, initialised=True
        )

    def roll_back(self, cut: str) -> None:
        """Hear of a rollback in a new epoch."""
        before = self.membership
        self.membership = replace(
            before, epoch=before.epoch + 1, rollback=Rollback(before.rollback.generation + 1, cut)
        )
        self.life.adopt(self.membership, replica=False)

    def until(self, done: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        while not done():
            self.around.calls.get(timeout=SECONDS)()
            self.life.tick()

    def value(self) -> float:
        """What every parameter is: each push of the world added 1."""
        assert self.life.plane is not None
        (value,) = set(self.life.plane.shard.tables[0].data.ravel().tolist())
        assert isinstance(value, float)
        return value


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Newcomer]:
    made = Newcomer(tmp_path)
    yield made
    made.life.close(SECONDS)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x41
    path.write_bytes(data)


def test_a_rollback_to_a_whole_cut(new: Newcomer) -> None:
    new.roll_back(THIRD)
    assert new.life.rolling
    new.until(lambda: not new.life.rolling)
    assert new.value() == 12.0
    assert new.life.error is None
    assert new.life.cuts is not None
    assert new.life.cuts.newest is not None
    assert new.life.cuts.newest.path == THIRD


def test_a_cut_that_was_removed_since_is_told_with_the_newest(new: Newcomer) -> None:
    # The operator may know an older one than the servers, which keep but a few.
    (new.folder / FIRST).unlink()
    new.roll_back(FIRST)
    new.until(lambda: new.life.error is not None)
    newest = new.life.older
    assert newest is not None
    assert (newest.path, newest.step) == (THIRD, 12)


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        (f"{SHARD}/cut-00000001-0000000012.seg", flip),
        (f"{SHARD}/cut-00000001-0000000012.seg", Path.unlink),
        (f"{SHARD}/cut-00000001-0000000012.json", flip),
        (f"{SHARD}/cut-00000001-0000000012.json", Path.unlink),
        (THIRD, flip),
        (THIRD, Path.unlink),
    ],
)
def test_damage_is_told_with_the_cut_before_which_can_be_gone_back_to(
    new: Newcomer, what: str, damage: Callable[[Path], None]
) -> None:
    damage(new.folder / what)
    new.roll_back(THIRD)
    new.until(lambda: new.life.error is not None)
    assert f"cannot load {THIRD}: " in (new.life.error or "")
    older = new.life.older
    assert older is not None
    assert (older.path, older.step) == (SECOND, 8)
    assert new.life.rolling, "nothing is served"
    new.roll_back(older.path)
    assert (new.life.error, new.life.older) == (None, None)
    new.until(lambda: not new.life.rolling)
    assert new.value() == 8.0
    assert new.life.error is None


def test_there_may_be_no_cut_before(new: Newcomer) -> None:
    for path in (new.folder / SHARD).glob("cut-*.seg"):
        flip(path)
    for cut, older in ((THIRD, SECOND), (SECOND, FIRST), (FIRST, None)):
        new.roll_back(cut)
        new.until(lambda: new.life.error is not None)
        found = new.life.older
        assert (None if found is None else found.path) == older


@pytest.mark.parametrize("epoch", [9, 11])
def test_a_plan_of_another_epoch_does_not_write_into_a_rollback(new: Newcomer, epoch: int) -> None:
    # As from an operator that was replaced, or out of a queue of a server that stood still.
    new.life.adopt(new.membership, replica=False)
    new.roll_back(FIRST)
    everything = Source(SourceKind.RUNNING_CHECKPOINT, slots_to_hex(range(1024)))
    outcome = new.life.restore(Restore(1, epoch, new.life.me.id, (everything,)))
    assert (outcome.status, str(epoch) in outcome.message) == (409, True)
    new.until(lambda: not new.life.rolling and new.life.initialised)
    new.life.close(SECONDS)
    while not new.around.calls.empty():
        new.around.calls.get()()
    assert new.value() == 4.0


def test_what_went_wrong_with_an_earlier_rollback_says_nothing_of_the_next(new: Newcomer) -> None:
    flip(new.folder / SHARD / "cut-00000001-0000000012.seg")
    new.roll_back(THIRD)
    new.roll_back(SECOND)
    new.until(lambda: not new.life.rolling)
    assert (new.life.error, new.value()) == (None, 8.0)


class Away(DirectoryStore):
    """A store that cannot be asked while `away` is set."""

    away = True

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        if self.away:
            raise StoreAwayError(f"cannot read {name}: 503")
        return super().read(name, offset, length)


@pytest.fixture
def store(new: Newcomer, monkeypatch: pytest.MonkeyPatch) -> Away:
    """What the newcomer's store is."""
    made = Away(new.folder)

    def opened(_uri: str, _folder: str, *, there: bool) -> Store:
        return made

    monkeypatch.setattr(lifecycle, "open_store", opened)
    return made


def test_a_store_that_is_away_is_asked_again(
    new: Newcomer, store: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daruma_trainer.server.lifecycle.AGAIN_SECONDS", 0.0)
    new.roll_back(THIRD)
    new.until(lambda: new.life.waiting is not None)
    assert "503" in (new.life.waiting or "")
    assert new.life.error is None, "it may be whole"
    store.away = False
    new.life.tick()
    new.until(lambda: not new.life.rolling)
    assert (new.life.waiting, new.life.error, new.value()) == (None, None, 12.0)


def test_a_volume_that_is_not_mounted_is_waited_for_by_a_new_server(
    new: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has never seen it, but was told that the job has saves."""
    monkeypatch.setattr("daruma_trainer.server.lifecycle.AGAIN_SECONDS", 0.0)
    aside = new.folder.with_name(f"{new.folder.name}-aside")
    new.folder.rename(aside)
    new.folder.mkdir()
    new.membership = replace(new.membership, saved=True)
    new.roll_back(THIRD)
    while new.life.waiting is None:
        new.around.calls.get(timeout=SECONDS)()  # and no tick, which would ask again
    assert new.life.error is None, "it may be whole"
    assert "mount its volume again" in (new.life.waiting or "")
    aside.rename(new.folder)  # which is empty still
    new.life.tick()
    new.until(lambda: not new.life.rolling)
    assert new.value() == 12.0


def test_a_rollback_that_waits_for_its_store_ends_with_the_next(new: Newcomer, store: Away) -> None:
    new.roll_back(THIRD)
    new.until(lambda: new.life.waiting is not None)
    store.away = False
    new.roll_back(SECOND)
    assert new.life.waiting is None
    new.until(lambda: not new.life.rolling)
    assert new.value() == 8.0


def test_a_warm_start_waits_for_its_store(new: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [StoreAwayError("503"), StoreAwayError("503")]
    tables = {"t": np.zeros(3, np.float32)}

    def load(_uri: str) -> dict[str, Floats]:
        if answers:
            raise answers.pop()
        return tables

    monkeypatch.setattr(lifecycle, "load", load)
    monkeypatch.setattr("daruma_trainer.server.lifecycle.AGAIN_SECONDS", 0.0)
    settings = replace(new.membership.settings, restore_from="file:///x/a/b/c")
    new.life.adopt(replace(new.membership, settings=settings, initialised=False), replica=False)
    plane = new.life.plane
    assert plane is not None
    new.until(lambda: bool(plane.beginning.warm))
    assert plane.beginning.warm is tables


def test_what_killed_saves_left_goes_when_a_new_server_starts(new: Newcomer) -> None:
    shard = new.folder / PREFIX / "shard-0000"
    names = ["00000001", "00000002", "00000005", "00000009"]
    left = {n: shard / n / "segment-0000000001.seg.77-140033.partial" for n in names}
    for path in left.values():
        path.parent.mkdir(exist_ok=True)
        path.touch()
    frozen = Member(Role.SERVER, 0, 5, "s1", "a:1")
    new.membership = replace(new.membership, handing=(frozen,))
    new.roll_back(THIRD)
    new.until(lambda: not new.life.rolling)
    there = {n for n, path in left.items() if path.exists()}
    assert there == {"00000005", "00000009"}, "of who hands over, and one's own, which is young"
    assert len(list((shard / "00000001").glob("cut-*"))) == 6
