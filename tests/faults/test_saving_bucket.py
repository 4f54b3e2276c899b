"""A server's saves in a bucket: whole after every save, and training goes on when it fails."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.checkpoint.manifest import newest_cut, newest_manifest
from daruma_trainer.checkpoint.objects import Patience, open_objects
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import Store, open_store
from faulty_proxy import Fault, FaultyProxy, faulty_proxy
from s3_server import environment
from saving_world import ROWS, World

BRIEF = Patience(silence=4.0, retrying=3.0)


def world_of(store: Store, folder: Path) -> World:
    """Server 0 before its first save, which saves at every step."""
    return World(folder, store=store, cuts=False)


def train(world: World) -> None:
    """Apply a push that moves every row, and save what is due."""
    world.train(1)
    world.save()


def saved(world: World, store: Store) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Return the newest save's step, and the value of each of its blocks; all must be whole."""
    found = newest_manifest(store, world.membership.prefix, 0, 9)
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
    world = world_of(store, tmp_path)
    world.begin()
    world.background.run()
    for _ in range(4):
        for _ in range(3):
            train(world)
            assert world.saver.error is None
        step, values = saved(world, store)
        assert step == world.plane.step
        assert (values == step).sum() >= ROWS // 4
    names = store.list(f"{world.membership.prefix}/shard-0000/00000001")
    assert sum(n.startswith("manifest-") for n in names) == world.membership.settings.keep
    assert sum(n.startswith("segment-") for n in names) < 12, "old segments go"


@pytest.fixture
def direct(s3: str) -> Store:
    """The bucket as it is, whatever becomes of the way to it."""
    return open_store(s3)


@pytest.fixture
def proxy(direct: Store, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands before every store that is opened from here on."""
    with faulty_proxy(s3_port) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(found.port)["AWS_ENDPOINT_URL"])
        yield found


@pytest.fixture
def world(s3: str, proxy: FaultyProxy, tmp_path: Path) -> World:
    """Saves through the proxy, and does not wait for long."""
    return world_of(open_objects(s3, BRIEF), tmp_path)


@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.UNAVAILABLE, Fault.CUT_REQUEST, Fault.FULL])
def test_training_goes_on_while_the_bucket_fails(
    fault: Fault, s3: str, direct: Store, proxy: FaultyProxy, world: World
) -> None:
    world.begin()
    world.background.run()
    train(world)
    before = saved(world, direct)
    proxy.fail(fault)
    train(world)
    assert world.saver.error is not None
    assert s3 in world.saver.error
    assert world.plane.step == 2
    # What was durable is so still, and nothing that is half there is found.
    after = saved(world, direct)
    assert after[0] == before[0]
    assert np.array_equal(after[1], before[1])
    proxy.heal()
    for _ in range(4):
        train(world)
    assert world.saver.error is None
    step, values = saved(world, direct)
    assert step == world.plane.step == 6
    # What could not be saved was not forgotten: by now every block was.
    assert values.min() > 1


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST_ANSWER])
def test_a_result_that_failed_at_its_last_request_is_saved_when_it_is_asked_for_again(
    fault: Fault, direct: Store, proxy: FaultyProxy, world: World
) -> None:
    proxy.fail(fault, method="PUT", path="/cuts/")
    world.cuts.take_final("9-9")
    world.background.run()
    assert world.cuts.final is None
    proxy.heal()
    world.cuts.take_final("9-9")
    world.background.run()
    assert world.cuts.final == f"{world.membership.prefix}/cuts/9-9.json"
    found = newest_cut(direct, world.membership.prefix)
    assert found is not None
    assert found[1].number == "9-9"
