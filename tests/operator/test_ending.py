"""How a job ends: its deadline, its result, and nothing after it."""

from controller_world import FOREVER, World, spec_of
from daruma_operator.controller.acts import CreatePod


def test_a_deadline_for_the_whole_job() -> None:
    world = World(spec=spec_of(runPolicy={"activeDeadlineSeconds": 10}), total=FOREVER).running()
    world.tick(60.0)
    assert world.status.reason == "DeadlineExceeded"


def test_the_result_must_be_durable_before_the_job_succeeds() -> None:
    world = World(total=5, unsaved=True)
    world.until(lambda w: w.status.reason == "SavingResult")
    for index in range(2):
        world.finish(f"worker-{index}")
    for _ in range(5):
        world.tick()
    assert (world.status.phase, world.status.reason) == ("Running", "SavingResult")
    world.sim("server-1").save_error = "No space left"
    world.tick()
    assert world.status.message.endswith("again and again: server-1-1: No space left")
    world.tick(700.0)
    assert (world.status.phase, world.status.reason) == ("Failed", "ResultNotSaved")
    assert world.status.message.endswith("server-1-1: No space left")
    assert not [e for e in world.decisions[-1].events if e.reason == "Stalled"], "it has ended"


def test_the_operators_absence_is_no_time_for_the_final_cut() -> None:
    world = World(total=5, unsaved=True)
    world.until(lambda w: w.status.reason == "SavingResult")
    world.unsaved = False
    world.tick(700.0, restarted=True)
    world.until_phase("Succeeded")


def test_final_is_final() -> None:
    world = World(total=5).until_phase("Succeeded")
    before = world.status
    for _ in range(3):
        decision = world.tick()
        assert decision.status == before
        assert not any(isinstance(a, CreatePod) for a in decision.acts)
