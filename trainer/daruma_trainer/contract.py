"""What the operator and the trainer must agree on: names, ports, exit codes, control messages.

Standard library only, because the operator imports it and must not need numpy. Everything that
crosses HTTP between operator and pods is a frozen dataclass here (what members are told) or in
`views` (what they say), with `to_json` and `from_json`; `from_json` raises `ContractError` for
anything it does not understand, before it allocates.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import lru_cache
from typing import Any, Final

from daruma_trainer.parsing import ContractError, parse_message, plain
from daruma_trainer.stretches import Stretches
from daruma_trainer.views import (
    Copies,
    Guest,
    Move,
    Outage,
    Report,
    RestoreReport,
    SavedState,
    Suspect,
    View,
)

__all__ = [
    "ContractError", "Copies", "Guest", "Move", "Outage", "Report", "RestoreReport", "SavedState",
    "Suspect", "View",
]  # fmt: skip
"""Of what is defined beside this module, what belongs to the contract too."""

ENV_NAMESPACE: Final = "DARUMA_NAMESPACE"
ENV_JOB: Final = "DARUMA_JOB"
ENV_ROLE: Final = "DARUMA_ROLE"
ENV_INDEX: Final = "DARUMA_INDEX"
ENV_INCARNATION: Final = "DARUMA_INCARNATION"
ENV_TOKEN_FILE: Final = "DARUMA_TOKEN_FILE"  # noqa: S105 - the name of a variable
ENV_HOST_PID: Final = "DARUMA_HOST_PID"
"""Optional: a guest's host, with which it ends."""
ENV_LISTEN: Final = "DARUMA_LISTEN"
"""Optional `host:port` of the data port; the agent takes the next port. `daruma run` sets it."""

DATA_PORT: Final = 7070
AGENT_PORT: Final = 7071
STORE_MOUNT: Final = "/var/lib/daruma/store"
"""Where a pod sees the claim that a `file://` store lies in."""

SLOTS: Final = 1024
"""Units of ownership, dedupe, restore and hand-over (docs/architecture.md)."""

WINDOW: Final = 64
"""How many batches before the last one an applied entry remembers."""

MAX_CONTROL_BYTES: Final = 4 << 20
"""Upper bound of one HTTP body between operator and agent."""


class ExitCode(IntEnum):
    """Exit codes of every command and pod; part of the API."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    STALE = 4
    """This incarnation was replaced; nobody waits for its result."""


class Role(StrEnum):
    """What a member is. The label and the pod's name use the lower-case form."""

    SERVER = "Server"
    WORKER = "Worker"


class SourceKind(StrEnum):
    """Where a lost slot's parameters can come from, as status.recoveries[].sources names it."""

    PREDECESSOR = "predecessor"
    """The incarnation that hands its slots over: exact, with the optimizer's state."""
    REPLICA = "replica"
    """What the promoted replica has itself: with the optimizer's state of the same moment."""
    PEER = "peer"
    RUNNING_CHECKPOINT = "runningCheckpoint"
    FULL_CHECKPOINT = "fullCheckpoint"
    INITIAL = "initial"


RESET: Final = "reset"
"""Where the optimizer's state of a slot came from, if from nowhere."""


class WorkersMeanwhile(StrEnum):
    """What workers do while a server is away."""

    WAIT = "Wait"
    REPLAY = "Replay"


