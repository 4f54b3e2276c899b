"""What members say of themselves and of each other: the answer to `GET /v1/view`.

Part of the contract between operator and trainer: import it from there. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from daruma_trainer.parsing import parse_message, plain


@dataclass(frozen=True, slots=True)
class Copies:
    """Slots of one version that a member holds: a worker's last complete pull, or a manifest."""

    lineage: int
    position: int
    slots: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """A member that another one cannot reach."""

    id: str
    age: float
    """Seconds since the connection broke, or since the oldest unanswered request."""
    reason: str
    """Disconnected | Unconnected (it never was) | Unanswered."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A server that lives in another one's pod, as its host sees it."""

    id: str
    address: str
    exit_code: int | None = None
    """None while its process runs; negative: the signal that ended it."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """The newest durable save of one kind that a member knows of."""

    path: str
    """In the store, below its root: of a manifest (running) or of a cut file."""
    step: int
    bytes: int
    age: float
    """Seconds since it became durable."""
    distance: float | None = None
    """L2 distance between the live shard and what is saved, where it was computed."""


@dataclass(frozen=True, slots=True)
class Move:
    """How far a shard moved between two steps."""

    first: int
    last: int
    norm: float
    """L2, estimated from a random sample of a large shard's parameters."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """How far a server is with a `Restore`, and what it cost; final when `done`."""

    recovery: int
    sources: Mapping[str, int] = field(default_factory=dict)
    """Slots restored so far, by the kind of source of their parameters."""
    bytes: int = 0
    seconds: float = 0.0
    missing: int = 0
    """Slots that no listed source could give."""
    moments: Mapping[str, int] = field(default_factory=dict)
    """The same slots by where their optimizer's state came from; "reset": it begins again at zero.
    Empty where the tables have none."""
    damaged: tuple[str, ...] = ()
    done: bool = False
    epoch: int = 0
    """Of the newest `Restore` that it took; 0: a promoted replica had all, and took none."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What it cost a worker that servers were away, the last time."""

    seconds: float
    """From the first connection that broke to its first step with all servers, or until now."""
    blocked: float
    """Of them, those in which its program waited for servers."""
    gap: float
    """The largest bound on the distance (L2) between the parameters that it computed with and the
    true ones, as far as that comes from what could not be sent."""
    epoch: int
    """The newest that it knew at the end, or knows."""
    over: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What one member says of itself. Servers hand on what others told them, with its age."""

    id: str
    epoch: int
    """Of the newest membership that it applied."""
    state: str
    """Servers: Joining | Empty | Restoring | Ready | Frozen (its successor takes its slots) |
    Replica.
    Workers: Joining | Training | Finished (its
    batches are done, and a rollback could still bring it back) | Left | Failed."""
    step: int = 0
    """Servers: the step their shard is at. Workers: last batch all slots acknowledged."""
    generation: int = 0
    initialised: bool = False
    """Servers: every slot was Ready and, with a store, manifest 0 is durable."""
    ready: int = 0
    """Servers: slots that are Ready."""
    suspects: tuple[Suspect, ...] = ()
    copies: tuple[Copies, ...] = ()
    """Workers, while a recovery goes on: the slot versions of the copy they keep for it. Promoted
    replicas: those of the slots that wait for a plan. In a member's own view alone."""
    follows: str | None = None
    """Replicas: the member before it in its chain, whose acknowledgements wait for it."""
    running: SavedState | None = None
    cut: SavedState | None = None
    """Servers: the newest cut that exists, with its file."""
    older: SavedState | None = None
    """Servers that cannot load the cut to roll back to (`error`): the newest before it."""
    waiting: str | None = None
    """Servers: why the store cannot be asked for what is to be restored; they try again."""
    save_error: str | None = None
    final: str | None = None
    """Servers: path of the final cut once it is durable ("" without a store)."""
    restore: RestoreReport | None = None
    update_norm: float | None = None
    """Servers: the largest L2 norm of their last 64 updates."""
    guests: tuple[Guest, ...] = ()
    """Servers: the adopted seats that live in its pod."""
    moves: tuple[Move, ...] = ()
    """Servers: how far their shard moved, over the whole of training, oldest first."""
    applied: int = 0
    duplicate: int = 0
    stale: int = 0
    lost: int = 0
    replayed: int = 0
    """Pushes; counted by batches."""
    lost_batches: str = ""
    """Workers: which were lost, `1-4,9`; of very many stretches the newest."""
    after: int | None = None
    """Workers: the batch that this life began after, or went back to in a rollback. What past ones
    lost of later ones it makes again; None: it does not know yet."""
    skipped: int = 0
    """Workers: batches that nobody made while the seat was vacant and the others went on."""
    skipped_batches: str = ""
    """Workers: which these were, as in `lost_batches`."""
    mixed: int = 0
    """Workers: batches made of values of two steps (`Sync`), as nobody had those of one."""
    acked_epoch: int = 0
    """Workers: the newest epoch E such that a batch first sent after E was seen is acknowledged
    by all slots."""
    acked_age: float | None = None
    """Workers: seconds since the first such acknowledgement of `acked_epoch`."""
    loss: float | None = None
    total_steps: int | None = None
    pending: int = 0
    """Workers: batches accumulated and not yet sent."""
    gap: float = 0.0
    """Workers: how far those would move the parameters (L2; at most)."""
    outage: Outage | None = None
    stop: str | None = None
    """Workers: the reason given to `job.stop`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Workers: what `job.report` and `job.evaluate` said last, but the loss."""
    error: str | None = None
    """Why it is Failed, in a sentence."""
    at: float = 0.0
    """When it said so, in seconds of its own monotonic clock: of two of its reports the later
    counts, by whatever way each came. By the ages of what others hand on that cannot be told."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)

    @classmethod
    def from_json(cls, raw: Any) -> "Report":
        """Parse what `to_json` wrote; ContractError names the first field that is wrong."""
        return parse_message(cls, raw)


@dataclass(frozen=True, slots=True)
class View:
    """`GET /v1/view?after=V&wait=S`: what this process knows; answers at once when it is newer."""

    version: int
    epoch: int
    own: Report
    others: Mapping[str, tuple[float, Report]] = field(default_factory=dict)
    """By member id: the age in seconds of what it said, and what it said."""
    still: float = 0.0
    """Seconds since the thread that owns this process's state showed anything: the agent's threads
    answer, too, where that one hangs."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)

    @classmethod
    def from_json(cls, raw: Any) -> "View":
        """Parse what `to_json` wrote; ContractError names the first field that is wrong."""
        return parse_message(cls, raw)
