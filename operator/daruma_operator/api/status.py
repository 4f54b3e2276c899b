"""status of a TrainingJob: what is so, what it cost, and all that the operator needs to go on."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from daruma_operator.api.model import StatusModel
from daruma_trainer.contract import Role, member_id


class Phase(StrEnum):
    """Where a job stands."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class RollbackStatus(StatusModel):
    """Which cut all members went back to; generation 0: none yet."""

    generation: int = 0
    cut: str | None = None


class MemberStatus(StatusModel):
    """One incarnation that counts."""

    role: Role
    index: int
    incarnation: int
    pod: str
    """Of its own; or another server's, which took it in (Adopt)."""
    address: str | None = None
    node: str | None = None
    """Where its pod runs, once it has an address."""

    @property
    def guest(self) -> bool:
        """Whether it lives in another server's pod."""
        return not self.pod.endswith(f"-{member_id(self.role, self.index, self.incarnation)}")


class Ready(StatusModel):
    """How many of a role are ready."""

    ready: int = 0
    total: int = 0
    text: str = ""


class WorkersReady(Ready):
    """And how many ended well."""

    succeeded: int = 0
    succeeded_indexes: str = ""
    """Comma-separated, ascending."""


class Counted(StatusModel):
    """One loss that counts towards runPolicy.backoffLimit."""

    role: Role
    at: datetime


class Restarts(StatusModel):
    """Members made anew; `disruptions` were the cluster's doing and never count."""

    servers: int = 0
    workers: int = 0
    jobs: int = 0
    disruptions: int = 0
    counted: tuple[Counted, ...] = ()


class Progress(StatusModel):
    """How far training is; refreshed at most every 10 s."""

    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    steps_per_second: float | None = None
    eta_seconds: float | None = None
    goodput: float | None = None
    """Fraction of the time since it began in which no recovery went on."""
    updated_at: datetime | None = None


class CheckpointStatus(StatusModel):
    """The newest save."""

    cut: str | None = None
    step: int = 0
    saved_at: datetime | None = None
    bytes: int = 0
    distance: float | None = None


class Result(StatusModel):
    """What the job made."""

    uri: str
    step: int = 0
    bytes: int = 0


class Failure(StatusModel):
    """The last member that was lost."""

    role: Role | None = None
    index: int | None = None
    pod: str | None = None
    node: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    message: str | None = None
    time: datetime | None = None


class Phases(StatusModel):
    """Seconds from the failure to the first new step; they add up to `seconds`."""

    detect: float | None = None
    replace: float | None = None
    restore: float | None = None
    resume: float | None = None


class DeltaNorm(StatusModel):
    """The distance (L2) between the lost state and the restored one."""

    value: float | None = None
    kind: str = "Unknown"
    """Exact | UpperBound | Unknown."""


class Rework(StatusModel):
    """Steps done again (only FullCheckpoint has them); estimated: an interval, or null."""

    redone_steps: int = 0
    estimated: tuple[float, float] | None = None
    """Iterations that the perturbation costs, if training converges geometrically; null: it does
    not, or too little is known."""
    counterfactual_steps: int | None = None
    """What a rollback to a full checkpoint, taken every C steps, would have redone."""


class Pushes(StatusModel):
    """What became of pushes that did not simply arrive; in batches, of one recovery or of all."""

    lost: int = 0
    """Some slot has them no more, and nobody can give them again."""
    replayed: int = 0
    skipped: int = 0
    """Nobody made them: a worker's seat was vacant, and the others went on (minReplicas)."""
    mixed: int = 0
    """Made by a worker's replacement of values of two steps (Sync): nobody had those of one."""

    def plus(self, other: "Pushes") -> "Pushes":
        """Return the sum."""
        return Pushes(
            lost=self.lost + other.lost,
            replayed=self.replayed + other.replayed,
            skipped=self.skipped + other.skipped,
            mixed=self.mixed + other.mixed,
        )

    def since(self, base: "Pushes") -> "Pushes":
        """Return what was added to `base`; a rollback may have taken something away."""
        return Pushes(
            lost=max(0, self.lost - base.lost),
            replayed=max(0, self.replayed - base.replayed),
            skipped=max(0, self.skipped - base.skipped),
            mixed=max(0, self.mixed - base.mixed),
        )


