"""spec of a TrainingJob: each field with meaning, default and limit; the CRD takes them over."""

import re
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field

from daruma_operator.api.model import Seconds, SpecModel, cel, free, rule
from daruma_operator.api.rules import (
    EVERY_NEEDS_NONE,
    NEEDS_CLAIM,
    NEEDS_EVERY,
    NEEDS_STORE,
    NO_ANY,
    NO_CHAIN,
    NO_CLAIM,
    NO_COPIES,
    NO_REF,
    NO_TWICE,
    NOT_BOUNDED,
    OF_A_CHANGE,
    OF_A_JOB,
    STORE_FORM,
    TOO_FEW_SERVERS,
    TOO_MANY,
    TOO_OFTEN,
)

MAX_REPLICAS = 1000
STORE_PATTERN = (
    "^(file:///([^/.?#][^/?#]*(/[^/.?#][^/?#]*)*/?)?|(s3|gs|az)://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"
    "(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*/?)$"
)


class ConsistencyMode(StrEnum):
    """How workers wait for each other."""

    ASYNC = "Async"
    SYNC = "Sync"
    BOUNDED = "Bounded"


class SelectionMode(StrEnum):
    """Which blocks a partial save takes."""

    PRIORITY = "Priority"
    ROUND_ROBIN = "RoundRobin"
    RANDOM = "Random"


class StrategyName(StrEnum):
    """How lost servers are recovered."""

    FULL_CHECKPOINT = "FullCheckpoint"
    PARTIAL = "Partial"
    CHAIN = "Chain"
    STATELESS = "Stateless"
    FRESHEST = "Freshest"


class Combine(StrEnum):
    """How gradients that could not be sent become one update."""

    AUTO = "Auto"
    SUM = "Sum"
    MEAN = "Mean"
    DROP = "Drop"


class CleanPodPolicy(StrEnum):
    """Which pods a finished job leaves."""

    ALL = "All"
    RUNNING = "Running"
    NONE = "None"


class EnvVar(SpecModel):
    """One environment variable of the program; as in a container's env."""

    name: str = Field(min_length=1, max_length=256, pattern="^[ -<>-~]+$")
    value: str | None = Field(default=None, max_length=65536)
    value_from: dict[str, Any] | None = Field(default=None, json_schema_extra=free())


class Program(SpecModel):
    """What the workers run."""

    image: str = Field(
        min_length=1,
        max_length=1024,
        description="Image of the workers, and of the servers unless servers.image names another.",
    )
    command: tuple[str, ...] = Field(
        min_length=1, max_length=64, description="The worker's command, e.g. [python, train.py]."
    )
    args: tuple[str, ...] = Field(default=(), max_length=256)
    env: tuple[EnvVar, ...] = Field(default=(), max_length=256)


class Servers(SpecModel):
    """The parameter servers."""

    replicas: int = Field(
        default=1, ge=1, le=256, description="Shards: each server holds one. Default 1."
    )
    image: str | None = Field(
        default=None,
        max_length=1024,
        description="Image of the servers, which need no torch. Default: program.image.",
    )
    resources: dict[str, Any] | None = Field(default=None, json_schema_extra=free())
    template: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra=free(),
        description="A PodTemplateSpec that is merged into the pods made; see the guide.",
    )


class Workers(SpecModel):
    """The workers."""

    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS, description="Default 1.")
    min_replicas: int = Field(
        default=1,
        ge=1,
        le=MAX_REPLICAS,
        description="After losses the job goes on, Degraded, with as few as these; under Sync and "
        "Bounded its steps are made without those that are lost. As many as replicas: nobody goes "
        "on before a lost worker is replaced, and no batch is skipped. Default 1.",
    )
    resources: dict[str, Any] | None = Field(default=None, json_schema_extra=free())
    template: dict[str, Any] | None = Field(default=None, json_schema_extra=free())


class Consistency(SpecModel):
    """How workers wait for each other."""

    mode: ConsistencyMode = Field(
        default=ConsistencyMode.ASYNC,
        description="Async: each push counts at once. Sync: one update a step, of all workers. "
        "Bounded: each push counts at once, and no worker is more than maxStaleness batches ahead.",
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Bounded: a batch is made of values that have all batches of all workers but "
        "the last so many before it.",
    )


class SecretRef(SpecModel):
    """Names a Secret of the job's namespace."""

    name: str = Field(min_length=1, max_length=253)


