"""The controller as it runs: real HTTP to agents, status writes that lose, operators that die."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from controller_live import (
    DEADLINE,
    KEY,
    SETTINGS,
    TOKEN,
    LiveSubstrate,
    LiveWorld,
    Operator,
    operate,
)
from controller_world import FOREVER, spec_of
from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.clock import SteadyClock
from daruma_operator.controller import gather
from daruma_operator.controller.agents import Agents, Talk, Targets, news
from daruma_operator.controller.gather import observe, reachable
from daruma_operator.controller.loop import Controller
from daruma_operator.errors import ClusterError, UnreadableJobError
from daruma_operator.metrics import Metrics
from daruma_operator.substrate.pods import pod_manifest
from daruma_operator.substrate.protocol import Event, JobKey, PodFacts, PodPlan, PodState
from daruma_trainer.contract import Report, Role, View


@pytest.fixture
def world() -> Iterator[LiveWorld]:
    made = LiveWorld(total=FOREVER)
    yield made
    made.close()


def trains(world: LiveWorld) -> bool:
    status = world.status
    return (
        status.phase == "Running"
        and status.recovery is None
        and status.progress is not None
        and status.progress.step >= 3
    )


def recovered(world: LiveWorld) -> bool:
    return trains(world) and len(world.status.recoveries) == 1


def test_a_job_from_beginning_to_end(world: LiveWorld) -> None:
    world.total = 20
    substrate = LiveSubstrate(world)
    told = ["ResultSaved", "Succeeded"]
    operate(substrate, lambda: [e.reason for e in substrate.events] == told)
    assert world.status.result is not None
    operate(substrate, lambda: not world.running_pods())
    assert len(world.created) == 5


def test_a_lost_server_comes_back(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    world.fall("server-1")
    told = ["PodFailed", "RecoveryStarted", "RecoverySucceeded"]
    operator = operate(substrate, lambda: [e.reason for e in substrate.events] == told)
    assert recovered(world)
    labels = {"strategy": "Freshest", "cause": "ServerLost"}
    count = operator.metrics.registry.get_sample_value("daruma_recovery_seconds_count", labels)
    assert count == 1
    assert len(world.created) == 6


def test_a_closed_port_is_told_from_silence() -> None:
    async def ask() -> dict[str, bool]:
        agents = Agents(SETTINGS, lambda _key: None)
        talk = agents.begin(KEY, "u", TOKEN)
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
            targets = {
                "silent": f"127.0.0.1:{silent.getsockname()[1]}",
                "closed": f"127.0.0.1:{closed.getsockname()[1]}",
            }
            await agents.look(talk, targets)
        await agents.close()
        return {member: silence.refused for member, silence in talk.failing.items()}

    assert asyncio.run(ask()) == {"silent": False, "closed": True}


@pytest.mark.parametrize(
    "point", ["decided", "status-written", "pods-created", "membership-sent", "restore-sent"]
)
def test_an_operator_killed_anywhere_in_a_recovery_is_followed_by_one_that_ends_it(
    world: LiveWorld, point: str
) -> None:
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    world.fall("server-1")
    operator = operate(substrate, lambda: recovered(world), die_at=[point])
    assert operator.deaths == [point]
    assert len(world.created) == 6
    assert len(world.status.recoveries[0].losses) == 1
    told = ["PodFailed", "RecoveryStarted", "RecoverySucceeded"]
    operate(substrate, lambda: sorted(e.reason for e in substrate.events) == told)
    servers = [m for m in world.status.members if m.role == "Server"]
    assert {m.incarnation for m in servers if m.index != 1} == {1}


def test_an_operator_killed_in_every_pass_of_the_beginning(world: LiveWorld) -> None:
    points = ["decided", "status-written", "pods-created", "status-written", "membership-sent"]
    substrate = LiveSubstrate(world)
    operator = operate(substrate, lambda: trains(world), die_at=points)
    assert operator.deaths == points
    assert len(world.created) == 5


def test_what_was_written_is_told_though_an_act_fails(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    failures: list[str] = []
    create = substrate.create_pod

    async def refuse(job: TrainingJob, plan: PodPlan) -> None:
        if not failures:
            failures.append(plan.name)
            raise ClusterError("the quota is used up")
        await create(job, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "create_pod", refuse)
        world.fall("server-1")
        told = ["PodFailed", "PodNotCreated", "RecoveryStarted", "RecoverySucceeded"]
        operate(substrate, lambda: recovered(world) and len(substrate.events) == len(told))
    assert failures
    assert sorted(e.reason for e in substrate.events) == told
    (refused,) = [e for e in substrate.events if e.reason == "PodNotCreated"]
    assert refused.message == f"the pod {failures[0]} could not be made: the quota is used up"
    assert (refused.member, refused.warning) == ("server-1", True)


def test_a_template_that_cannot_be_merged_is_told(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world)
    create = substrate.create_pod
    failures: list[str] = []

    async def refuse(job: TrainingJob, plan: PodPlan) -> None:
        if plan.role is Role.WORKER and not failures:
            failures.append(plan.name)
            template = {"spec": {"containers": [3]}}
            workers = job.spec.workers.model_copy(update={"template": template})
            update = {"spec": job.spec.model_copy(update={"workers": workers})}
            pod_manifest(job.model_copy(update=update), plan)
        await create(job, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "create_pod", refuse)
        operate(substrate, lambda: trains(world))
    (refused,) = [e for e in substrate.events if e.reason == "PodNotCreated"]
    assert "spec.workers.template cannot be merged into it (AttributeError" in refused.message


def test_pods_that_wait_for_their_secret_get_it(
    world: LiveWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused when they were made, and then the operator died."""
    substrate = LiveSubstrate(world)
    list_pods = substrate.list_pods
    refusals = [ClusterError("the quota is used up")] * 2

    async def equip(job: TrainingJob) -> None:
        if refusals:
            raise refusals.pop()

    async def waiting(job: TrainingJob) -> list[PodFacts]:
        pods = await list_pods(job)
        return [replace(p, state=PodState.WAITING) if refusals else p for p in pods]

    monkeypatch.setattr(substrate, "equip", equip)
    monkeypatch.setattr(substrate, "list_pods", waiting)
    operate(substrate, lambda: trains(world), ["pods-created"])
    assert [e.reason for e in substrate.events] == ["TokenNotPut"]


