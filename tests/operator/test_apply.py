"""What was decided is done as far as it can be, whatever fails of it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from time import monotonic

import pytest

from controller_live import DEADLINE, KEY, SETTINGS, TOKEN, LiveSubstrate, LiveWorld
from controller_world import FOREVER, START
from daruma_operator.api.job import TrainingJob
from daruma_operator.controller import apply as applying
from daruma_operator.controller.acts import Act, CreatePod, DeletePod
from daruma_operator.controller.agents import Agents, Talk
from daruma_operator.controller.apply import PodNotMadeError, TokenNotPutError, announce, apply
from daruma_operator.controller.loop import Controller, Hooks
from daruma_operator.errors import ClusterError
from daruma_operator.metrics import Metrics
from daruma_operator.names import pod_plan
from daruma_operator.substrate.protocol import Event, JobKey, PodPlan
from daruma_trainer.contract import Role


class Refusing(LiveSubstrate):
    """Refuses pods, as an exact quota does; notes what it was asked for, in order."""

    def __init__(self, world: LiveWorld) -> None:
        super().__init__(world)
        self.calls: list[str] = []
        self.under_way = 0
        self.token_refused = False

    async def equip(self, job: TrainingJob) -> None:
        self.calls.append("equip")
        if self.token_refused:
            raise ClusterError("no Secrets here")

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        self.calls.append(f"create {plan.name}")
        if plan.index == 0:
            raise ClusterError("the quota is used up")
        self.under_way += 1
        await asyncio.sleep(0.05)
        self.under_way -= 1

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        self.calls.append(f"delete {name}")
        if name == "j-server-1-1":
            raise ClusterError("not now")


def acts(creations: int = 3) -> list[Act]:
    plans = [pod_plan("j", Role.SERVER, i, 2) for i in range(creations)]
    gone = [f"j-server-{i}-1" for i in range(1, 4)]
    return [*(CreatePod(p) for p in plans), *(DeletePod(n, f"uid-{n}", 1.0) for n in gone)]


def run(substrate: Refusing, *passes: list[Act]) -> Exception | None:
    async def once(what: list[Act], agents: Agents, talk: Talk) -> Exception | None:
        try:
            await apply(what, substrate.world.job, substrate, agents, talk, lambda _point: None)
        except ClusterError as error:
            return error
        finally:
            assert not substrate.under_way, "nothing goes on after the pass"
        return None

    async def story() -> Exception | None:
        agents = Agents(SETTINGS, lambda _key: None)
        talk = agents.begin(KEY, "u", TOKEN)
        talk.equipped = True
        errors = [await once(what, agents, talk) for what in passes]
        await agents.close()
        return errors[-1]

    return asyncio.run(story())


def test_a_refused_pod_holds_up_no_other_act() -> None:
    substrate = Refusing(LiveWorld(total=FOREVER))
    error = run(substrate, acts())
    assert isinstance(error, PodNotMadeError)
    assert "j-server-0-2 could not be made: the quota is used up" in str(error)
    assert substrate.calls == [
        "equip",
        *(f"create j-server-{i}-2" for i in range(3)),
        *(f"delete j-server-{i}-1" for i in range(1, 4)),
    ]


def test_a_pod_that_was_refused_is_not_asked_for_with_every_look() -> None:
    substrate = Refusing(LiveWorld(total=FOREVER))
    assert str(run(substrate, acts(), acts(1))) == "not now", "the deletion, tried again"
    assert substrate.calls.count("create j-server-0-2") == 1
    assert substrate.calls.count("equip") == 1
    again = Refusing(LiveWorld(total=FOREVER))
    run(again, acts(1), [], acts(1))
    assert again.calls.count("create j-server-0-2") == 2, "it was not wanted any more meanwhile"


def test_a_deletion_that_fails_is_told_when_nothing_else_is() -> None:
    substrate = Refusing(LiveWorld(total=FOREVER))
    assert str(run(substrate, acts(0))) == "not now"
    assert "equip" not in substrate.calls, "no pod needs it"


def test_pods_are_made_though_the_secret_of_their_token_is_refused() -> None:
    """A full quota refuses what is there already, too; and a pod waits for its Secret."""
    substrate = Refusing(LiveWorld(total=FOREVER))
    substrate.token_refused = True
    error = run(substrate, [*acts()[1:3], *acts(0)[1:]], [])
    assert isinstance(error, TokenNotPutError), "tried again though no pod is to be made any more"
    assert "its Secret cannot be put there: no Secrets here" in str(error)
    assert [c.split()[0] for c in substrate.calls] == [
        "equip", *["create"] * 2, *["delete"] * 2, "equip",
    ]  # fmt: skip


def test_a_refused_pod_waits_though_the_secret_is_refused_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the job would be looked at again at once, and again."""
    substrate = Refusing(LiveWorld(total=FOREVER))
    substrate.token_refused = True
    monkeypatch.setattr(applying, "AGAIN_SECONDS", 0.0)
    run(substrate, acts(1), acts(1))
    assert substrate.calls.count("create j-server-0-2") == 2, "its time had come"
    monkeypatch.setattr(applying, "AGAIN_SECONDS", DEADLINE)
    again = Refusing(LiveWorld(total=FOREVER))
    again.token_refused = True
    run(again, acts(1), acts(1))
    assert again.calls.count("create j-server-0-2") == 1


