"""How a job starts, and why it does not."""

from datetime import timedelta

from controller_world import World
from daruma_operator.api.status import Phase


def test_a_start_names_whom_it_waits_for() -> None:
    world = World(slow=True)
    world.until_phase("Starting")
    world.tick()
    text = "2 of 5 members are ready; waiting for server-0, server-1, server-2"
    assert world.status.message == text


def test_pods_that_never_run_fail_the_job_with_their_reason() -> None:
    world = World(holds_pods=True)
    world.pass_()
    world.now += timedelta(seconds=301)
    world.pass_()
    assert (world.status.phase, world.status.reason) == ("Failed", "PodsPending")
    assert "ContainerCreating" in world.status.message


def test_a_program_that_never_joins_fails_the_job_at_once() -> None:
    world = World()
    world.pass_()
    world.finish("worker-1")
    world.tick()
    assert (world.status.phase, world.status.reason) == ("Failed", "NothingTrained")
    assert "j-worker-1-1 ended with exit code 0 before it joined" in world.status.message


def test_workers_that_leave_without_tables_fail_the_job() -> None:
    world = World(slow=True)
    world.tick()
    world.until_phase("Starting")
    world.sim("worker-0").state = "Left"
    world.tick()
    assert world.status.phase is Phase.STARTING, "the other may make them yet"
    world.sim("worker-1").state = "Left"
    server = world.sim("server-1")
    world.last.clear()
    del world.sims[server.id]
    world.tick()
    assert world.status.phase is Phase.STARTING, "a server that was not heard may have some"
    world.sims[server.id] = server
    world.tick()
    assert (world.status.phase, world.status.reason) == ("Failed", "NothingTrained")
