"""What the operator after the one that died tells again."""

from datetime import timedelta

import pytest

from controller_world import FOREVER, World, spec_of
from daruma_operator.api.status import Phase
from daruma_operator.controller.telling import RECENT_SECONDS, untold
from daruma_operator.substrate.protocol import Event


def told(world: World) -> list[Event]:
    return [event for decision in world.decisions for event in decision.events]


def named(events: list[Event]) -> set[tuple[str, int, str | None]]:
    return {(e.reason, e.epoch, e.member) for e in events}


@pytest.mark.parametrize("seats", [["server-1"], ["worker-0"], ["server-0", "server-2"]])
def test_a_recovery_is_told_again_under_the_same_names(seats: list[str]) -> None:
    world = World(total=FOREVER).running()
    for seat in seats:
        world.kill(seat)
    world.tick()
    assert named(list(untold(world.status, world.now))) == named(told(world))
    world.running()
    assert named(list(untold(world.status, world.now))) == named(told(world))
    messages = {e.message for e in told(world)}
    assert {e.message for e in untold(world.status, world.now) if not e.warning} <= messages


def test_what_joins_a_recovery_is_told_again_too() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.tick()
    world.kill("server-0")
    world.running()
    assert named(told(world)) == named(list(untold(world.status, world.now)))


def test_a_loss_that_joined_slots_on_their_way_back_is_no_start() -> None:
    world = World(spec=spec_of(recovery={"placement": "Adopt"}), total=FOREVER).running()
    world.kill("server-1")
    world.until(lambda w: w.status.recovery is not None and w.status.recovery.cause == "HandBack")
    world.kill("server-2")
    world.until(lambda w: w.status.recovery is not None and len(w.status.recovery.losses) > 1)
    again = [e.reason for e in untold(world.status, world.now)]
    assert again == ["PodFailed"]


def test_slots_that_returned_are_no_failure() -> None:
    world = World(spec=spec_of(recovery={"placement": "Adopt"}), total=FOREVER).running()
    world.kill("server-1")
    world.until(lambda w: len(w.status.recoveries) == 2 and w.status.recovery is None)
    again = [e.reason for e in untold(world.status, world.now)]
    assert again == ["HandedBack"]


def test_the_end_is_told_again() -> None:
    world = World(total=5)
    world.until(lambda w: w.status.phase is Phase.SUCCEEDED)
    (event,) = untold(world.status, world.now)
    assert (event.reason, event in told(world)) == ("Succeeded", True)


def test_what_ended_long_ago_was_told() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.running()
    later = world.now + timedelta(seconds=RECENT_SECONDS + 1)
    assert untold(world.status, later) == ()
