"""Recoveries: where lost slots come from, the stages and their deadlines, and the record of it."""

import math
from dataclasses import replace
from datetime import timedelta

import pytest

from controller_world import FOREVER, PEER, RUNNING, World, ladder, sources_of, spec_of
from daruma_operator.api.status import Phase
from daruma_operator.controller.acts import PostRestore, PutMembership
from daruma_operator.controller.observe import Heard
from daruma_operator.controller.sourcing import copies_of
from daruma_operator.controller.verdicts import name_of
from daruma_trainer.contract import SLOTS, Outage, Role


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


def test_a_store_is_the_peer_of_last_resort() -> None:
    world = World(spec=spec_of(recovery=ladder("Stateless")), total=FOREVER).running()
    for name in list(world.pods):
        world.remove(name)
    world.running()
    record = world.status.recoveries[-1]
    assert (record.strategy, record.reason) == ("Stateless", "RunningCheckpointFound")
    assert record.sources == {RUNNING: SLOTS}


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


def test_no_source_left_ends_in_state_lost() -> None:
    world = World(total=FOREVER).running()
    world.dead_sources = True
    world.kill("server-1")
    world.until_phase("Failed")
    assert world.status.reason == "StateLost"


def test_what_would_have_brought_lost_state_back_is_what_the_job_lacks() -> None:
    spec = spec_of(recovery={"strategy": "Partial"})
    world = World(spec=spec, total=FOREVER, dead_sources=True).running()
    world.kill("server-1")
    world.until_phase("Failed")
    advice = world.status.message.partition("For the next time: ")[2]
    assert advice.startswith("add Stateless to recovery.fallback")
    assert "checkpoint.store" not in advice, "it has one"


def test_what_a_former_plan_could_not_bring_is_not_held_against_a_newer_one() -> None:
    world = World(total=FOREVER, dead_sources=True).running()
    world.kill("server-1")
    world.until(lambda w: any(s.plan for s in w.sims.values()))
    late = world.sim("server-1")
    found = late.restore
    assert found is not None
    assert found.missing
    world.kill("server-0")  # before the operator hears of that: both are planned for
    world.dead_sources = False
    world.until(lambda _: late.plan is not None and late.plan.epoch > found.epoch)
    late.restore, late.state = found, "Restoring"  # it has not begun with that one yet
    world.tick()
    assert world.status.recovery is not None
    assert (world.status.recovery.rung, world.status.reason) == (0, "ServerLost")


def recovered(world: World) -> World:
    return world.until(lambda w: w.status.recovery is None and bool(w.status.recoveries))


def without_store(**more: object) -> World:
    return World(spec=spec_of(checkpoint={}, **more), store=None, total=FOREVER).running()


def restored(world: World, seat: str) -> None:
    """Kill a server, and wait until its next incarnation has all; nobody made a step with it."""
    world.kill(seat)
    world.holds_steps = True
    world.until(
        lambda w: w.status.recovery is not None and w.seen().reported(w.sim(seat).id, "Ready")
    )


def test_who_was_restored_is_no_loss_once_nobody_offers_its_slots() -> None:
    """Another server is lost before the first step with the restored one; there is no store."""
    world = without_store(servers={"replicas": 3})
    restored(world, "server-1")
    back = world.pod("server-1")
    world.kill("server-0")
    world.holds_steps = False
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.outcome, record.rung, record.indexes) == ("Succeeded", 0, (0, 1))
    assert world.pod("server-1") == back
    assert sources_of(world) == {PEER: SLOTS - len(world.slots(2))}
    assert record.delta_norm.value is not None, "both were priced"


def test_who_was_restored_outlives_the_workers_that_it_came_from() -> None:
    world = without_store(workers={"replicas": 1})
    restored(world, "server-1")
    world.kill("worker-0")
    world.holds_steps = False
    recovered(world)
    record = world.status.recoveries[-1]
    assert (record.outcome, record.reason) == ("Succeeded", "PeerCopiesFound")


def test_who_is_nearly_restored_is_waited_for() -> None:
    """Its last word is older than that of the workers, which have its slots from it already."""
    world = without_store(servers={"replicas": 3})
    restored(world, "server-1")
    late = world.sim("server-1")
    world.kill("server-0")
    world.late_words[late.id] = replace(world.report(late), state="Restoring")
    for _ in range(5):
        world.tick()
        assert world.status.phase == "Recovering"
    world.late_words.clear()
    world.holds_steps = False
    recovered(world)


