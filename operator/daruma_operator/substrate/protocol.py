"""The place where members are made: pods of a cluster, or processes of this machine.

The controller sees only this Protocol. Every verb may be repeated: creating what exists and
deleting what is gone are no errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import TrainingJobStatus
from daruma_trainer.contract import Role


@dataclass(frozen=True, slots=True, order=True)
class JobKey:
    """Names a job; what the work queue holds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class PodState(StrEnum):
    """The few states a decision rests on."""

    WAITING = "Waiting"
    """Its container does not run yet: unscheduled, pulling, creating."""
    RUNNING = "Running"
    TERMINATED = "Terminated"
    """Its container `daruma` ended, or the pod Failed. A container's state counts, not a phase."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What is known of one pod or process of a job."""

    name: str
    uid: str
    role: Role
    index: int
    incarnation: int
    state: PodState
    address: str | None = None
    """`host:port` of its data port, once it has one."""
    node: str | None = None
    deleting: bool = False
    created_at: datetime | None = None
    exit_code: int | None = None
    reason: str | None = None
    """Waiting: why (ImagePullBackOff, Unschedulable). Terminated: OOMKilled, Error, Completed, …"""
    message: str | None = None
    disrupted: bool = False
    """The cluster took it (preemption, eviction, drain); such a loss never counts as a failure."""


@dataclass(frozen=True, slots=True)
class PodPlan:
    """A pod to be made. Its name holds the incarnation, so making it twice makes it once."""

    name: str
    role: Role
    index: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Event:
    """For people. Named for job, reason, epoch (and member), so that repeats collapse."""

    reason: str
    message: str
    epoch: int
    warning: bool = False
    member: str | None = None
    """`server-1` where a pod is meant."""


class StatusConflict(Exception):  # noqa: N818 - an outcome, not a fault
    """The status changed since it was read: throw the pass away and look again."""


class Substrate(Protocol):
    """Where jobs and their members live."""

    async def list_jobs(self) -> Sequence[JobKey]:
        """Return every job there is, for the periodic repair."""

    async def read_job(self, key: JobKey) -> TrainingJob | None:
        """Return the job as it is now (never from a cache), or None if it is gone.

        A spec that this version cannot read is told to people, and the last one holds that it
        could; UnreadableJobError where there is none, or where the status cannot be read.
        """

    async def list_pods(self, job: TrainingJob) -> Sequence[PodFacts]:
        """Return all pods of the job, ended and terminating ones too."""

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """Replace the status if nobody changed the job since `job` was read.

        Raises StatusConflict otherwise; returns the job as written.
        """

    async def token(self, job: TrainingJob) -> str:
        """Return the job's token."""

    async def equip(self, job: TrainingJob) -> None:
        """Make sure that new pods find the job's token: somebody may have removed it since."""

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        """Make a pod; the same plan twice makes one."""

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        """End and remove the pod of this uid; another of the same name is left alone."""

    async def emit(self, job: TrainingJob, event: Event) -> None:
        """Tell people. Best effort: a failure is logged, never raised."""

    def store_uri(self, job: TrainingJob) -> str | None:
        """Return spec.checkpoint.store as the job's members see it."""
