"""The loss of a server without slots, as some of very many have none: nothing is lost with it."""

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest

from controller_world import FOREVER, World, ladder, sources_of, spec_of
from daruma_operator.api.status import Phase
from daruma_trainer.contract import SLOTS

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


@pytest.mark.parametrize("strategy", ["Freshest", "Stateless", "Partial"])
def test_its_recovery_restores_nothing_and_is_exact(strategy: str) -> None:
    world = World(spec=spec_of(recovery=ladder(strategy)), total=FOREVER).running()
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


def test_lost_with_another_it_changes_nothing_of_that_ones_record() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.kill("server-2")
    world.running()
    record = world.status.recoveries[-1]
    assert record.reason == "PeerCopiesFound"
    assert sum(record.sources.values()) == SLOTS // 2


def test_no_source_is_needed() -> None:
    """Nor a store, nor a worker that lives: the job goes on."""
    spec = spec_of(checkpoint={}, recovery=ladder("Stateless"))
    world = World(spec=spec, store=None, total=FOREVER).running()
    for name in ("server-1", "worker-0", "worker-1"):
        world.kill(name)
    world.running()
    assert world.status.phase is Phase.RUNNING
    assert world.status.recoveries[-1].reason == "NothingLost"


def test_a_job_ends_after_its_loss() -> None:
    world = World().running()
    world.kill("server-1")
    world.until_phase("Succeeded")


def test_its_guest_goes_back_to_a_pod_of_its_own() -> None:
    spec = spec_of(recovery=ladder("Freshest", placement="Adopt"))
    world = World(spec=spec, total=FOREVER).running()
    world.kill("server-1")
    world.until(lambda w: len(w.status.recoveries) == 2 and w.status.recovery is None)
    found = [(r.cause, r.reason, r.outcome) for r in world.status.recoveries]
    assert found == [
        ("ServerLost", "NothingLost", "Succeeded"), ("HandBack", "HandedOver", "Succeeded"),
    ]  # fmt: skip
    assert not any(m.guest for m in world.status.members)