TOLD = ["PodFailed", "RecoveryStarted", "RecoverySucceeded"]


def a_recovery(world: LiveWorld, substrate: LiveSubstrate) -> Callable[[], bool]:
    """Let a server fall; true once that is over, and told.

    In one operator's life: the next would tell all of it again.
    """
    fallen: list[str] = []

    def over() -> bool:
        if trains(world) and not fallen:
            fallen.append("server-1")
            world.fall(fallen[0])
            return False
        return bool(fallen) and recovered(world) and len(substrate.events) == len(TOLD)

    return over


def is_first(status: TrainingJobStatus, ended: list[int]) -> bool:
    """Whether a recovery begins, or ends, with this write, and not with one before; notes it.

    `ended`: how many recoveries had ended in each such write.
    """
    now = len(status.recoveries)
    if now in ended or not (status.recovery is not None or now):
        return False
    ended.append(now)
    return True


def check_counted_once(world: LiveWorld, operator: Operator) -> None:
    count = operator.metrics.registry.get_sample_value
    labels = {"strategy": "Freshest", "cause": "ServerLost"}
    assert count("daruma_recovery_seconds_count", labels) == 1
    (loss,) = world.status.recoveries[0].losses
    labels = {"namespace": KEY.namespace, "role": "Server", "cause": loss.reason}
    assert count("daruma_pod_failures_total", labels) == 1


