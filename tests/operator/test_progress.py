"""What status says of progress."""

import pytest

from controller_world import FOREVER, World


def test_steps_per_second_are_those_of_the_last_seconds() -> None:
    world = World(total=FOREVER).running()
    for _ in range(20):
        world.tick(0.5)
    for seconds in 40 * [0.01, 0.99]:
        world.tick(seconds)
    assert world.status.progress is not None
    assert world.status.progress.steps_per_second == pytest.approx(2.0, rel=0.25)


def test_no_progress_is_shown_and_rolls_nobody_back() -> None:
    world = World(total=FOREVER).running()
    world.sim("server-0").state = "Busy"
    world.tick(1.0)
    world.tick(700.0)
    assert world.status.phase == "Running"
    assert any(c.type == "Stalled" and c.status == "True" for c in world.status.conditions)


def refused(world: World) -> tuple[str, str]:
    (found,) = [c for c in world.status.conditions if c.type == "Unreachable"]
    return found.status, found.reason


def test_an_operator_with_another_key_says_so_and_replaces_nobody() -> None:
    world = World(total=FOREVER).running()
    made = list(world.created)
    world.denied = world.sims.keys() - {"worker-1-1"}  # made later, with a Secret made anew
    world.failing = dict.fromkeys(world.denied, 0.0)
    world.suspect("server-1-1")
    for _ in range(20):
        world.tick(1.0)
    assert refused(world) == ("True", "TokenRefused")
    said = [e for d in world.decisions for e in d.events if e.reason == "TokenRefused"]
    assert len(said) == 1
    assert "the Secret daruma-operator-key in its namespace" in said[0].message
    assert "delete the job and create it again" in said[0].message
    assert world.created == made
    world.denied, world.failing = set(), {}
    world.tick()
    assert refused(world) == ("False", "Reached")


def test_an_address_that_is_anothers_for_a_moment_is_nothing_to_tell() -> None:
    world = World(total=FOREVER).running()
    world.denied, world.failing = {"worker-0-1"}, {"worker-0-1": 0.0}
    world.tick(1.0)
    assert not [c for c in world.status.conditions if c.type == "Unreachable"]