def test_deadlines_go_on_though_acts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods are refused for ever: the job fails when its time is over, not with the next backoff."""
    world = LiveWorld(total=FOREVER)
    substrate = Refusing(world)
    settings = replace(SETTINGS, first_backoff_seconds=DEADLINE, longest_backoff_seconds=DEADLINE)
    skipped = [timedelta(0)]

    async def refuse(job: TrainingJob, plan: PodPlan) -> None:
        skipped[0] += timedelta(hours=1)
        raise ClusterError("the quota is used up")

    def clock() -> datetime:
        return START + skipped[0]

    monkeypatch.setattr(substrate, "create_pod", refuse)

    async def story() -> None:
        stop = asyncio.Event()
        controller = Controller(substrate, settings, Metrics(), clock, Hooks())
        running = asyncio.create_task(controller.run(stop))
        async with asyncio.timeout(DEADLINE / 2):
            while world.status.phase != "Failed":
                await asyncio.sleep(0.01)
        stop.set()
        await running

    asyncio.run(story())
    assert world.status.reason == "PodsPending"


def tell(count: int, emit: Callable[[Event], object]) -> None:
    world = LiveWorld(total=FOREVER)
    substrate = LiveSubstrate(world)

    async def told(job: TrainingJob, event: Event) -> None:
        result = emit(event)
        if asyncio.iscoroutine(result):
            await result

    events = [Event("PodFailed", "", 1, True, f"worker-{i}") for i in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "emit", told)
        asyncio.run(announce(world.job, substrate, events))


def test_events_that_hang_hold_up_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(applying, "EVENTS_SECONDS", 0.1)
    begun: list[str | None] = []

    async def hang(event: Event) -> None:
        begun.append(event.member)
        await asyncio.sleep(DEADLINE)

    started = monotonic()
    with caplog.at_level("WARNING", "daruma.operator"):
        tell(100, hang)
    assert monotonic() - started < DEADLINE / 2
    assert begun == [f"worker-{i}" for i in range(applying.CREATIONS)]
    assert [r.getMessage() for r in caplog.records] == [
        f"{JobKey('n', 'j')}: not all of 100 events were told in 0.1 s"
    ]


def test_events_are_told_in_their_order() -> None:
    told: list[str | None] = []

    def note(event: Event) -> None:
        told.append(event.member)

    tell(100, note)
    assert told == [f"worker-{i}" for i in range(100)]