TRAINS: Final = ("Training", "Finished", "Left")
"""States of a worker that has what it needs."""


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of a slot. A restore or rollback begins a new lineage, so abandoned copies never win."""

    lineage: int
    position: int


@dataclass(frozen=True, slots=True)
class Member:
    """One incarnation of a server or worker, as status.members and the membership list it."""

    role: Role
    index: int
    incarnation: int
    pod: str
    address: str | None = None
    """`host:port` of the data port; None until it is known."""
    node: str | None = None
    """The machine that it runs on, where that is known."""

    @property
    def failure_domain(self) -> str:
        """What is lost together with it: its node, or else its pod."""
        return self.node or self.pod

    @property
    def id(self) -> str:
        """Name on the wire and in views: `server-1-6`."""
        return member_id(self.role, self.index, self.incarnation)

    @property
    def agent(self) -> str | None:
        """`host:port` of the agent."""
        return None if self.address is None else agent_address(self.address)


@dataclass(frozen=True, slots=True)
class Replay:
    """Limits of what a worker accumulates while a server is away (spec.recovery.replay)."""

    max_pending: int = 1000
    max_age_seconds: float = 600.0
    combine: str = "Auto"
    """Auto | Sum | Mean | Drop."""
    trust: float = 1.0
    max_gap: float | None = None
    """L2 distance of the parameters (see worker.accumulating); None: no limit."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything of a job's spec that servers and workers use."""

    consistency: str = "Async"
    """Async | Sync | Bounded."""
    max_staleness: int = 0
    """`Bounded`: how many batches a worker may be ahead of the slowest one that goes on."""
    min_replicas: int = 0
    """Workers that the others wait for at least; 0: for all. See `Membership.elastic`."""
    store: str | None = None
    """`file:///path` as this member sees it, or None: no checkpoints."""
    every: int = 0
    """C, in steps; 0: no periodic saves."""
    fraction: float = 1.0
    selection: str = "Priority"
    """Priority | RoundRobin | Random."""
    keep: int = 2
    cuts: bool = False
    """Take a consistent cut every C steps (FullCheckpoint is the strategy or a fallback)."""
    running: bool = True
    """Keep a running checkpoint."""
    final: bool = True
    restore_from: str | None = None
    block_bytes: int | None = None
    meanwhile: WorkersMeanwhile = WorkersMeanwhile.REPLAY
    inexact: bool = False
    """Lost slots come from the running checkpoint alone: what was added since is not in it."""
    replay: Replay = field(default_factory=Replay)
    replicas: int = 1
    """Processes that hold each shard: its server, and replicas in other servers' pods."""
    chain: bool = False
    """Chain replication: a replica takes all, and is promoted when its server is lost."""
    ack: str = "None"
    """Chain: None | Next | Tail: how far a push has to have come before its worker forgets it."""
    every_updates: int = 1
    """Chain: replicas get the newest state after so many updates (ack None)."""
    pulls_from_replicas: bool = False
    """Chain: workers pull from replicas, too."""
    copies: int = 1
    """k: a worker keeps a push until it is on so many nodes, its own not counted."""
    max_uncovered: int = 2
    """Pushes of a worker that may be waiting for that. See `Membership.max_uncovered`."""
    copies_bytes_per_second: float | None = None
    """Limit of what each server sends for it."""
    suspect_seconds: float = 1.0
    """An unanswered request this old makes its server a suspect."""
    progress_seconds: float = 600.0
    """How long a worker waits for a server before it gives up (exit code 1)."""

    @property
    def replicates(self) -> bool:
        """Whether there are replicas at all."""
        return self.replicas > 1

    @property
    def covers(self) -> bool:
        """Whether workers keep their pushes until they are covered."""
        return self.ack != "None" if self.chain else self.copies > 1

    @property
    def to_tail(self) -> bool:
        """Whether a replica answers only once those after it have what it took."""
        return self.ack == "Tail" or not self.chain