class Checkpoint(SpecModel):
    """What is saved, where and when."""

    store: str | None = Field(
        default=None,
        max_length=1024,
        description=(
            "Where saves lie: s3://bucket/folder, gs://bucket/folder, az://container/folder, or "
            "file:///path within the claim. Default: nothing is saved."
        ),
        json_schema_extra=cel(rule(f"self.matches('{STORE_PATTERN}')", STORE_FORM)),
    )
    claim_name: str | None = Field(
        default=None,
        max_length=253,
        description="A PersistentVolumeClaim that all servers share (ReadWriteMany).",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description=(
            "A Secret whose keys become environment variables of the servers, and of nobody else: "
            "credentials and endpoint of the store. Default: the servers' own identity."
        ),
    )
    every: int = Field(
        default=96, ge=0, le=1_000_000_000, description="C, in steps; 0: no periodic saves."
    )
    fraction: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="r: save this fraction of the bytes every r·C steps; 1: all, every C steps.",
        json_schema_extra=cel(
            rule(
                "self > 0.0 && self <= 1.0",
                "spec.checkpoint.fraction must be above 0 and at most 1",
            ),
        ),
    )
    selection: SelectionMode = Field(
        default=SelectionMode.PRIORITY,
        description="Priority: the blocks that changed most, for their size, first.",
    )
    keep: int = Field(default=2, ge=1, le=100, description="Saves kept of each kind.")
    final: bool = Field(
        default=True, description="Succeeded only once the result is durable; needs a store."
    )
    restore_from: str | None = Field(
        default=None, max_length=2048, description="status.result.uri of another job: a warm start."
    )


class Replay(SpecModel):
    """Limits of what a worker accumulates while a server is away."""

    # At most what the 16 bits that count a row's gradients hold.
    max_pending: int = Field(default=1000, ge=1, le=65_535, description="Batches.")
    max_age_seconds: Seconds = 600.0
    combine: Combine = Combine.AUTO
    trust: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Auto, SGD: a replay goes no farther than this × the way training went.",
    )
    max_gap: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="A worker waits where the bound on the distance (L2) between the parameters "
        "that it computes with and the true ones reaches this. Default: no limit.",
    )


class Ack(StrEnum):
    """How far a push has to have come before its worker may forget it."""

    NONE = "None"
    NEXT = "Next"
    TAIL = "Tail"


class Pulls(StrEnum):
    """Whom workers pull from."""

    HEAD = "Head"
    ANY = "Any"


class Chain(SpecModel):
    """Chain replication, for the strategy Chain."""

    replicas: int = Field(
        default=2,
        ge=2,
        le=8,
        description="Processes that hold each shard: its server, and replicas in the pods of the "
        "next servers. Each takes the memory of a shard.",
    )
    ack: Ack = Field(
        default=Ack.NEXT,
        description="Next: the first replica has it. Tail: all have. None: the server has it.",
    )
    every: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Send the newest state after so many updates instead of each (with ack None). "
        "So many updates may be lost: pushes under Async and Bounded, under Sync steps, each with "
        "a batch of every worker.",
    )
    pulls: Pulls = Field(
        default=Pulls.HEAD,
        description="Head: workers pull from servers. Any: each from one of a server's chain, once "
        "that has the worker's own pushes (Async and Sync, with every 1).",
    )


class Timeouts(SpecModel):
    """Deadlines, in seconds."""

    detect_seconds: Seconds = Field(
        default=3.0, description="A member that the operator cannot reach for so long is doubted."
    )
    hung_seconds: Seconds = Field(
        default=30.0,
        description="A server that does nothing for so long, though its agent answers, hangs, and "
        "is replaced. Saves copy the shard: where that takes longer, raise this.",
    )
    replace_seconds: Seconds = Field(default=120.0, description="For a replacement to run.")
    restore_seconds: Seconds = Field(default=300.0, description="For lost slots to be back.")
    progress_seconds: Seconds = Field(
        default=600.0, description="Without a step for so long a job is Stalled."
    )
    pending_seconds: Seconds = Field(default=300.0, description="For all pods to start.")


class Placement(StrEnum):
    """Where the slots of a lost server live on."""

    REPLACE = "Replace"
    ADOPT = "Adopt"