def test_what_was_written_is_told_and_counted_though_the_answer_was_lost(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world)
    write = substrate.write_status
    lost: list[int] = []
    """How many recoveries had ended in each write whose answer is lost."""

    async def unanswered(job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        written = await write(job, status)
        if is_first(status, lost):
            raise ClusterError("the API server did not answer")
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "write_status", unanswered)
        operator = operate(substrate, a_recovery(world, substrate))
    assert lost == [0, 1]
    check_counted_once(world, operator)
    assert sorted(e.reason for e in substrate.events) == TOLD


def test_a_write_that_comes_true_after_the_next_look_is_told_and_counted_once(
    world: LiveWorld,
) -> None:
    """The API server was slow: it had not taken it when the job was read again."""
    substrate = LiveSubstrate(world)
    write = substrate.write_status
    slow: list[tuple[TrainingJob, TrainingJobStatus]] = []
    held: list[int] = []
    """How many recoveries had ended in each write that is held up."""

    async def held_up(job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        if slow:
            await write(*slow.pop())
        elif is_first(status, held):
            slow.append((job, status))
            raise ClusterError("the API server did not answer")
        return await write(job, status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "write_status", held_up)
        operator = operate(substrate, a_recovery(world, substrate))
    assert held == [0, 1]
    check_counted_once(world, operator)
    assert sorted(e.reason for e in substrate.events) == TOLD
    assert len(world.created) == 6


def test_an_operator_that_is_stopped_while_it_tells_people_tells_it_all(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    world.fall("server-1")
    emit = substrate.emit
    begun: list[str] = []

    async def story() -> None:
        stop = asyncio.Event()

        async def slowly(job: TrainingJob, event: Event) -> None:
            begun.append(event.reason)
            stop.set()
            await asyncio.sleep(0.05)
            await emit(job, event)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(substrate, "emit", slowly)
            async with asyncio.timeout(DEADLINE):
                await Controller(substrate, SETTINGS, Metrics()).run(stop)

    asyncio.run(story())
    assert {"PodFailed", "RecoveryStarted"} <= set(begun)
    assert sorted(e.reason for e in substrate.events) == sorted(begun)


def test_a_pass_that_does_not_notice_its_end_is_the_last(world: LiveWorld) -> None:
    """As one whose cancellation came together with a timeout."""
    substrate = LiveSubstrate(world)
    list_pods = substrate.list_pods

    async def story() -> None:
        stop = asyncio.Event()

        async def stubborn(job: TrainingJob) -> Sequence[PodFacts]:
            stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(DEADLINE)
            return await list_pods(job)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(substrate, "list_pods", stubborn)
            async with asyncio.timeout(DEADLINE / 4):
                await Controller(substrate, SETTINGS, Metrics()).run(stop)

    asyncio.run(story())
    assert world.created, "it went on to its end"


def test_a_status_write_that_loses_leads_to_no_act(world: LiveWorld) -> None:
    substrate = LiveSubstrate(world, conflicts=range(1, 40, 2))
    operate(substrate, lambda: trains(world))
    world.fall("server-2")
    operate(substrate, lambda: recovered(world))
    assert substrate.acts_after_conflict == 0
    assert len(world.created) == 6


def test_a_job_that_cannot_be_read_for_a_while_is_not_given_up(
    world: LiveWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    substrate = LiveSubstrate(world)
    read, refused = substrate.read_job, 0
    begun: list[JobKey] = []
    fallen: list[str] = []
    begin = Agents.begin

    async def unreadable(key: JobKey) -> TrainingJob | None:
        nonlocal refused
        if trains(world) and refused < 5:
            refused += 1
            world.changed()
            raise UnreadableJobError("written by a newer operator")
        return await read(key)

    def noted(agents: Agents, key: JobKey, uid: str, token: str) -> Talk:
        begun.append(key)
        return begin(agents, key, uid, token)

    def over() -> bool:
        if refused == 5 and not fallen:
            fallen.append("server-1")
            world.fall(fallen[0])
        return recovered(world)

    monkeypatch.setattr(substrate, "read_job", unreadable)
    monkeypatch.setattr(Agents, "begin", noted)
    operator = Operator(substrate)
    asyncio.run(operator.run_until(over))
    assert begun == [KEY], "what members said was forgotten"
    errors = operator.metrics.registry.get_sample_value(
        "daruma_reconcile_errors_total", {"error": "UnreadableJobError"}
    )
    assert errors == refused == 5


def test_the_time_between_two_operators_ends_no_recovery(world: LiveWorld) -> None:
    """The first died when it had written the loss; the next came after restoreSeconds."""
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    world.fall("worker-0")
    operator, steady = Operator(substrate), SteadyClock()
    operator.clock = lambda: steady() + timedelta(seconds=1000 * len(operator.deaths))
    operator.die_at = ["status-written"]
    asyncio.run(operator.run_until(lambda: recovered(world) or world.status.phase == "Failed"))
    assert (operator.deaths, world.status.phase) == (["status-written"], "Running")


def test_an_operator_that_made_itself_another_key_says_so() -> None:
    spec = spec_of(recovery={"timeouts": {"detectSeconds": 0.2}})
    world = LiveWorld(spec=spec, total=FOREVER)
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))
    made = list(world.created)

    async def another(job: TrainingJob) -> str:
        return "another-token"

    def said() -> list[str]:
        return [c.reason for c in world.status.conditions if c.type == "Unreachable"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrate, "token", another)
        operate(substrate, lambda: said() == ["TokenRefused"] and bool(substrate.events))
    assert [e.reason for e in substrate.events] == ["TokenRefused"]
    operate(substrate, lambda: said() == ["Reached"])
    assert world.created == made
    world.close()


class Asking(Agents):
    """Notes who was asked at once."""

    asked: frozenset[str] = frozenset()

    async def look(self, talk: Talk, targets: Targets) -> None:
        self.asked = frozenset(targets)
        await super().look(talk, targets)


def test_what_a_worker_said_just_before_its_end_is_asked_for(
    world: LiveWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics are no news, so that a view just got may lack them."""
    monkeypatch.setattr(gather, "FRESH_SECONDS", DEADLINE)
    substrate = LiveSubstrate(world)
    operate(substrate, lambda: trains(world))

    async def asked(exit_code: int | None) -> frozenset[str]:
        agents = Asking(replace(SETTINGS, view_seconds=DEADLINE), lambda _key: None)
        talk = agents.begin(KEY, "u", TOKEN)
        server = world.cells["server-1-1"]
        last = Report("worker-0-1", 1, "Left")
        server.publish(1, server.wait(0, 0.0).own, {"worker-0-1": (time.monotonic() + 60, last)})
        pods = tuple(world.pods.values())
        await agents.look(talk, reachable(world.job, pods))
        pods = tuple(replace(p, exit_code=exit_code) if "worker-0" in p.name else p for p in pods)
        agents.asked = frozenset()
        await observe(world.job, pods, talk, agents)
        assert talk.members == 5, "so many a view may tell of"
        await agents.close()
        return agents.asked

    assert {"server-0-1", "server-1-1", "server-2-1"} <= asyncio.run(asked(0))
    assert not asyncio.run(asked(None))


def test_news_is_what_a_decision_may_turn_on() -> None:
    old = View(1, 3, Report("server-0-1", 3, "Ready", step=5))
    assert not news(old, View(2, 3, Report("server-0-1", 3, "Ready", step=6, applied=9)))
    assert news(old, View(2, 4, Report("server-0-1", 4, "Ready", step=5)))
    assert news(old, View(2, 3, old.own, {"worker-0-1": (0.0, Report("worker-0-1", 3, "Left"))}))
