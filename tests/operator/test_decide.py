"""Decisions: whole stories in a world without clock or network, and the transition table."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller_world import FOREVER, World, ladder, spec_of
from daruma_operator.api.status import Phase, TrainingJobStatus
from daruma_operator.controller.acts import CreatePod
from daruma_operator.controller.decide import TRANSITIONS
from daruma_operator.controller.membership import membership_of
from daruma_trainer.contract import Membership, SavedState
from soak import counted

HISTORIES, COUNTED = counted("histories of up to 12 events: decisions", 150, 20_000)


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


def test_members_hear_once_that_there_is_something_in_the_store() -> None:
    """Who comes later takes a folder in which nothing is for one whose volume is away."""
    world = World(total=FOREVER).running()
    seen: dict[int, Membership] = {}
    epoch, saved = world.status.epoch, []
    for step in range(6):
        if step == 3:
            world.cut = SavedState("n/j/u/cuts/00000002-0000000002.json", 2, 1000, 0.0)
        world.tick()
        membership = membership_of(world.job, world.status, world.store)
        assert seen.setdefault(membership.epoch, membership) == membership
        saved.append(all(s.membership and s.membership.saved for s in world.sims.values()))
    assert saved == [False] * 3 + [True] * 3
    assert world.status.epoch == epoch + 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_operator_that_is_killed_after_every_pass_does_the_same(every: int) -> None:
    world = World(total=FOREVER).running()
    world.kill("server-1")
    for i in range(30):
        world.tick(restarted=i % every == 0)
    assert len(world.status.recoveries) == 1
    assert len(world.created) == 6
    assert world.status.phase == "Running"


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
