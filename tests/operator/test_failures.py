"""Failures that count, those that end the job at once, and how a process ended in words."""

from dataclasses import replace

import pytest

from controller_world import FOREVER, World, spec_of


def test_a_program_used_wrongly_fails_the_job_at_once() -> None:
    world = World(total=FOREVER).running()
    world.kill("worker-0", code=2)
    world.tick()
    assert (world.status.phase, world.status.reason) == ("Failed", "ProgramRefused")
    assert "boom" in world.status.message


def test_failures_count_up_to_the_limit() -> None:
    spec = spec_of(runPolicy={"backoffLimit": 2})
    world = World(spec=spec, total=FOREVER).running()
    for _ in range(2):
        world.kill("worker-0", code=1)
        world.running()
    name = world.kill("worker-0", code=1)
    world.pods[name] = replace(world.pods[name], message="Traceback:\n  line 3\nValueError: bad\n")
    world.tick()
    assert (world.status.phase, world.status.reason) == ("Failed", "BackoffLimitExceeded")
    last = f"the last one: {name} was lost (Error) with exit code 1: ValueError: bad"
    assert world.status.message.endswith(last)
    assert world.status.last_failure is not None
    assert (world.status.last_failure.message or "").startswith("Traceback")


def test_disruptions_never_count() -> None:
    spec = spec_of(runPolicy={"backoffLimit": 0})
    world = World(spec=spec, total=FOREVER).running()
    for _ in range(3):
        pod = world.pod("server-1")
        world.pods[pod.name] = replace(pod, disrupted=True)
        world.running()
    assert world.status.restarts.disruptions == 3


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "with exit code 1: boom"),
        (200, "with exit code 200: boom"),
        (137, "with exit code 137 (SIGKILL); it said last: boom"),
        (139, "with exit code 139 (SIGSEGV); it said last: boom"),
    ],
)
def test_how_a_process_ended_is_told(code: int, said: str) -> None:
    world = World(total=FOREVER).running()
    world.kill("worker-0", code=code)
    (event,) = [e for e in world.tick().events if e.reason == "PodFailed"]
    assert event.message == f"j-worker-0-1 was lost (Error) {said}"
