"""A server's saves in a bucket: whole after every save, and training goes on when it fails."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import newest_cut, newest_manifest
from daruma_trainer.checkpoint.objects import Patience, open_objects
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.errors import StoreError
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.background import Background, Done, Job
from daruma_trainer.server.cuts import Cuts
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.saving import Saver
from daruma_trainer.server.slots import SlotState
from faulty_proxy import Fault, faulty_proxy
from s3_server import environment

ROWS, COLS = 40, 4
BRIEF = Patience(silence=4.0, retrying=3.0)
MEMBERSHIP = Membership(
    "uid", "ns", "job", 1, 1, 1, (Member(Role.SERVER, 0, 1, "s0", "a:0"),),
    Settings(every=4, fraction=0.25, running=True),
)  # fmt: skip


class AtOnce(Background):
    """Jobs are run where they are submitted."""

    def __init__(self) -> None:
        pass

    def post(self, call: Callable[[], None]) -> None:
        call()

    def submit(self, job: Job, done: Done) -> None:
        try:
            result = job()
        except StoreError as error:
            done(None, error)
        else:
            done(result, None)


class World:
    """Server 0, one table, no sockets."""

    def __init__(self, store: Store) -> None:
        self.plane = DataPlane(MEMBERSHIP, 0, 1)
        spec = TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(SGD(momentum=0.9)))
        assert self.plane.add_table(spec) is None
        self.plane.slots.state[:] = SlotState.READY
        self.saver = Saver(self.plane, store, AtOnce(), MEMBERSHIP, 0)
        self.cuts = Cuts(
            self.plane, self.saver, store, AtOnce(), 0, lambda _i, _m: None, MEMBERSHIP
        )

    def train(self) -> None:
        """Apply a push that moves every row, and save what is due."""
        slots = self.plane.slots
        batch = int(slots.last.max()) + 1
        self.plane.shard.tables[0].data += np.float32(1)
        self.plane.shard.tables[0].changed[:] = True
        slots.advance(np.arange(len(slots.ids)), 0, batch, batch)
        self.plane.refresh_step()
        self.saver.tick()
        while self.saver.pending:
            self.saver.work(idle=True)


def saved(store: Store) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Return the newest save's step, and the value of each of its blocks; all must be whole."""
    found = newest_manifest(store, MEMBERSHIP.prefix, 0, 9)
    assert found is not None
    blocks, damaged = read_blocks(store, found[1], found[1].blocks)
    assert not damaged
    assert len(blocks) == ROWS
    return found[1].step, np.array([b.data[0] for b in blocks], np.float32)


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_the_newest_save_reads_back(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = f"file://{tmp_path}" if kind == "directory" else request.getfixturevalue("s3")
    store = open_store(uri)
    world = World(store)
    world.saver.save_all("running", "", lambda _written, _error: None)
    for _ in range(4):
        for _ in range(3):
            world.train()
            assert world.saver.error is None
        step, values = saved(store)
        assert step == world.plane.step
        assert (values == step).sum() >= ROWS // 4
    names = store.list(f"{MEMBERSHIP.prefix}/shard-0000/00000001")
    assert sum(n.startswith("manifest-") for n in names) == MEMBERSHIP.settings.keep
    assert sum(n.startswith("segment-") for n in names) < 12, "old segments go"


@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.UNAVAILABLE, Fault.CUT_REQUEST, Fault.FULL])
def test_training_goes_on_while_the_bucket_fails(
    fault: Fault, s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = open_store(s3)
    with faulty_proxy(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        world = World(open_objects(s3, BRIEF))
        world.saver.save_all("running", "", lambda _w, _e: None)
        world.train()
        before = saved(direct)
        proxy.fail(fault)
        world.train()
        assert world.saver.error is not None
        assert s3 in world.saver.error
        assert world.plane.step == 2
        # What was durable is so still, and nothing that is half there is found.
        after = saved(direct)
        assert after[0] == before[0]
        assert np.array_equal(after[1], before[1])
        proxy.heal()
        for _ in range(4):
            world.train()
        assert world.saver.error is None
        step, values = saved(direct)
        assert step == world.plane.step == 6
        # What could not be saved was not forgotten: by now every block was.
        assert values.min() > 1


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST_ANSWER])
def test_a_result_that_failed_at_its_last_request_is_saved_when_it_is_asked_for_again(
    fault: Fault, s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = open_store(s3)
    with faulty_proxy(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        world = World(open_objects(s3, BRIEF))
        proxy.fail(fault, method="PUT", path="/cuts/")
        world.cuts.take_final("9-9")
        assert world.cuts.final is None
        proxy.heal()
        world.cuts.take_final("9-9")
    assert world.cuts.final == f"{MEMBERSHIP.prefix}/cuts/9-9.json"
    found = newest_cut(direct, MEMBERSHIP.prefix)
    assert found is not None
    assert found[1].number == "9-9"
