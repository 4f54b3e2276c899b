"""The loss of a server without slots, as some of very many have none: nothing is lost with it."""

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest

from controller_world import FOREVER, FULL, World, ladder, sources_of, spec_of
from daruma_operator.api.status import Phase
from daruma_trainer.contract import SLOTS, SavedState

CUT = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0)
PLACES = (
    "controller_world.place",
    "daruma_operator.controller.sourcing.place",
    "daruma_operator.controller.losing.place",
)


@pytest.fixture(autouse=True)
def none_on_server_1() -> Iterator[None]:
    with ExitStack() as stack:
        owners = tuple(2 * (slot % 2) for slot in range(SLOTS))
        for name in PLACES:
            stack.enter_context(mock.patch(name, return_value=owners))
        yield


@pytest.mark.parametrize("strategy", ["Freshest", "Stateless", "Partial", "FullCheckpoint"])
def test_its_recovery_restores_nothing_and_is_exact(strategy: str) -> None:
    world = World(spec=spec_of(recovery=ladder(strategy)), total=FOREVER, cut=CUT).running()
    world.sim("worker-0").step += 3
    world.kill("server-1")
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.reason, record.outcome) == (
        "ServerLost", "NothingLost", "Succeeded",
    )  # fmt: skip
    assert (record.delta_norm.kind, record.delta_norm.value) == ("Exact", 0.0)
    assert record.rework.estimated == (0.0, 0.0)
    assert sources_of(world) == {}
    assert (record.strategy, record.rework.redone_steps) == (strategy, 0)
    assert (world.status.rollback.generation, world.status.rollback.cut) == (0, None)


@pytest.mark.parametrize("together", [False, True])
def test_lost_with_one_that_has_slots_all_go_back(*, together: bool) -> None:
    world = World(spec=spec_of(recovery=ladder("FullCheckpoint")), total=FOREVER, cut=CUT).running()
    world.kill("server-1")
    if not together:
        world.tick()
        assert world.status.rollback.generation == 0
    world.kill("server-2")
    world.running()
    (record,) = world.status.recoveries
    assert (record.reason, world.status.rollback.generation) == ("RolledBackToCut", 1)
    assert sources_of(world) == {FULL: SLOTS}


def test_whom_nobody_replaces_in_time_the_next_rung_takes_up_and_no_other_with_it() -> None:
    """Nobody has gone back, so that what the other servers have is good."""
    recovery = ladder("FullCheckpoint", "Partial", timeouts={"restoreSeconds": 5})
    world = World(spec=spec_of(recovery=recovery), total=FOREVER, cut=CUT).running()
    others = [m for m in world.status.members if m.index != 1]
    world.kill("server-1")
    world.tick()
    world.until(lambda w: w.sim("server-1").plan is not None)
    world.sim("server-1").state = "Restoring"
    world.tick(6.0)
    world.running()
    (record,) = world.status.recoveries
    assert (record.strategy, record.reason) == ("Partial", "NothingLost")
    assert [m for m in world.status.members if m.index != 1] == others


def test_lost_with_another_it_changes_nothing_of_that_ones_record() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.kill("server-2")
    world.running()
    record = world.status.recoveries[-1]
    assert record.reason == "PeerCopiesFound"
    assert sum(record.sources.values()) == SLOTS // 2


@pytest.mark.parametrize("strategy", ["Stateless", "FullCheckpoint"])
def test_no_source_is_needed(strategy: str) -> None:
    """Nor a store, nor a cut, nor a worker that lives: the job goes on."""
    stored = strategy == "FullCheckpoint"  # without a store it is refused
    spec = spec_of(recovery=ladder(strategy), **({} if stored else {"checkpoint": {}}))
    world = World(spec=spec, store="file:///s" if stored else None, total=FOREVER).running()
    for name in ("server-1", "worker-0", "worker-1"):
        world.kill(name)
    world.running()
    assert world.status.phase is Phase.RUNNING
    assert world.status.recoveries[-1].reason == "NothingLost"


def test_a_job_ends_after_its_loss() -> None:
    world = World().running()
    world.kill("server-1")
    world.until_phase("Succeeded")


@pytest.mark.parametrize("strategy", ["Freshest", "FullCheckpoint"])
def test_its_guest_goes_back_to_a_pod_of_its_own(strategy: str) -> None:
    spec = spec_of(recovery=ladder(strategy, placement="Adopt"))
    world = World(spec=spec, total=FOREVER).running()
    world.kill("server-1")
    world.until(lambda w: len(w.status.recoveries) == 2 and w.status.recovery is None)
    found = [(r.cause, r.reason, r.outcome) for r in world.status.recoveries]
    assert found == [
        ("ServerLost", "NothingLost", "Succeeded"), ("HandBack", "HandedOver", "Succeeded"),
    ]  # fmt: skip
    assert not any(m.guest for m in world.status.members)