def test_another_operator_hears_the_workers_before_it_hands_out_a_plan() -> None:
    world = World(total=FOREVER, lost_plans=True).running()
    world.kill("server-1")
    world.until(lambda w: any(isinstance(a, PostRestore) for a in w.decisions[-1].acts))
    world.lost_plans = False  # the operator dies before anybody is told
    workers = {s.id for s in world.sims.values() if s.role is Role.WORKER}
    world.unheard |= workers
    world.now += timedelta(seconds=30)
    world.tick(restarted=True)
    world.tick()
    assert not any(s.plan for s in world.sims.values()), "all that it knew of was the store"
    world.unheard.clear()
    recovered(world)
    assert sources_of(world).keys() == {PEER}
    assert world.status.recoveries[-1].silent == ()


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


def unsourced() -> World:
    """A server is lost in a job without a store."""
    world = World(spec=spec_of(checkpoint={}), store=None, total=FOREVER).running()
    world.kill("server-1")
    return world


def test_what_workers_hold_is_not_lost_because_the_operator_does_not_hear_them() -> None:
    world = unsourced()
    world.failing = {"worker-0-1": 0.0, "worker-1-1": 0.0}
    for _ in range(50):
        world.tick(5.0)
    assert world.status.phase is Phase.RECOVERING
    assert "waiting to hear from worker-0-1, worker-1-1" in world.status.message
    del world.failing["worker-1-1"]
    world.until(lambda w: w.sim("server-1").plan is not None)
    world.failing.clear()  # nobody else tells it of the new epoch here
    world.running()
    assert list(sources_of(world)) == [PEER]


def test_workers_that_are_not_heard_are_not_waited_for_for_ever() -> None:
    world = unsourced()
    world.failing = {"worker-0-1": 0.0, "worker-1-1": 0.0}
    world.until_phase("Failed", seconds=10.0)
    assert world.status.reason == "RestoreTimeout"


def test_workers_that_say_that_they_hold_nothing_are_not_waited_for() -> None:
    world = unsourced()
    world.sim("worker-0").step = world.sim("worker-1").step = 0
    world.until_phase("Failed", ticks=30)
    assert world.status.reason == "StateLost"


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


def test_a_lost_workers_recovery_has_a_deadline_too() -> None:
    world = World(total=FOREVER).running()
    world.failing["server-1-1"] = 0.0  # the operator alone cannot tell it of the new epoch
    world.kill("worker-0")
    world.until_phase("Failed", seconds=10.0)
    assert world.status.reason == "RestoreTimeout"
    assert world.status.message == "the servers were not Ready within 300 s: server-1-1"
    assert [r.outcome for r in world.status.recoveries] == ["Failed"]


@pytest.mark.parametrize("lost", ["worker-0", "server-1", ""])
def test_the_operators_absence_is_no_time(lost: str) -> None:
    """It died when it had written what it would do, and the next one came late."""
    world = World(total=FOREVER)
    if lost:
        world.running()
        world.kill(lost)
    world.lost_acts = True
    world.tick()
    world.lost_acts = False
    world.tick(1000.0, restarted=True)
    assert world.status.phase in (Phase.RECOVERING, Phase.PENDING)
    world.running()
    assert {r.outcome for r in world.status.recoveries} <= {"Succeeded"}
    assert not [m for m in world.status.members if m.guest], "a pod was to be had at once"


def test_an_operator_that_hears_nobody_ends_no_recovery() -> None:
    world = World(total=FOREVER).running()
    world.kill("worker-0")
    world.tick()
    world.failing = dict.fromkeys(world.sims, 0.0)
    for _ in range(100):
        world.tick(10.0)
    assert world.status.phase is Phase.RECOVERING


def test_copies_count_from_the_epoch_in_which_they_were_offered() -> None:
    """Whatever newer epoch others heard of from the worker since."""
    world = World(total=FOREVER).running()
    world.kill("server-1")
    world.tick()
    record, seen = world.status.recovery, world.seen()
    assert record is not None
    (worker,) = [m for m in world.status.members if m.role is Role.WORKER and m.index == 0]
    report = replace(world.report(world.sim("worker-0")), epoch=record.epoch + 2)
    for epoch, offered in ((record.epoch - 1, ()), (record.epoch, report.copies)):
        heard = {name_of(worker): Heard(0.0, report, epoch)}
        assert copies_of(replace(seen, heard=heard), record, worker) == offered
    assert report.copies
