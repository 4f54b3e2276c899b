"""Decisions while workers are missing: the job goes on with as few as minReplicas."""

import pytest

from controller_world import FOREVER, PEER, World, sources_of, spec_of
from daruma_operator.api.status import Condition, Phase


def missing_one(least: int = 1, workers: int = 3, **spec: object) -> World:
    """A job that trains, whose worker 1 is lost and gets no new pod."""
    made = spec_of(workers={"replicas": workers, "minReplicas": least}, **spec)
    world = World(spec=made, total=FOREVER).running()
    world.holds_pods = True
    world.kill("worker-1")
    return world


def degraded(world: World) -> Condition:
    return next(c for c in world.status.conditions if c.type == "Degraded")


def waiting(world: World) -> list[str]:
    return [n for n, p in world.pods.items() if p.state == "Waiting"]


def test_the_job_goes_on_without_a_lost_worker_and_says_so() -> None:
    world = missing_one()
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.reason, record.outcome) == (
        "WorkerLost", "WentOnWithout", "Succeeded",
    )  # fmt: skip
    assert record.phases.replace == pytest.approx(0.0, abs=0.2)
    world.tick(200.0)  # longer than replaceSeconds
    assert world.status.phase is Phase.RUNNING
    assert (degraded(world).status, degraded(world).reason) == ("True", "WorkersMissing")
    assert "2 of 3 workers train; at least 1 are needed" in degraded(world).message
    assert world.status.workers.text == "2/3"
    (pod,) = waiting(world)
    world.start(pod)
    epoch = world.status.epoch
    world.tick()
    world.tick()
    assert world.status.epoch > epoch, "everybody hears of its address"
    assert (degraded(world).status, world.status.workers.text) == ("False", "3/3")
    assert len(world.status.recoveries) == 1


def test_of_two_that_are_missing_each_comes_when_it_can() -> None:
    world = missing_one(workers=4)
    world.kill("worker-2")
    world.running()
    first, second = sorted(waiting(world))
    world.start(first)
    world.tick()
    world.tick()
    assert world.status.workers.text == "3/4", "it does not wait for the other"
    world.start(second)
    world.tick()
    world.tick()
    assert world.status.workers.text == "4/4"


@pytest.mark.parametrize("least", [2, 3])
def test_with_fewer_the_replacement_is_waited_for(least: int) -> None:
    world = missing_one(least)
    if least == 2:
        world.kill("worker-2")
    for _ in range(5):
        world.tick()
    assert world.status.phase is Phase.RECOVERING
    for pod in waiting(world)[: 1 if least == 2 else 2]:
        world.start(pod)
    world.running()
    whole = least == 3
    assert world.status.recoveries[-1].reason == ("WorkerReplaced" if whole else "WentOnWithout")


def test_with_fewer_there_is_a_deadline() -> None:
    world = missing_one(3, recovery={"timeouts": {"replaceSeconds": 5}})
    world.until_phase("Failed", seconds=1.0, ticks=12)
    assert world.status.reason == "ReplaceTimeout"


def test_a_vacant_seat_is_not_asked_what_it_holds() -> None:
    world = missing_one()
    world.running()
    world.holds_pods = False
    world.kill("server-1")
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.silent) == ("ServerLost", ())
    assert list(sources_of(world)) == [PEER]


def test_what_a_lost_worker_counted_stays_in_the_job_s_counts() -> None:
    world = World(total=FOREVER).running()
    world.sim("worker-1").skipped = 4
    world.tick()
    assert world.status.pushes.skipped == 4
    world.kill("worker-1")
    world.running()
    assert (world.status.pushes.skipped, world.status.gone.skipped) == (4, 4)
    assert [r.pushes.skipped for r in world.status.recoveries] == [4], "of the only loss"
    world.sim("worker-1").skipped = 2
    world.tick()
    assert world.status.pushes.skipped == 6
    world.tick(restarted=True)
    assert world.status.pushes.skipped == 6


def test_what_is_counted_after_a_recovery_is_its_own_until_the_next_loss() -> None:
    world = World(spec=spec_of(recovery={"placement": "Adopt"}), total=FOREVER).running()
    world.kill("worker-1")
    world.running()
    world.sim("worker-1").skipped = 5
    world.tick()
    assert [r.pushes.skipped for r in world.status.recoveries] == [5]
    # What is known when the next loss is, happened since the last look.
    world.sim("worker-0").skipped = 2
    world.kill("server-1")
    world.until(lambda w: len(w.status.recoveries) == 3 and w.status.recovery is None)
    world.sim("worker-1").skipped = 6
    world.tick()
    found = [(r.cause, r.pushes.skipped) for r in world.status.recoveries]
    assert found == [("WorkerLost", 5), ("ServerLost", 3), ("HandBack", 0)]
    assert world.status.pushes.skipped == 8


@pytest.mark.parametrize("mode", ["Sync", "Bounded"])
def test_the_step_is_the_clock_of_the_slowest_that_is_there(mode: str) -> None:
    world = missing_one(consistency={"mode": mode})
    world.running()
    ahead = world.sim("worker-0")
    ahead.step += 5
    world.pass_()
    assert world.status.progress is not None
    assert world.status.progress.step == world.sim("worker-2").step, "not that of the vacant seat"
    for sim in world.sims.values():
        sim.state = "Left" if sim is ahead else sim.state
    world.tick()
    assert world.status.progress.step == world.sim("worker-2").step