class Recovery(SpecModel):
    """How losses are recovered."""

    strategy: StrategyName = StrategyName.FRESHEST
    fallback: tuple[StrategyName, ...] = Field(
        default=(), max_length=4, description="What is tried, in order, where the strategy cannot."
    )
    allow_reset: bool = Field(
        default=False, description="Whether initial values may be a last resort."
    )
    placement: Placement = Field(
        default=Placement.REPLACE,
        description="Replace: in a new pod. Adopt: in the pod of a server that lives, at once, "
        "until a new pod is there to take them back. Replace adopts where no pod comes in "
        "replaceSeconds.",
    )
    copies: int = Field(
        default=1,
        ge=1,
        le=8,
        description="k: a worker keeps a push, and gives it again to a server that was restored, "
        "until its effect is on k nodes, the worker's own not counted; k - 1 nodes may then fail. "
        "What workers pull counts; what they do not hold is sent to replicas in other servers' "
        "pods. With Freshest or Stateless.",
    )
    copies_bytes_per_second: int | None = Field(
        default=None,
        ge=1,
        description="Limit of what each server sends to its replica. Default: none.",
    )
    max_uncovered: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="Pushes of a worker that may wait to be covered; then it waits. Each is kept "
        "in its memory. With Sync, and all workers needed, it is 1.",
    )
    chain: Chain = Field(default_factory=Chain)
    replay: Replay = Field(default_factory=Replay)
    timeouts: Timeouts = Field(default_factory=Timeouts)


class RunPolicy(SpecModel):
    """How often and how long."""

    backoff_limit: int = Field(
        default=6, ge=0, le=100, description="Losses that count, per role, within windowSeconds."
    )
    window_seconds: Seconds = 3600.0
    active_deadline_seconds: Seconds | None = Field(
        default=None, description="The job fails when it runs longer. Default: no limit."
    )
    clean_pod_policy: CleanPodPolicy = CleanPodPolicy.RUNNING


COPYING = frozenset({StrategyName.FRESHEST, StrategyName.STATELESS})
"""Strategies that take what copies hold: whatever `copies` covered is there after a loss."""


class TrainingJobSpec(SpecModel):
    """What the user wants."""

    model_config = ConfigDict(
        json_schema_extra=cel(*OF_A_JOB, *OF_A_CHANGE),
    )

    program: Program
    servers: Servers = Field(default_factory=Servers)
    workers: Workers = Field(default_factory=Workers)
    consistency: Consistency = Field(default_factory=Consistency)
    block_bytes: int | None = Field(
        default=None,
        ge=4,
        le=65536,
        description="Size of a block. Default: chosen from the tables, at most 65536.",
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    recovery: Recovery = Field(default_factory=Recovery)
    run_policy: RunPolicy = Field(default_factory=RunPolicy)

    @property
    def chained(self) -> bool:
        """Whether the job's strategy is chain replication."""
        return self.recovery.strategy is StrategyName.CHAIN

    @property
    def replicas(self) -> int:
        """Processes that hold each shard: its server and its replicas."""
        return self.recovery.chain.replicas if self.chained else self.recovery.copies

    @property
    def pulls_from_replicas(self) -> bool:
        """Whether workers pull from replicas. How stale those of `Bounded` are, the head knows."""
        return self.chained and self.recovery.chain.pulls is Pulls.ANY

    def problems(self, *, local: bool) -> list[str]:
        """Say what the CEL rules would say; `local`: `daruma run` needs no claim, has a store."""
        saves = {StrategyName.PARTIAL, StrategyName.FULL_CHECKPOINT}
        ladder = (self.recovery.strategy, *self.recovery.fallback)
        point, chain = self.checkpoint, self.recovery.chain
        uses = bool(saves & set(ladder))
        cloud = point.store is not None and not point.store.startswith("file://")
        file = point.store is not None and not cloud
        bounded = self.consistency.mode is ConsistencyMode.BOUNDED
        checks = [
            (uses and point.store is None and not local, NEEDS_STORE),
            (uses and point.every == 0, NEEDS_EVERY),
            (file and point.claim_name is None and not local, NEEDS_CLAIM),
            (cloud and point.claim_name is not None, NO_CLAIM),
            (point.secret_ref is not None and not cloud, NO_REF),
            (point.every > 0 and point.every * point.fraction < 1, TOO_OFTEN),
            (len(set(ladder)) != len(ladder), NO_TWICE),
            (self.replicas > self.servers.replicas, TOO_FEW_SERVERS),
            (self.recovery.copies > 1 and ladder[0] not in COPYING, NO_COPIES),
            (chain.every > 1 and chain.ack is not Ack.NONE, EVERY_NEEDS_NONE),
            (StrategyName.CHAIN in ladder[1:] and self.recovery.copies == 1, NO_CHAIN),
            (chain.pulls is Pulls.ANY and (chain.every > 1 or bounded), NO_ANY),
            (self.workers.min_replicas > self.workers.replicas, TOO_MANY),
            (not bounded and self.consistency.max_staleness > 0, NOT_BOUNDED),
            (point.store is not None and not re.search(STORE_PATTERN, point.store), STORE_FORM),
        ]
        return [message for wrong, message in checks if wrong]
