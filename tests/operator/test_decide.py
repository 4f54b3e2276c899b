"""Decisions: whole stories in a world without clock or network, and the transition table."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller_world import FULL, PEER, RUNNING, World, sources_of, spec_of
from daruma_operator.api.status import Phase, TrainingJobStatus
from daruma_operator.controller.acts import CreatePod, PutMembership
from daruma_operator.controller.decide import TRANSITIONS
from daruma_operator.controller.membership import membership_of
from daruma_operator.substrate.protocol import PodState
from daruma_trainer.contract import SLOTS, Membership, Outage, SavedState, Suspect
from soak import counted

FOREVER = 10**9
HISTORIES, COUNTED = counted("histories of up to 12 events: decisions", 150, 20_000)
CUT = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0)
OLDER = SavedState("n/j/u/cuts/00000002-0000000001.json", 1, 900, 0.0)


def ladder(strategy: str, *fallback: str, **more: object) -> dict[str, object]:
    return {"strategy": strategy, "fallback": list(fallback), **more}


def test_a_job_starts_runs_and_ends() -> None:
    world = World()
    first = world.pass_()
    assert first.phase is Phase.PENDING
    assert len([a for a in first.acts if isinstance(a, CreatePod)]) == 5
    world.until_phase("Succeeded")
    assert [p for p in world.pods.values() if p.state == "Running"] == []
    assert world.status.result is not None
    assert world.status.result.uri == "file:///s/n/j/u/cuts/00000003-0000000030_final.json"
    assert world.status.workers.succeeded_indexes == "0-1"
    assert world.status.recoveries == ()
    assert len(world.created) == 5


def test_nothing_is_done_that_status_did_not_announce() -> None:
    world = World()
    before = world.status
    decision = world.pass_()
    assert before == TrainingJobStatus()
    announced = {m.pod for m in decision.status.members}
    assert {a.plan.name for a in decision.acts if isinstance(a, CreatePod)} == announced


def test_a_lost_server_is_restored_from_peers_and_nobody_else_is_touched() -> None:
    world = World(total=FOREVER).running()
    others = {n for n in world.pods if n != "j-server-1-1"}
    world.kill("server-1")
    decision = world.tick()
    assert decision.phase is Phase.RECOVERING
    fence = decision.status.epoch
    told = [a for a in decision.acts if isinstance(a, PutMembership)]
    assert {a.member for a in told} == {n.removeprefix("j-") for n in others}
    owner = told[0].membership.members[1]
    assert (owner.index, owner.incarnation, owner.address) == (1, fence, None)
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.reason, record.outcome) == (
        "ServerLost", "PeerCopiesFound", "Succeeded",
    )  # fmt: skip
    assert list(sources_of(world)) == [PEER]
    assert record.epoch == fence
    assert world.status.epoch >= fence + 2
    assert others <= world.pods.keys()
    assert world.created.count(f"j-server-1-{fence}") == 1
    parts = record.phases
    assert None not in (parts.detect, parts.replace, parts.restore, parts.resume)
    total = sum(x or 0.0 for x in parts.model_dump().values())
    assert record.seconds == pytest.approx(total, abs=1e-5)


def test_the_delta_is_bounded_by_what_was_acknowledged_since() -> None:
    world = World(total=FOREVER).running()
    world.sim("worker-0").step += 3  # three acknowledged pushes that no copy has: Σ = 2p + 3
    world.kill("server-0")
    world.running()
    delta = world.status.recoveries[-1].delta_norm
    assert delta.kind == "UpperBound"
    assert delta.value == pytest.approx(3 * 0.5)


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


def test_a_loss_during_a_recovery_joins_it() -> None:
    world = World(total=FOREVER, holds_pods=True)
    world.pass_()
    for name in list(world.pods):
        world.start(name)
    world.running()
    world.kill("server-1")
    world.tick()
    world.kill("server-0")
    world.tick()
    record = world.status.recovery
    assert record is not None
    assert record.indexes == (0, 1)
    assert len(record.losses) == 2
    for name in [n for n in world.pods if world.pods[n].state == "Waiting"]:
        world.start(name)
    world.running()
    assert len(world.status.recoveries) == 1
    assert world.status.recoveries[0].indexes == (0, 1)


def test_the_second_server_dies_while_it_is_being_restored() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.tick()
    world.tick()
    name = world.kill("server-1")
    world.running()
    assert name not in {m.pod for m in world.status.members}
    assert [r.outcome for r in world.status.recoveries] == ["Succeeded"]
    assert len(world.status.recoveries[0].losses) == 2


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


def test_a_worker_that_dies_with_a_server_is_no_source() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.kill("worker-0")
    world.running()
    plan = world.sim("server-1").plan
    assert plan is not None
    assert {s.member for s in plan.sources} == {"worker-1-1", None}


def test_all_pods_gone_is_a_disruption_restored_from_the_store() -> None:
    world = World(total=FOREVER).running()
    for name in list(world.pods):
        world.remove(name)
    decision = world.tick()
    assert decision.phase is Phase.PENDING
    world.running()
    assert list(sources_of(world)) == [RUNNING]
    assert world.status.recoveries[-1].cause == "AllPodsLost"
    assert world.status.restarts.counted == ()
    assert world.status.restarts.disruptions == 5


def test_damage_in_the_store_is_told_and_makes_the_delta_unknown() -> None:
    world = World(total=FOREVER).running()
    world.damaged = ("block 3 of table 0 in s at 64: the checksum does not fit; taken from m",)
    for name in list(world.pods):
        world.remove(name)
    world.running()
    told = [e for d in world.decisions for e in d.events if e.reason == "SourceDamaged"]
    assert {e.member for e in told} == {f"server-{i}" for i in range(len(told))}
    assert len(told) == world.spec.servers.replicas
    assert all(e.warning and "block 3 of table 0" in e.message for e in told)
    assert world.status.recoveries[-1].delta_norm.kind == "Unknown"
    assert "SourceDamaged" in world.status.message


@pytest.mark.parametrize("strategy", ["Freshest", "Stateless"])
def test_without_any_source_the_job_fails_and_says_what_to_do(strategy: str) -> None:
    spec = spec_of(checkpoint={}, recovery=ladder(strategy))
    world = World(spec=spec, store=None, total=FOREVER).running()
    for name in list(world.pods):
        world.remove(name)
    world.tick()
    assert (world.status.phase, world.status.reason) == ("Failed", "StateLost")
    assert "give the job a checkpoint.store, or keep replicas" in world.status.message
    assert "checkpoint.store" in world.status.message
    assert world.status.recoveries[-1].outcome == "Failed"
    assert any(e.reason == "StateLost" for e in world.decisions[-1].events)


def test_initial_values_only_where_they_are_allowed() -> None:
    spec = spec_of(checkpoint={}, recovery={"allowReset": True})
    world = World(spec=spec, store=None, total=FOREVER).running()
    for name in list(world.pods):
        world.remove(name)
    world.tick()
    assert (world.status.phase, world.status.initialised) == ("Pending", False)
    world.running()
    assert world.status.recoveries[-1].outcome == "Reset"
    assert world.status.restarts.jobs == 1


def test_full_checkpoint_rolls_everybody_back_once() -> None:
    spec = spec_of(recovery=ladder("FullCheckpoint"))
    world = World(spec=spec, total=FOREVER, cut=CUT).running()
    step = world.status.progress.step if world.status.progress else 0
    world.kill("server-1")
    decision = world.tick()
    assert (decision.status.rollback.generation, decision.status.rollback.cut) == (1, CUT.path)
    world.until(lambda w: w.status.recovery is None)
    record = world.status.recoveries[-1]
    assert sources_of(world) == {FULL: 1024}
    assert record.rework.redone_steps == step - CUT.step
    assert world.status.rollback.generation == 1
    assert world.status.rollback.cut is None
    assert world.sim("server-0").generation == 1


def test_a_damaged_cut_is_told_and_everybody_goes_back_to_the_one_before() -> None:
    spec = spec_of(recovery=ladder("FullCheckpoint"))
    world = World(spec=spec, total=FOREVER, cut=CUT, bad_cuts={CUT.path: OLDER}).running()
    step = world.status.progress.step if world.status.progress else 0
    world.kill("server-1")
    world.until(lambda w: w.status.rollback.generation == 2)
    # What a server of the first generation still says of the damaged one is of the past.
    late = world.sim("server-0")
    late.generation, late.cut, late.state = 1, None, "Restoring"
    world.pass_()
    assert world.status.checkpoint is not None
    assert (world.status.checkpoint.cut, world.status.checkpoint.step) == (OLDER.path, 1)
    late.generation, late.cut, late.state = 2, OLDER, "Ready"
    world.until(lambda w: w.status.recovery is None)
    record = world.status.recoveries[-1]
    assert (record.outcome, record.reason, record.rung) == ("Succeeded", "RolledBackToOlderCut", 0)
    assert record.rework.redone_steps == step - OLDER.step
    assert record.rework.counterfactual_steps == step - CUT.step
    assert (sources_of(world), record.bytes) == ({FULL: 1024}, OLDER.bytes)
    assert "SourceDamaged" in world.status.message
    assert world.status.checkpoint.cut == OLDER.path
    told = [e for d in world.decisions for e in d.events if e.reason == "SourceDamaged"]
    assert told
    assert all(CUT.path in e.message and "going back to step 1" in e.message for e in told)
    assert {world.sim(f"server-{i}").generation for i in range(3)} == {2}


def test_where_no_cut_is_whole_all_servers_are_made_anew_for_the_next_rung() -> None:
    spec = spec_of(recovery=ladder("FullCheckpoint", "Partial"))
    bad: dict[str, SavedState | None] = {CUT.path: OLDER, OLDER.path: None}
    world = World(spec=spec, total=FOREVER, cut=CUT, bad_cuts=bad).running()
    world.kill("server-1")
    world.until(lambda w: w.status.recovery is None and w.status.recoveries != ())
    record = world.status.recoveries[-1]
    assert (record.outcome, record.strategy, record.rung) == ("Succeeded", "Partial", 1)
    # Some may have gone back, others not: nobody's memory is of use.
    assert (sources_of(world), record.rework.redone_steps) == ({RUNNING: 1024}, 0)
    assert {x.index for x in record.losses} == {0, 1, 2}
    assert world.status.restarts.counted[1:] == ()
    events = [e for d in world.decisions for e in d.events]
    (escalated,) = [e for e in events if e.reason == "RecoveryEscalated"]
    assert f"cannot load {OLDER.path}; there is no cut before it" in escalated.message


def test_without_a_whole_cut_or_another_rung_the_state_is_lost() -> None:
    spec = spec_of(recovery=ladder("FullCheckpoint"))
    world = World(spec=spec, total=FOREVER, cut=CUT, bad_cuts={CUT.path: None}).running()
    world.kill("server-1")
    world.until_phase("Failed")
    assert world.status.reason == "StateLost"
    assert "there is no cut before it" in world.status.message


def test_a_store_that_is_away_is_waited_for_and_named_once() -> None:
    world = World(spec=spec_of(recovery=ladder("Partial")), total=FOREVER).running()
    world.away = "cannot read m in s3://b: 503"
    world.kill("server-1")
    world.until(lambda w: w.status.reason == "StoreUnreachable")
    for _ in range(5):
        world.tick()
    assert world.status.phase == "Recovering"
    assert "cannot read m in s3://b: 503" in world.status.message
    assert "for up to 300 s" in world.status.message
    told = [e for d in world.decisions for e in d.events if e.reason == "StoreUnreachable"]
    assert len(told) == 1
    sim = world.sim("server-1")
    assert sim.plan is not None
    world.away = None
    world.post_restore(sim.id, sim.plan)
    world.until(lambda w: w.status.recovery is None)
    assert list(sources_of(world)) == [RUNNING]


@pytest.mark.parametrize("fallback", [(), ("Stateless",)])
def test_a_store_that_stays_away_is_why_the_deadline_passed(fallback: tuple[str, ...]) -> None:
    recovery = ladder("Partial", *fallback, timeouts={"restoreSeconds": 5})
    world = World(spec=spec_of(recovery=recovery), total=FOREVER).running()
    world.away = "cannot read m in s3://b: 503"
    world.kill("server-1")
    world.until(lambda w: w.status.reason == "StoreUnreachable")
    world.tick(6.0)
    events = [e for d in world.decisions for e in d.events]
    if fallback:
        (escalated,) = [e for e in events if e.reason == "RecoveryEscalated"]
        assert "not Ready within 5 s; server-1-4: cannot read m in s3://b" in escalated.message
    else:
        assert (world.status.phase, world.status.reason) == ("Failed", "RestoreTimeout")
        assert "not Ready within 5 s; server-1-4: cannot read m in s3://b" in world.status.message


def test_saves_that_fail_are_a_condition_until_they_succeed_or_their_server_is_gone() -> None:
    world = World(total=FOREVER).running()

    def stale() -> list[tuple[str, str]]:
        found = [c for c in world.status.conditions if c.type == "CheckpointStale"]
        return [(c.status, c.reason) for c in found]

    world.sim("server-1").save_error = "503"
    world.tick()
    world.tick()
    assert stale() == [("True", "SaveFailed")]
    world.sim("server-1").save_error = None
    world.tick()
    assert stale() == [("False", "Saved")]
    events = [e.reason for d in world.decisions for e in d.events]
    assert events.count("CheckpointFailed") == 1
    world.sim("server-1").save_error = "503"
    world.tick()
    world.kill("server-1")
    world.running()
    assert stale() == [("False", "Saved")], "its last words are of the past"


def test_a_rung_that_cannot_work_is_climbed_over() -> None:
    spec = spec_of(recovery=ladder("Freshest", "FullCheckpoint"))
    world = World(spec=spec, total=FOREVER, cut=CUT).running()
    world.dead_sources, world.damaged = True, ("no manifest can be read",)
    world.kill("server-1")
    world.tick()
    world.until(lambda w: w.status.recovery is None)
    record = world.status.recoveries[-1]
    assert (record.strategy, record.rung, record.reason) == (
        "FullCheckpoint", 1, "RolledBackToCut",
    )  # fmt: skip
    reasons = [e.reason for d in world.decisions for e in d.events]
    assert reasons.count("RecoveryEscalated") == 1
    assert reasons.count("SourceDamaged") == 1


def test_a_store_is_the_peer_of_last_resort() -> None:
    world = World(spec=spec_of(recovery=ladder("Stateless")), total=FOREVER).running()
    for name in list(world.pods):
        world.remove(name)
    world.running()
    record = world.status.recoveries[-1]
    assert (record.strategy, record.reason) == ("Stateless", "RunningCheckpointFound")
    assert record.sources == {RUNNING: SLOTS}


def test_the_record_says_what_the_time_without_a_server_was_to_the_workers() -> None:
    world = World(total=FOREVER).running()
    for name, outage in [
        ("worker-0", Outage(20.0, 0.5, 3.0, 9, over=True)),
        ("worker-1", Outage(20.0, 1.0, 2.5, 9, over=True)),
    ]:
        world.sim(name).outage = outage
    world.moments = {"reset": 100, "runningCheckpoint": 5}
    world.kill("server-1")
    world.running()
    record = world.status.recoveries[-1]
    assert (record.utilisation, record.gap) == (0.95, 3.0)
    assert record.moments == world.moments
    # The next is told nothing of it, and a bound that is none is not written down.
    world.sim("worker-0").outage = Outage(20.0, 0.5, 3.0, record.losses[0].epoch - 1, over=True)
    world.sim("worker-1").outage = Outage(20.0, 20.1, math.inf, 99)
    world.kill("server-1")
    world.running()
    record = world.status.recoveries[-1]
    assert (record.utilisation, record.gap) == (0.0, None)
    world.kill("worker-1")
    world.running()
    record = world.status.recoveries[-1]
    assert (record.cause, record.utilisation, record.gap) == ("WorkerLost", None, None)


def test_no_source_left_ends_in_state_lost() -> None:
    world = World(total=FOREVER).running()
    world.dead_sources = True
    world.kill("server-1")
    world.until_phase("Failed")
    assert world.status.reason == "StateLost"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("replaceSeconds", "ReplaceTimeout"), ("restoreSeconds", "RestoreTimeout")],
)
def test_every_stage_has_a_deadline(setting: str, reason: str) -> None:
    # A single server: no other could take its slots in.
    spec = spec_of(recovery={"timeouts": {setting: 5}}, servers={"replicas": 1})
    world = World(spec=spec, total=FOREVER).running()
    world.kill("server-0")
    if setting == "replaceSeconds":
        world.holds_pods = True
        world.tick()
    else:
        world.tick()
        world.until(lambda w: w.sim("server-0").plan is not None)
        world.sim("server-0").state = "Restoring"
    world.until_phase("Failed", seconds=1.0, ticks=10)
    assert world.status.reason == reason
    assert "5 s" in world.status.message


def test_workers_that_are_silent_are_waited_for_one_second_and_named() -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.tick()
    world.sim("worker-1").step = 0  # it has no copy to report
    world.tick(0.1)
    assert world.sim("server-1").plan is None
    world.tick(1.0)
    plan = world.sim("server-1").plan
    assert plan is not None
    world.sim("worker-1").step = 1
    world.until(lambda w: w.status.recovery is None)
    assert world.status.recoveries[-1].silent == ("worker-1-1",)


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


def test_a_start_names_whom_it_waits_for() -> None:
    world = World(slow=True)
    world.until_phase("Starting")
    world.tick()
    text = "2 of 5 members are ready; waiting for server-0, server-1, server-2"
    assert world.status.message == text


def test_steps_per_second_are_those_of_the_last_seconds() -> None:
    world = World(total=FOREVER).running()
    for _ in range(20):
        world.tick(0.5)
    for seconds in 40 * [0.01, 0.99]:
        world.tick(seconds)
    assert world.status.progress is not None
    assert world.status.progress.steps_per_second == pytest.approx(2.0, rel=0.25)


def test_disruptions_never_count() -> None:
    spec = spec_of(runPolicy={"backoffLimit": 0})
    world = World(spec=spec, total=FOREVER).running()
    for _ in range(3):
        pod = world.pod("server-1")
        world.pods[pod.name] = replace(pod, disrupted=True)
        world.running()
    assert world.status.restarts.disruptions == 3


def test_what_would_have_brought_lost_state_back_is_what_the_job_lacks() -> None:
    spec = spec_of(recovery={"strategy": "Partial"})
    world = World(spec=spec, total=FOREVER, dead_sources=True).running()
    world.kill("server-1")
    world.until_phase("Failed")
    advice = world.status.message.partition("For the next time: ")[2]
    assert advice.startswith("add Stateless to recovery.fallback")
    assert "checkpoint.store" not in advice, "it has one"


def test_a_loss_before_training_began_is_no_recovery() -> None:
    world = World(holds_pods=True)
    world.pass_()
    for name in list(world.pods):
        world.start(name)
    world.kill("server-0")
    world.holds_pods = False
    decision = world.tick()
    assert decision.phase is Phase.PENDING
    world.running()
    assert world.status.recoveries == ()
    assert world.status.restarts.servers == 1


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


def test_what_is_edited_reaches_the_members_at_once() -> None:
    world = World(total=FOREVER).running()
    spec = world.spec.model_copy(
        update={"checkpoint": world.spec.checkpoint.model_copy(update={"every": 7})}
    )
    epoch = world.status.epoch
    world.job = world.job.model_copy(update={"spec": spec, "generation": 2})
    for _ in range(3):
        world.tick()
    assert (world.status.epoch, world.status.observed_generation) == (epoch + 1, 2)
    for sim in world.sims.values():
        assert sim.membership is not None
        assert sim.membership.settings.every == 7


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


def test_a_worker_that_was_told_to_end_is_not_done() -> None:
    world = World(total=FOREVER).running()
    pod = world.pod("worker-0")
    world.finish("worker-0")
    world.pods[pod.name] = replace(world.pods[pod.name], deleting=True)
    world.running()
    assert world.status.workers.succeeded == 0
    assert world.status.restarts.workers == 1


def test_pods_that_never_run_fail_the_job_with_their_reason() -> None:
    world = World(holds_pods=True)
    world.pass_()
    world.now += timedelta(seconds=301)
    world.pass_()
    assert (world.status.phase, world.status.reason) == ("Failed", "PodsPending")
    assert "ContainerCreating" in world.status.message


def test_a_deadline_for_the_whole_job() -> None:
    world = World(spec=spec_of(runPolicy={"activeDeadlineSeconds": 10}), total=FOREVER).running()
    world.tick(60.0)
    assert world.status.reason == "DeadlineExceeded"


def test_no_progress_is_shown_and_rolls_nobody_back() -> None:
    world = World(total=FOREVER).running()
    world.sim("server-0").state = "Busy"
    world.tick(1.0)
    world.tick(700.0)
    assert world.status.phase == "Running"
    assert any(c.type == "Stalled" and c.status == "True" for c in world.status.conditions)


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


def test_a_status_that_was_lost_is_rebuilt_from_pods_and_views() -> None:
    world = World(total=FOREVER).running()
    epoch = world.status.epoch
    world.job = world.job.model_copy(update={"status": TrainingJobStatus()})
    world.kill("server-2")
    world.tick(restarted=True)
    assert world.status.epoch > epoch
    assert world.status.initialised
    created = len(world.created)
    world.running()
    assert created == 6
    assert len(world.created) == 6


def test_a_status_that_fell_behind_its_members_overtakes_them() -> None:
    world = World(total=FOREVER).running()
    ahead = world.status.epoch
    world.job = world.job.model_copy(
        update={"status": world.status.model_copy(update={"epoch": ahead - 1})}
    )
    world.tick(restarted=True)
    assert world.status.epoch == ahead + 1


def test_the_membership_is_a_function_of_status_and_changes_with_the_epoch() -> None:
    world = World(total=FOREVER).running()
    seen: dict[int, Membership] = {}
    world.kill("server-1")
    for _ in range(20):
        world.tick()
        membership = membership_of(world.job, world.status, world.store)
        assert seen.setdefault(membership.epoch, membership) == membership


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_operator_that_is_killed_after_every_pass_does_the_same(every: int) -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    for i in range(30):
        world.tick(restarted=i % every == 0)
    assert len(world.status.recoveries) == 1
    assert len(world.created) == 6
    assert world.status.phase == "Running"


def test_final_is_final() -> None:
    world = World(total=5).until_phase("Succeeded")
    before = world.status
    for _ in range(3):
        decision = world.tick()
        assert decision.status == before
        assert not any(isinstance(a, CreatePod) for a in decision.acts)


# The transition table


def _kill(world: World, role: str, code: int) -> None:
    mine = sorted(p.index for p in world.pods.values() if p.state == "Running" and p.role == role)
    if mine:
        world.kill(f"{role.lower()}-{mine[0]}", code=code)


def _remove(world: World, count: int) -> None:
    for name in sorted(n for n, p in world.pods.items() if p.state == "Running")[-count:]:
        world.remove(name)


def _late(world: World) -> None:
    world.now += timedelta(seconds=400)


def _hold(world: World) -> None:
    world.holds_pods = True


def _release(world: World) -> None:
    world.holds_pods = False
    for name, pod in list(world.pods.items()):
        if pod.state == "Waiting":
            world.start(name)


def _dead(world: World) -> None:
    world.dead_sources = True


def _forget(world: World) -> None:
    world.job = world.job.model_copy(update={"status": TrainingJobStatus()})


def _slow(world: World) -> None:
    world.slow = True


def _left(world: World) -> None:
    world.total = 0


HAPPENINGS: dict[str, Callable[[World], None]] = {
    "tick": lambda _: None,
    "kill-server": lambda world: _kill(world, "Server", 137),
    "kill-worker": lambda world: _kill(world, "Worker", 1),
    "usage": lambda world: _kill(world, "Worker", 2),
    "finish": lambda world: _kill(world, "Worker", 0),
    "remove": lambda world: _remove(world, 1),
    "lose-all": lambda world: _remove(world, 100),
    "late": _late,
    "hold": _hold,
    "release": _release,
    "dead": _dead,
    "forget": _forget,
    "left": _left,
    "slow": _slow,
}
REACHED: set[tuple[Phase | None, Phase]] = set()


def happen(world: World, event: str) -> None:
    """One thing that can happen to a job, and two looks at it (none for a name with `!`)."""
    HAPPENINGS[event.removesuffix("!")](world)
    if event.endswith("!"):
        return
    for _ in range(2):
        before = world.status.phase
        decision = world.tick(restarted=event == "forget")
        if decision.phase is not before:
            REACHED.add((before, decision.phase))


@COUNTED
@settings(
    max_examples=HISTORIES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    st.lists(st.sampled_from(sorted(HAPPENINGS)), max_size=12),
    st.sampled_from(["Freshest", "Partial"]),
)
def test_every_decision_is_a_declared_transition(events: list[str], strategy: str) -> None:
    world = World(spec=spec_of(recovery=ladder(strategy)), total=6)
    for event in events:
        before = None if event == "forget" else world.status.phase
        happen(world, event)
        for decision in world.decisions:
            assert decision.reason
            assert decision.message
        phase = before
        for decision in world.decisions:
            if phase is not decision.phase:
                assert decision.phase in TRANSITIONS[phase], (phase, decision.phase, events)
            phase = decision.phase
        world.decisions.clear()


STORIES = [
    ("tick", "tick", "tick", "tick", "kill-server", "tick", "tick", "left", "tick", "tick", "tick"),
    ("tick", "kill-server", "tick", "tick"),
    ("hold", "late"),
    ("hold", "release", "tick", "lose-all", "tick", "tick"),
    ("tick", "tick", "hold", "lose-all", "late"),
    ("tick", "tick", "kill-server", "lose-all"),
    ("tick", "tick", "usage"),
    ("hold", "tick", "release", "usage"),
    ("hold", "tick", "release", "tick", "dead", "kill-server", "tick", "late"),
    ("tick", "tick", "forget"),
    ("hold", "tick", "forget"),
    ("tick", "tick", "forget", "kill-server"),
    ("tick", "tick", "kill-worker", "usage"),
    ("tick", "usage"),
    ("slow", "tick", "kill-server"),
    ("slow", "tick", "forget"),
    ("tick", "tick", "forget!", "kill-server"),
]


def test_every_declared_transition_is_reached() -> None:
    REACHED.clear()
    for story in STORIES:
        world = World(total=FOREVER)
        for event in story:
            happen(world, event)
    declared = {(a, b) for a, found in TRANSITIONS.items() for b in found}
    assert declared - REACHED == set()
    assert REACHED - declared == set()