@dataclass(frozen=True, slots=True)
class Rollback:
    """All members go back to a cut. Generation 0 is the beginning, without any rollback."""

    generation: int = 0
    cut: str | None = None
    """Path of `cuts/<number>.json` below the job's prefix in the store; None: nothing to load."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Who is in, ordered by the epoch. A pure function of status, job uid and spec.

    Slot `s` belongs to server index `place(job_uid, servers)[s]`, and to the incarnation that
    `members` lists for that index; an index without a member, or whose member has no address,
    leaves its slots without an owner.
    """

    job_uid: str
    namespace: str
    name: str
    epoch: int
    servers: int
    workers: int
    members: tuple[Member, ...]
    settings: Settings
    initialised: bool = False
    rollback: Rollback = field(default_factory=Rollback)
    recovery: int | None = None
    """Id of the recovery in progress: workers keep their last complete pull until it is None."""
    handing: tuple[Member, ...] = ()
    """Servers whose slots their successors in `members` take over: frozen, but still there."""
    replicas: tuple[Member, ...] = ()
    """Servers of the indexes that they replicate, each in another server's pod."""
    saved: bool = False
    """Something of the job lies in its store: where nothing is found, the store is away."""

    def member(self, role: Role, index: int) -> Member | None:
        """Return the incarnation that counts, if there is one."""
        for member in self.members:
            if member.role is role and member.index == index:
                return member
        return None

    def guests(self, host: Member) -> tuple[Member, ...]:
        """Return the other members that live in this one's pod: adopted seats (Adopt)."""
        everybody = (*self.members, *self.handing, *self.replicas)
        return tuple(m for m in everybody if m.pod == host.pod and m.id != host.id)

    def chain(self, index: int) -> tuple[Member, ...]:
        """Return a shard's server and its replicas, in the order in which updates go."""
        head = self.member(Role.SERVER, index)
        after = sorted((m for m in self.replicas if m.index == index), key=lambda m: m.incarnation)
        return (*after,) if head is None else (head, *after)

    def of(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role, by index."""
        return tuple(sorted((m for m in self.members if m.role is role), key=lambda m: m.index))

    @property
    def elastic(self) -> bool:
        """Whether steps are made without a lost worker, until its replacement enters."""
        waits = self.settings.consistency in ("Sync", "Bounded")
        return waits and 0 < self.settings.min_replicas < self.workers

    @property
    def repeats(self) -> bool:
        """Whether a step that was half made is made again, of what the one before it left.

        Live workers keep that: under `Sync`, where all are needed.
        """
        sync = self.settings.consistency == "Sync"
        return sync and not self.elastic and self.workers > 1

    @property
    def max_uncovered(self) -> int:
        """Pushes of a worker that may be waiting to be covered; it waits before it has more.

        Where steps are repeated one, of the newest step: a promoted replica may lack what is not
        covered, and workers keep one step back.
        """
        return 1 if self.repeats else self.settings.max_uncovered

    @property
    def prefix(self) -> str:
        """Folder of this job in its store."""
        return f"{self.namespace}/{self.name}/{self.job_uid}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)

    @classmethod
    def from_json(cls, raw: Any) -> "Membership":
        """Parse what `to_json` wrote; ContractError names the first field that is wrong."""
        return parse_message(cls, raw)


@dataclass(frozen=True, slots=True)
class Source:
    """One place that lost slots can be taken from."""

    kind: SourceKind
    slots: str
    """Which slots, as `slots_to_hex` writes them."""
    member: str | None = None
    """Peer: the worker's id (`worker-0-3`)."""
    manifest: str | None = None
    """Running checkpoint: the manifest's path in the store. Full checkpoint: the cut file's."""
    agent: str | None = None
    """Predecessor: `host:port` of its agent."""


@dataclass(frozen=True, slots=True)
class Restore:
    """`POST /v1/restore`: every slot tries the sources that hold it, in this order."""

    recovery: int
    epoch: int
    member: str
    """Whom it is meant for: `server-1-6`. Two incarnations of one epoch may share a pod."""
    sources: tuple[Source, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)

    @classmethod
    def from_json(cls, raw: Any) -> "Restore":
        """Parse what `to_json` wrote; ContractError names the first field that is wrong."""
        restore = parse_message(cls, raw)
        for source in restore.sources:
            slots_from_hex(source.slots)
        return restore


def member_id(role: Role, index: int, incarnation: int) -> str:
    """Name a member as the wire and views do: `server-1-6`."""
    return f"{role.value.lower()}-{index}-{incarnation}"


def agent_address(address: str) -> str:
    """Return `host:port` of the agent beside a data port."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + AGENT_PORT - DATA_PORT}"


def port_claim(port: int) -> str:
    """Name the abstract socket (Linux) by which one process of a machine claims a pair of ports.

    Their owner may not have bound them yet. `port` is the lower one.
    """
    return f"\0daruma-port-{port}"


def token_for(operator_key: bytes, job_uid: str) -> str:
    """Derive a job's token from the operator's key: HMAC-SHA256, in hexadecimal."""
    return hmac.new(operator_key, job_uid.encode(), hashlib.sha256).hexdigest()


def indexes(text: str) -> frozenset[int]:
    """Read what `index_text` wrote: `0,2-4`. ContractError: it is none."""
    return frozenset(Stretches.read(text))


def index_text(numbers: Iterable[int]) -> str:
    """Write a set of indexes as stretches, ascending."""
    return Stretches.these(numbers).text()


def slots_to_hex(slots: Sequence[int]) -> str:
    """Write a set of slots as a bitmap of 256 hexadecimal digits; bit s is slot s."""
    bits = 0
    for slot in slots:
        bits |= 1 << slot
    return f"{bits:0{SLOTS // 4}x}"


def group_versions(
    slots: Iterable[int], lineages: Iterable[int], positions: Iterable[int]
) -> tuple[Copies, ...]:
    """Group slots by their versions, as members offer them; lineage 0: nothing is there."""
    found: dict[tuple[int, int], list[int]] = {}
    for slot, *version in zip(slots, lineages, positions, strict=True):
        if version[0]:
            found.setdefault((version[0], version[1]), []).append(slot)
    return tuple(Copies(a, b, slots_to_hex(mine)) for (a, b), mine in found.items())


def slots_from_hex(text: str) -> list[int]:
    """Read what `slots_to_hex` wrote, in ascending order."""
    if len(text) != SLOTS // 4 or not text.isalnum():
        raise ContractError(f"a slot bitmap has {SLOTS // 4} digits, not {text!r:.80}")
    try:
        bits = int(text, 16)
    except ValueError as error:
        raise ContractError("a slot bitmap is hexadecimal") from error
    return [slot for slot, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]


@lru_cache(maxsize=64)
def place(job_uid: str, servers: int) -> tuple[int, ...]:
    """Give each slot a server index: rendezvous hashing with bounded load.

    No server gets more than 1.05 × the mean + 1 slots; a slot whose favourite is full goes to its
    next choice. Salted by the job, so that what a server holds is a random part of the model.
    """
    if servers < 1:
        raise ContractError(f"a job has at least one server, not {servers}")
    limit = int(1.05 * SLOTS / servers) + 1
    load = [0] * servers
    owners: list[int] = []
    for slot in range(SLOTS):
        weights = [
            hashlib.blake2b(f"{job_uid}/{slot}/{index}".encode(), digest_size=8).digest()
            for index in range(servers)
        ]
        order = sorted(range(servers), key=weights.__getitem__, reverse=True)
        owner = next(index for index in order if load[index] < limit)
        load[owner] += 1
        owners.append(owner)
    return tuple(owners)
