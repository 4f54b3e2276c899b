"""What the store cannot give: damaged blocks and cuts, a store that is away, saves that fail."""

import pytest

from controller_world import FOREVER, FULL, RUNNING, World, ladder, sources_of, spec_of
from daruma_trainer.contract import SavedState

CUT = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0)
OLDER = SavedState("n/j/u/cuts/00000002-0000000001.json", 1, 900, 0.0)


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


def test_where_there_is_no_cut_yet_the_next_rung_touches_nobody_else() -> None:
    """Nobody went back to anything."""
    world = World(spec=spec_of(recovery=ladder("FullCheckpoint", "Partial")), total=FOREVER)
    world.running()
    world.kill("server-1")
    world.running()
    (record,) = world.status.recoveries
    assert (record.strategy, record.indexes, len(record.losses)) == ("Partial", (1,), 1)
    assert list(sources_of(world)) == [RUNNING]
    assert sum(sources_of(world).values()) < 1024


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
