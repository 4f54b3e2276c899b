"""The benchmarks' substrate that keeps members away: a pod that waits, then one that runs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import parse_manifest
from daruma_operator.substrate.ports import Ports
from daruma_operator.substrate.processes import HOST
from daruma_operator.substrate.protocol import PodPlan, PodState, Substrate
from daruma_trainer.bench.holding import HeldSubstrate, hold, release
from daruma_trainer.contract import Role
from left_behind import left_by

DEADLINE = 30.0
PLAN = PodPlan("toy-worker-1-3", Role.WORKER, 1, 3)
MANIFEST = """
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec:
  program: {image: none, command: [sleep, "600"]}
  workers: {replicas: 2}
"""


def tell(out: Path, story: Callable[[HeldSubstrate, TrainingJob], Awaitable[None]]) -> None:
    job = parse_manifest(MANIFEST, "toy.yaml", local=True)
    job = job.model_copy(update={"uid": "u1", "resource_version": "1"})

    async def told() -> None:
        substrate = HeldSubstrate(job, out, {"PATH": "/usr/bin:/bin"}, Ports(HOST))
        substrate.open()
        try:
            await story(substrate, job)
        finally:
            await substrate.close(0.0)

    asyncio.run(told())
    assert left_by(out) == []


def test_a_held_member_waits_for_a_place_and_then_runs(tmp_path: Path) -> None:
    async def story(substrate: HeldSubstrate, job: TrainingJob) -> None:
        checked: Substrate = substrate
        changed = asyncio.Event()
        substrate.changed = lambda _key: changed.set()
        hold(tmp_path, Role.WORKER, 1)
        await checked.create_pod(job, PLAN)
        await checked.create_pod(job, PLAN)
        (pod,) = await checked.list_pods(job)
        assert (pod.name, pod.state, pod.address) == (PLAN.name, PodState.WAITING, None)
        release(tmp_path, Role.WORKER, 1)
        async with asyncio.timeout(DEADLINE):
            await changed.wait()
        (pod,) = await checked.list_pods(job)
        assert (pod.name, pod.state) == (PLAN.name, PodState.RUNNING)

    tell(tmp_path, story)


def test_another_member_is_made_at_once(tmp_path: Path) -> None:
    async def story(substrate: HeldSubstrate, job: TrainingJob) -> None:
        hold(tmp_path, Role.WORKER, 0)
        hold(tmp_path, Role.SERVER, 1)
        await substrate.create_pod(job, PLAN)
        assert [p.state for p in await substrate.list_pods(job)] == [PodState.RUNNING]

    tell(tmp_path, story)


def test_one_that_waits_can_be_deleted_and_never_runs(tmp_path: Path) -> None:
    async def story(substrate: HeldSubstrate, job: TrainingJob) -> None:
        hold(tmp_path, Role.WORKER, 1)
        await substrate.create_pod(job, PLAN)
        (pod,) = await substrate.list_pods(job)
        await substrate.delete_pod(job, pod.name, "of another life", 0.0)
        assert len(await substrate.list_pods(job)) == 1
        await substrate.delete_pod(job, pod.name, pod.uid, 0.0)
        assert await substrate.list_pods(job) == []
        release(tmp_path, Role.WORKER, 1)
        await asyncio.sleep(0)  # what was cancelled hears of it now
        assert await substrate.list_pods(job) == []

    tell(tmp_path, story)


def test_one_that_waits_at_the_end_is_not_started(tmp_path: Path) -> None:
    async def story(substrate: HeldSubstrate, job: TrainingJob) -> None:
        hold(tmp_path, Role.WORKER, 1)
        await substrate.create_pod(job, PLAN)

    tell(tmp_path, story)
