"""Who is lost: pods that ended, members that are silent or hang, ports that closed."""

from dataclasses import replace
from datetime import timedelta

import pytest

from controller_world import FOREVER, World, spec_of
from daruma_operator.api.status import Phase
from daruma_operator.substrate.protocol import PodState
from daruma_trainer.contract import Suspect


def test_detection_counts_from_when_a_member_saw_it() -> None:
    world = World(total=FOREVER).running()
    world.sim("worker-0").suspects = (Suspect("server-2-1", 0.7, "Disconnected"),)
    world.kill("server-2")
    world.tick()
    record = world.status.recovery
    assert record is not None
    assert record.phases.detect == pytest.approx(0.71)
    assert not record.estimated
    assert record.started_at == world.now - timedelta(seconds=record.phases.detect or 0)


def test_a_lost_worker_is_replaced() -> None:
    world = World(total=FOREVER).running()
    world.kill("worker-1", code=1)
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.reason, record.delta_norm.kind) == (
        "WorkerLost", "WorkerReplaced", "Exact",
    )  # fmt: skip
    assert world.status.restarts.workers == 1
    assert [c.role for c in world.status.restarts.counted] == ["Worker"]


def test_a_worker_that_was_told_to_end_is_not_done() -> None:
    world = World(total=FOREVER).running()
    pod = world.pod("worker-0")
    world.finish("worker-0")
    world.pods[pod.name] = replace(world.pods[pod.name], deleting=True)
    world.running()
    assert world.status.workers.succeeded == 0
    assert world.status.restarts.workers == 1


def test_a_silent_server_is_lost_only_when_a_member_confirms_it() -> None:
    world = World(total=FOREVER).running()
    world.failing = {"server-1-1": 60.0}
    decision = world.tick()
    assert decision.phase is Phase.RUNNING
    assert any(c.type == "Unreachable" and c.status == "True" for c in world.status.conditions)
    world.sim("worker-0").suspects = (Suspect("server-1-1", 1.0, "Unanswered"),)
    assert world.tick().phase is Phase.RECOVERING
    assert world.status.recovery is not None
    assert world.status.recovery.losses[0].reason == "Unresponsive"


def test_a_server_whose_loop_hangs_behind_its_agent_is_replaced() -> None:
    world = World(total=FOREVER).running()
    world.silent = {"server-1-1": 4.0}
    world.tick()
    assert world.seen().doubted, "so that its workers are asked"
    assert world.tick(60.0).phase is Phase.RUNNING, "it is the operator's word alone"
    world.sim("worker-0").suspects = (Suspect("server-1-1", 64.0, "Unanswered"),)
    world.silent = {"server-1-1": 29.0}
    assert world.tick(0.5).phase is Phase.RUNNING
    decision = world.tick(1.0)
    assert decision.phase is Phase.RECOVERING
    assert world.status.recovery is not None
    assert world.status.recovery.losses[0].reason == "Hung"
    assert "hungSeconds" in decision.events[0].message
    world.sim("worker-0").suspects = ()
    world.running()
    assert "j-server-1-1" not in world.pods
    assert (world.status.restarts.servers, world.status.restarts.disruptions) == (1, 0)


def test_a_worker_whose_program_keeps_everything_waiting_is_not_replaced() -> None:
    world = World(total=FOREVER).running()
    world.silent = {"worker-0-1": 100.0}
    world.sim("server-0").suspects = (Suspect("worker-0-1", 100.0, "Unanswered"),)
    assert world.tick().phase is Phase.RUNNING


def test_a_suspicion_alone_is_no_verdict() -> None:
    world = World(total=FOREVER).running()
    world.sim("worker-0").suspects = (Suspect("server-1-1", 60.0, "Unanswered"),)
    assert world.tick().phase is Phase.RUNNING


def told(world: World, name: str, code: int = 137, **facts: object) -> None:
    """At last a pod says how its container ended."""
    ended = replace(world.pods[name], state=PodState.TERMINATED, exit_code=code, message="boom")
    world.pods[name] = replace(ended, **facts)  # type: ignore[arg-type]


def test_a_servers_closed_port_and_a_members_word_are_a_verdict() -> None:
    world = World(total=FOREVER).running()
    name = world.hang_up("server-1")
    assert world.tick().phase is Phase.RECOVERING
    assert world.status.recovery is not None
    assert world.status.recovery.losses[0].reason == "ProcessEnded"
    assert name in world.pods, "what it says last is waited for"
    told(world, name, reason="OOMKilled")
    decision = world.tick()
    (event,) = [e for d in world.decisions for e in d.events if e.warning]
    assert event.reason == "OOMKilled"
    assert event in decision.events, "told once, when it is known"
    assert (
        "j-server-1-1 was lost (OOMKilled) with exit code 137 (SIGKILL); it said last: boom"
        in event.message
    )
    assert world.status.recovery.losses[0].reason == "OOMKilled"
    last = world.status.last_failure
    assert last is not None
    assert (last.pod, last.reason, last.exit_code, last.message) == (name, "OOMKilled", 137, "boom")
    world.running()
    assert world.status.recoveries[-1].losses[0].reason == "OOMKilled"
    assert world.status.restarts.servers == 1
    assert len(world.status.restarts.counted) == 1
    world.tick()
    assert name not in world.pods


def test_a_process_that_ended_because_its_pod_was_taken_does_not_count() -> None:
    world = World(total=FOREVER).running()
    names = [world.hang_up("server-1"), world.hang_up("server-2")]
    world.suspect("server-1-1")
    world.sim("worker-0").suspects += (Suspect("server-2-1", 0.05, "Disconnected"),)
    world.tick()
    assert len(world.status.restarts.counted) == 2
    told(world, names[0], disrupted=True)
    told(world, names[1], reason="Error")
    world.running()
    reasons = [x.reason for x in world.status.recoveries[-1].losses]
    assert reasons == ["Disrupted", "Error"]
    assert len(world.status.restarts.counted) == 1
    assert world.status.restarts.disruptions == 1


def test_a_pod_that_never_says_how_it_ended_is_removed_with_the_recovery() -> None:
    world = World(total=FOREVER).running()
    name = world.hang_up("server-1")
    world.running()
    assert world.status.recoveries[-1].losses[0].reason == "ProcessEnded"
    (event,) = [e for d in world.decisions for e in d.events if e.reason == "PodFailed"]
    assert event.message == f"{name} was lost (ProcessEnded)"
    world.tick()
    assert name not in world.pods


@pytest.mark.parametrize(
    ("seat", "changes"),
    [
        ("worker-1", {}),
        ("server-1", {"runPolicy": {"backoffLimit": 0}}),
        ("server-1", {"recovery": {"placement": "Adopt"}}),
    ],
)
def test_how_it_ended_is_waited_for_where_it_decides_what_follows(
    seat: str, changes: dict[str, object]
) -> None:
    world = World(spec=spec_of(**changes), total=FOREVER).running()
    world.hang_up(seat)
    assert world.tick().phase is Phase.RUNNING


def test_a_port_that_only_the_operator_finds_closed_is_no_verdict() -> None:
    world = World(total=FOREVER).running()
    world.hang_up("server-1")
    for sim in world.sims.values():
        sim.suspects = ()
    assert world.tick().phase is Phase.RUNNING


def test_before_training_begins_a_closed_port_is_no_verdict() -> None:
    world = World(slow=True)
    world.until(lambda w: any(s.membership for s in w.sims.values()))
    world.hang_up("server-1")
    world.tick()
    assert world.status.restarts.servers == 0
