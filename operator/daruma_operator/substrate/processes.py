"""Members as processes of this machine: the substrate of `daruma run`.

One job, kept in memory. A folder holds what outlives the run: `logs/<pod>.log`, `store/` (the
claim of `file://` stores) and, while it runs, `token` and `members.json`. Called from one event
loop, in the main thread of its process.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.errors import EnvironmentLacksError
from daruma_operator.substrate.child import Child
from daruma_operator.substrate.forkserver import ForkServer
from daruma_operator.substrate.ports import Ports
from daruma_operator.substrate.protocol import (
    Event,
    JobKey,
    PodFacts,
    PodPlan,
    PodState,
    StatusConflict,
)
from daruma_trainer.contract import (
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_JOB,
    ENV_LISTEN,
    ENV_NAMESPACE,
    ENV_ROLE,
    ENV_TOKEN_FILE,
    Role,
    token_for,
)

HOST = "127.0.0.1"
_NOT_FOUND, _NOT_STARTED = 127, 126
"""Exit codes of what could not be started, as shells give them."""
_TERMINATED = 128 + signal.SIGTERM
"""Exit code of what ended because of SIGTERM."""
WORKERS_NICE = 10
"""Workers compute without end, and cannot go on without a server: one that starts or restores comes
first. Measured on 2 cores: without this a replacement took twice as long to start."""
_PYTHONS = ("python", "python3")


@dataclass(slots=True)
class _Pod:
    facts: PodFacts
    child: Child | None
    """None: it could not be started."""
    leaves: bool = False
    """It was told to leave the job."""


class ProcessSubstrate:
    """Implements `substrate.protocol.Substrate` for one job.

    `changed` is called with the job's key at once when a member ends or is gone; `told` gets every
    event. `environment` is what members inherit.
    """

    def __init__(
        self, job: TrainingJob, out: Path, environment: Mapping[str, str], ports: Ports
    ) -> None:
        self._out = out.absolute()
        self._job = _with_store(job, self._out)
        self._key = JobKey(job.namespace, job.name)
        self._environment = environment
        self._ports = ports
        self._pods: dict[str, _Pod] = {}
        self._token = token_for(secrets.token_bytes(32), job.uid)
        self._starting: set[str] = set()
        self._forkserver: ForkServer | None = None
        self.changed: Callable[[JobKey], None] = lambda _key: None
        self.told: Callable[[Event], None] = lambda _event: None

    def open(self) -> None:
        """Make the folder's contents. OSError: it cannot be written."""
        logs = self._out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.glob("*.log"):
            old.unlink()
        (self._out / "store").mkdir(exist_ok=True)
        self._token_file.unlink(missing_ok=True)
        self._members_file.unlink(missing_ok=True)
        descriptor = os.open(self._token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._token)
        if sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):
                self._forkserver = ForkServer(self._shared_environment(threads=1))

    async def close(self, grace_seconds: float) -> None:
        """End what still runs and return once nothing does; repeats are harmless."""
        if self._forkserver is not None:
            self._forkserver.close()
            self._forkserver = None
        children = [p.child for p in self._pods.values() if p.child is not None]
        for child in children:
            child.end(grace_seconds)
        await asyncio.gather(*(child.wait(grace_seconds + 5.0) for child in children))
        self._token_file.unlink(missing_ok=True)
        self._members_file.unlink(missing_ok=True)
        self._members_file.with_suffix(".new").unlink(missing_ok=True)
        self._ports.close()

    def kill(self, role: Role, index: int) -> PodFacts | None:
        """SIGKILL the newest running member of this index, as a failure would; None: none runs."""
        pods = [
            p
            for p in self._pods.values()
            if (p.facts.role, p.facts.index) == (role, index)
            and p.facts.state is PodState.RUNNING
            and not p.facts.deleting
        ]
        if not pods:
            return None
        pod = max(pods, key=lambda p: p.facts.incarnation)
        if pod.child is not None:
            pod.child.send(signal.SIGKILL)
        return pod.facts

    def terminate_workers(self) -> bool:
        """SIGTERM to all workers: leave the job, and count as done. False: none runs."""
        found = False
        for pod in self._pods.values():
            if pod.child and pod.child.exit_code is None and pod.facts.role is Role.WORKER:
                found = pod.leaves = True
                pod.child.send(signal.SIGTERM)
        return found

    @property
    def job(self) -> TrainingJob:
        """The job as last written."""
        return self._job

    async def list_jobs(self) -> Sequence[JobKey]:
        """See the Protocol."""
        return [self._key]

    async def read_job(self, key: JobKey) -> TrainingJob | None:
        """See the Protocol."""
        return self._job if key == self._key else None

    async def list_pods(self, job: TrainingJob) -> Sequence[PodFacts]:
        """See the Protocol."""
        return [p.facts for p in self._pods.values()] if job.uid == self._job.uid else []

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """See the Protocol."""
        now = self._job
        if (now.uid, now.resource_version) != (job.uid, job.resource_version):
            raise StatusConflict
        version = str(int(now.resource_version or "0") + 1)
        self._job = now.model_copy(update={"status": status, "resource_version": version})
        return self._job

    async def token(self, job: TrainingJob) -> str:
        """See the Protocol."""
        del job
        return self._token

    async def equip(self, job: TrainingJob) -> None:
        """See the Protocol: nothing removes it from this folder."""
        del job

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        """See the Protocol. What cannot be started becomes a pod that terminated."""
        if plan.name in self._pods or plan.name in self._starting or job.uid != self._job.uid:
            return
        facts = PodFacts(
            plan.name,
            f"{plan.name}-{secrets.token_hex(4)}",
            plan.role,
            plan.index,
            plan.incarnation,
            PodState.RUNNING,
            created_at=datetime.now(UTC),
        )
        try:
            address = f"{HOST}:{self._ports.take()}"
            self._starting.add(plan.name)
            child = await self._start(job, plan, address)
        except (OSError, ValueError, EnvironmentLacksError) as error:
            self._pods[plan.name] = _Pod(_not_started(facts, error), None)
        else:
            self._pods[plan.name] = _Pod(replace(facts, address=address), child)
            self._show_members()
        finally:
            self._starting.discard(plan.name)
        self.changed(self._key)

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        """See the Protocol."""
        del job
        pod = self._pods.get(name)
        if pod is None or pod.facts.uid != uid:
            return
        if pod.child is None or pod.child.exit_code is not None:
            del self._pods[name]
            self.changed(self._key)
            return
        pod.facts = replace(pod.facts, deleting=True)
        pod.child.end(grace_seconds)

    async def emit(self, job: TrainingJob, event: Event) -> None:
        """See the Protocol."""
        del job
        self.told(event)

    def store_uri(self, job: TrainingJob) -> str | None:
        """See the Protocol; the job's spec names the folder itself."""
        return job.spec.checkpoint.store

    @property
    def _token_file(self) -> Path:
        return self._out / "token"

    @property
    def _members_file(self) -> Path:
        return self._out / "members.json"

    def _show_members(self) -> None:
        """Say which process is which member, for those who look at them or kill them."""
        members = [
            {"pod": pod.facts.name, "role": pod.facts.role, "index": pod.facts.index,
             "incarnation": pod.facts.incarnation, "pid": pod.child.pid,
             "address": pod.facts.address}
            for pod in self._pods.values()
            if pod.child is not None and pod.child.exit_code is None
        ]  # fmt: skip
        new = self._members_file.with_suffix(".new")
        # The disk may be full; the job can do without.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(members, indent=1))
            new.replace(self._members_file)

    def _ended(self, name: str) -> None:
        pod = self._pods.get(name)
        if pod is None or pod.child is None:
            return
        if pod.facts.deleting:
            del self._pods[name]
        else:
            code, reason = pod.child.exit_code, pod.child.reason
            if pod.leaves and code == _TERMINATED:
                code, reason = 0, "Completed"
            pod.facts = replace(
                pod.facts,
                state=PodState.TERMINATED,
                exit_code=code,
                reason=reason,
                message=pod.child.message() if code else None,
            )
        self._show_members()
        self.changed(self._key)

    async def _start(self, job: TrainingJob, plan: PodPlan, address: str) -> Child:
        log = self._out / "logs" / f"{plan.name}.log"
        own = {
            ENV_ROLE: plan.role.value,
            ENV_INDEX: str(plan.index),
            ENV_INCARNATION: str(plan.incarnation),
            ENV_LISTEN: address,
        }

        def ended(_child: Child) -> None:
            self._ended(plan.name)

        if plan.role is Role.WORKER:
            # Workers share this machine; torch would give each a thread a core.
            threads = max(1, (os.cpu_count() or 1) // job.spec.workers.replicas)
            # A Secret's value (valueFrom) is what the environment here says it is.
            given = {v.name: v.value for v in job.spec.program.env if v.value is not None}
            environment = self._shared_environment(threads, given) | own
            return Child.start(program_command(job), environment, log, ended, WORKERS_NICE)
        if self._forkserver is not None:
            with log.open("wb") as out:
                pid = await self._forkserver.start(own, out.fileno())
            if pid is not None:
                return Child.forked(pid, log, ended)
        command = [sys.executable, "-m", "daruma_trainer.server"]
        return Child.start(command, self._shared_environment(threads=1) | own, log, ended)

    def _shared_environment(
        self, threads: int, program: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Return what members have in common; who they are, no program's variable may say."""
        return {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            **self._environment,
            **(program or {}),
            ENV_NAMESPACE: self._key.namespace,
            ENV_JOB: self._key.name,
            ENV_TOKEN_FILE: str(self._token_file),
        }


def _with_store(job: TrainingJob, out: Path) -> TrainingJob:
    """Let the spec name the folder here, so that what the job says of its result is true here.

    A store elsewhere is what it is, with the credentials of who runs this.
    """
    checkpoint = job.spec.checkpoint
    if checkpoint.store is not None and not checkpoint.store.startswith("file://"):
        return job
    path = urlsplit(checkpoint.store or "file:///").path.strip("/")
    store = checkpoint.model_copy(update={"store": f"file://{out / 'store' / path}"})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoint": store})})


def program_command(job: TrainingJob) -> list[str]:
    """Return what a worker runs here; `python` means the one that runs this.

    EnvironmentLacksError: there is no such program.
    """
    command = [*job.spec.program.command, *job.spec.program.args]
    if command[0] in _PYTHONS:
        return [sys.executable, *command[1:]]
    if shutil.which(command[0]) is None:
        raise EnvironmentLacksError(
            f"spec.program.command: no program {command[0]!r} on this machine: install it, put "
            "its folder on PATH, or name its path"
        )
    return command


def _not_started(facts: PodFacts, error: Exception) -> PodFacts:
    missing = isinstance(error, FileNotFoundError)
    return replace(
        facts,
        state=PodState.TERMINATED,
        exit_code=_NOT_FOUND if missing else _NOT_STARTED,
        reason="StartError",
        message=str(error),
    )