class Loss(StatusModel):
    """One member that was lost."""

    role: Role
    index: int
    incarnation: int
    pod: str
    epoch: int = 0
    at: datetime | None = None
    reason: str = ""


class RecoveryRecord(StatusModel):
    """One recovery, in progress or ended."""

    id: int = 0
    epoch: int = 0
    cause: str = ""
    """ServerLost | WorkerLost | AllPodsLost | HandBack (no loss: adopted slots return)."""
    role: Role | None = None
    indexes: tuple[int, ...] = ()
    strategy: str = ""
    rung: int = 0
    placement: str = "Replace"
    reason: str = ""
    started_at: datetime | None = None
    seconds: float | None = None
    phases: Phases = Field(default_factory=Phases)
    sources: dict[str, int] = Field(default_factory=dict)
    """Restored slots by where their parameters came from."""
    moments: dict[str, int] = Field(default_factory=dict)
    """The same by where their optimizer's state came from, where there is any; reset: nowhere."""
    bytes: int = 0
    delta_norm: DeltaNorm = Field(default_factory=DeltaNorm)
    rework: Rework = Field(default_factory=Rework)
    pushes: Pushes = Field(default_factory=Pushes)
    utilisation: float | None = None
    """Of the time without a server, the part in which the programs computed; the worst worker's."""
    gap: float | None = None
    """The largest bound on the distance (L2) between the parameters that a worker computed with and
    the true ones, because of pushes that waited."""
    outcome: str | None = None
    losses: tuple[Loss, ...] = ()
    stage_since: datetime | None = None
    """When the present rung began: what its deadlines count from."""
    estimated: bool = False
    """No member saw the failure: it began when the operator first knew."""
    base: Pushes = Field(default_factory=Pushes)
    """The job's counts when it began."""
    step: int = 0
    """The job's step when it began."""
    planned_epoch: int = 0
    """The epoch in which the plan was announced; restores are sent in that one alone."""
    silent: tuple[str, ...] = ()
    """Workers that did not say what they hold in time."""


class Condition(StatusModel):
    """As in Kubernetes."""

    type: str
    status: str = "False"
    reason: str = ""
    message: str = ""
    last_transition_time: datetime | None = None


class TrainingJobStatus(StatusModel):
    """Written once a pass, before anything is done."""

    observed_generation: int | None = None
    phase: Phase | None = None
    phase_since: datetime | None = None
    reason: str = ""
    message: str = ""
    start_time: datetime | None = None
    completion_time: datetime | None = None
    epoch: int = 0
    initialised: bool = False
    rollback: RollbackStatus = Field(default_factory=RollbackStatus)
    members: tuple[MemberStatus, ...] = ()
    returning: tuple[MemberStatus, ...] = ()
    """New pods for servers that live in others' pods (Adopt), until they take their slots back."""
    handing: tuple[MemberStatus, ...] = ()
    """Servers that hand their slots over, until their successors have them."""
    replicas: tuple[MemberStatus, ...] = ()
    """Servers' replicas, in other servers' pods (Chain, copies)."""
    replica_ended_at: datetime | None = None
    """When a replica ended last whose host goes on: others are made a while later."""
    servers: Ready = Field(default_factory=Ready)
    workers: WorkersReady = Field(default_factory=WorkersReady)
    restarts: Restarts = Field(default_factory=Restarts)
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    result: Result | None = None
    pushes: Pushes = Field(default_factory=Pushes)
    """Of the whole job so far."""
    gone: Pushes = Field(default_factory=Pushes)
    """Of those, what workers had counted that were lost since."""
    gone_lost: dict[str, str] = Field(default_factory=dict)
    """By worker index, which batches those lives had counted as lost: another server may lose them
    once more, and the life that follows then counts them, too."""
    gone_skipped: dict[str, str] = Field(default_factory=dict)
    """The same of batches that those lives skipped: a rollback may have them made again."""
    last_failure: Failure | None = None
    recovery: RecoveryRecord | None = None
    recoveries: tuple[RecoveryRecord, ...] = ()
    outage_seconds: float = 0.0
    """Of all recoveries together, also of those that `recoveries` no longer lists."""
    conditions: tuple[Condition, ...] = ()
