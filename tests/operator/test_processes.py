"""The processes substrate: facts, idempotence, conflicts, and that nothing is left behind."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import parse_manifest
from daruma_operator.api.spec import EnvVar
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.errors import EnvironmentLacksError
from daruma_operator.substrate.ports import Ports
from daruma_operator.substrate.processes import HOST, ProcessSubstrate, program_command
from daruma_operator.substrate.protocol import (
    JobKey,
    PodFacts,
    PodPlan,
    PodState,
    StatusConflict,
    Substrate,
)
from daruma_trainer.contract import Role

DEADLINE = 60.0
ECHO = 'echo "$DARUMA_ROLE $DARUMA_INDEX $DARUMA_INCARNATION $COLOUR"; cat "$DARUMA_TOKEN_FILE"'


def job_of(script: str, program: str = "sh") -> TrainingJob:
    text = f"""
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: toy}}
spec:
  program:
    image: none
    command: [{program}, -c]
    args: ['{script}']
    env: [{{name: COLOUR, value: red}}, {{name: DARUMA_ROLE, value: Server}}]
  checkpoint: {{store: "file:///a/b"}}
"""
    job = parse_manifest(text, "toy.yaml", local=True)
    return job.model_copy(update={"uid": "u1", "resource_version": "1"})


class Story:
    """A substrate with one job, and a wait for what pods become."""

    def __init__(self, job: TrainingJob, out: Path) -> None:
        self.job = job
        environment = {"PATH": "/usr/bin:/bin"}
        self.substrate = ProcessSubstrate(job, out, environment, Ports(HOST))
        self.changed = asyncio.Event()
        self.keys: list[JobKey] = []
        self.substrate.changed = self._note
        self.substrate.open()

    def _note(self, key: JobKey) -> None:
        self.keys.append(key)
        self.changed.set()

    async def pods(self) -> list[PodFacts]:
        return list(await self.substrate.list_pods(self.job))

    async def until(self, found: Callable[[list[PodFacts]], bool]) -> list[PodFacts]:
        async with asyncio.timeout(DEADLINE):
            while True:
                self.changed.clear()
                pods = await self.pods()
                if found(pods):
                    return pods
                await self.changed.wait()


def tell(job: TrainingJob, out: Path, story: Callable[[Story], Awaitable[None]]) -> None:
    async def told() -> None:
        it = Story(job, out)
        try:
            await story(it)
        finally:
            await it.substrate.close(0.0)

    asyncio.run(told())


def plan(incarnation: int = 1, role: Role = Role.WORKER) -> PodPlan:
    return PodPlan(f"toy-{role.lower()}-0-{incarnation}", role, 0, incarnation)


def ended(pods: list[PodFacts]) -> bool:
    return bool(pods) and all(p.state is PodState.TERMINATED for p in pods)


def test_it_keeps_the_protocol(tmp_path: Path) -> None:
    substrate: Substrate = ProcessSubstrate(job_of("true"), tmp_path, {}, Ports(HOST))
    assert asyncio.run(substrate.list_jobs()) == [JobKey("default", "toy")]


def test_who_runs_can_be_read(tmp_path: Path) -> None:
    shown = tmp_path / "members.json"

    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        (found,) = json.loads(shown.read_text())
        (pod,) = await it.pods()
        assert (found["pod"], found["address"]) == (pod.name, pod.address)
        assert (found["role"], found["index"], found["incarnation"]) == ("Worker", 0, 1)
        assert Path(f"/proc/{found['pid']}").exists()
        os.kill(found["pid"], signal.SIGKILL)
        await it.until(ended)
        assert json.loads(shown.read_text()) == []

    tell(job_of("sleep 600"), tmp_path, story)
    assert not shown.exists()


@pytest.mark.parametrize(
    ("asked", "code", "reason"), [(True, 0, "Completed"), (False, 143, "Error")]
)
def test_a_worker_that_ends_when_told_to_is_done_only_where_that_was_asked_here(
    tmp_path: Path, *, asked: bool, code: int, reason: str
) -> None:
    async def story(it: Story) -> None:
        assert not it.substrate.terminate_workers(), "none runs yet"
        await it.substrate.create_pod(it.job, plan())
        (found,) = json.loads((tmp_path / "members.json").read_text())
        if asked:
            assert it.substrate.terminate_workers()
        else:
            os.kill(found["pid"], signal.SIGTERM)
        (pod,) = await it.until(ended)
        assert (pod.exit_code, pod.reason) == (code, reason)

    tell(job_of("exec sleep 600"), tmp_path, story)


def test_a_server_starts_without_the_process_that_forks_them(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        assert it.substrate._forkserver is not None
        it.substrate._forkserver.close()
        await it.substrate.create_pod(it.job, plan(role=Role.SERVER))
        log = tmp_path / "logs" / "toy-server-0-1.log"
        async with asyncio.timeout(DEADLINE):
            while "listens on" not in log.read_text():
                await asyncio.sleep(0.01)

    tell(job_of("true"), tmp_path, story)


def test_the_store_lies_in_the_folder_of_the_run(tmp_path: Path) -> None:
    substrate = ProcessSubstrate(job_of("true"), tmp_path, {}, Ports(HOST))
    assert substrate.store_uri(substrate.job) == f"file://{tmp_path}/store/a/b"


def test_a_bucket_is_used_as_it_is(tmp_path: Path) -> None:
    job = job_of("true")
    point = job.spec.checkpoint.model_copy(update={"store": "s3://bucket/folder"})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoint": point})})
    substrate = ProcessSubstrate(job, tmp_path, {}, Ports(HOST))
    assert substrate.store_uri(substrate.job) == "s3://bucket/folder"


def test_a_pod_runs_with_its_environment_and_ends(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        assert (await it.pods())[0].address is not None
        (pod,) = await it.until(ended)
        assert (pod.exit_code, pod.reason, pod.message) == (0, "Completed", None)
        said = (tmp_path / "logs" / f"{pod.name}.log").read_text().splitlines()
        assert said == ["Worker 0 1 red", await it.substrate.token(it.job)]
        assert it.keys == [JobKey("default", "toy")] * 2

    tell(job_of(ECHO), tmp_path, story)
    assert not (tmp_path / "token").exists()


def test_a_variable_that_no_process_can_have_is_a_pod_that_ended(tmp_path: Path) -> None:
    job = job_of("true")
    program = job.spec.program.model_copy(update={"env": (EnvVar(name="A", value="\0"),)})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"program": program})})

    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        (pod,) = await it.until(ended)
        assert (pod.exit_code, pod.reason, pod.message) == (126, "StartError", "embedded null byte")

    tell(job, tmp_path, story)


def test_the_token_is_for_the_owner_alone(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600

    tell(job_of("true"), tmp_path, story)


def test_the_same_plan_twice_makes_one_pod(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        (first,) = await it.pods()
        await it.substrate.create_pod(it.job, plan())
        assert [p.uid for p in await it.pods()] == [first.uid]

    tell(job_of("sleep 60"), tmp_path, story)


def test_a_failure_says_why(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        (pod,) = await it.until(ended)
        assert (pod.exit_code, pod.reason, pod.message) == (3, "Error", "no sklearn")

    tell(job_of("echo no sklearn >&2; exit 3"), tmp_path, story)


def test_what_cannot_be_started_is_a_pod_that_ended(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        (tmp_path / "logs").rmdir()
        await it.substrate.create_pod(it.job, plan())
        (pod,) = await it.until(ended)
        assert (pod.exit_code, pod.reason) == (127, "StartError")
        await it.substrate.delete_pod(it.job, pod.name, pod.uid, 0.0)
        assert await it.pods() == []

    tell(job_of("true"), tmp_path, story)


def test_kill_is_seen_as_a_failure_and_takes_the_newest(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan(1))
        await it.substrate.create_pod(it.job, plan(2))
        killed = it.substrate.kill(Role.WORKER, 0)
        assert killed is not None
        assert killed.incarnation == 2
        pods = await it.until(lambda pods: any(p.exit_code == 137 for p in pods))
        assert [p.state for p in pods] == [PodState.RUNNING, PodState.TERMINATED]
        assert it.substrate.kill(Role.WORKER, 1) is None

    tell(job_of("sleep 60"), tmp_path, story)


def test_a_deleted_pod_goes_and_another_uid_is_left_alone(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        await it.substrate.create_pod(it.job, plan())
        (pod,) = await it.pods()
        await it.substrate.delete_pod(it.job, pod.name, "another", 0.0)
        assert not (await it.pods())[0].deleting
        await it.substrate.delete_pod(it.job, pod.name, pod.uid, 5.0)
        assert (await it.pods())[0].deleting
        await it.until(lambda pods: not pods)
        await it.substrate.delete_pod(it.job, pod.name, pod.uid, 5.0)

    tell(job_of("sleep 60"), tmp_path, story)


def test_the_second_of_two_writers_loses(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        first = await it.substrate.write_status(it.job, TrainingJobStatus(epoch=1))
        with pytest.raises(StatusConflict):
            await it.substrate.write_status(it.job, TrainingJobStatus(epoch=9))
        await it.substrate.write_status(first, TrainingJobStatus(epoch=2))
        assert it.substrate.job.status.epoch == 2

    tell(job_of("true"), tmp_path, story)


def test_logs_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "toy-worker-0-7.log").write_text("old")

    async def story(it: Story) -> None:
        assert list((tmp_path / "logs").iterdir()) == []

    tell(job_of("true"), tmp_path, story)


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(EnvironmentLacksError, match="no program 'no-such-thing'"):
        program_command(job_of("true", program="no-such-thing"))


def test_ports_are_given_once_and_taken_ones_are_skipped() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = Ports(HOST, port - 1)
        with pytest.raises(
            EnvironmentLacksError, match=f"port ({port - 1}|{port}) of {HOST} is taken"
        ):
            ports.check(1)
        first, second = ports.take(), ports.take()
        ports.close()
    assert port < first
    assert second >= first + 2


def test_two_runs_at_once_get_ports_of_their_own() -> None:
    """Nothing listens on them yet, so only the other's claim can keep them apart."""
    one, other = Ports(HOST, 31_000), Ports(HOST, 31_000)
    first, second, third = one.take(), other.take(), other.take()
    assert len({first, second, third}) == 3
    one.close()
    again = Ports(HOST, first)
    assert again.take() == first
    again.close()
    other.close()
