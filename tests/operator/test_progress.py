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
