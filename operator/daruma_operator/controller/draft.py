"""A decision in the making: the status as it will be written, and what people are told of it.

The draft is the only thing that changes while `decide` runs, and it never leaves it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.status import (
    Condition,
    MemberStatus,
    Phase,
    RecoveryRecord,
    TrainingJobStatus,
)
from daruma_operator.controller.observe import Seen
from daruma_operator.controller.telling import lost
from daruma_operator.controller.verdicts import PROCESS_ENDED
from daruma_operator.settings import Settings
from daruma_operator.substrate.protocol import Event
from daruma_trainer.contract import Role

KEPT_RECORDS = 10
"""Recoveries that status remembers."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator's settings and the substrate add to the spec."""

    store: str | None = None
    """The job's store as its members see it."""
    progress_seconds: float = 10.0
    copies_seconds: float = 1.0
    superseded_grace_seconds: float = 30.0
    clean_grace_seconds: float = 5.0

    @classmethod
    def of(cls, settings: Settings, store: str | None) -> "Policy":
        """Take what a decision needs of the operator's settings."""
        return cls(
            store,
            settings.progress_seconds,
            settings.copies_seconds,
            settings.superseded_grace_seconds,
            settings.clean_grace_seconds,
        )


@dataclass(slots=True)
class Draft:
    """What one pass makes of a status."""

    seen: Seen
    policy: Policy
    now: datetime
    status: TrainingJobStatus
    events: list[Event] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds until deadlines that were looked at."""

    @property
    def spec(self) -> TrainingJobSpec:
        """The job's spec."""
        return self.seen.job.spec

    @property
    def training(self) -> bool:
        """Whether steps are made, of which people want to see the newest."""
        return self.status.phase is Phase.RUNNING

    @property
    def record(self) -> RecoveryRecord:
        """The recovery in progress."""
        if self.status.recovery is None:
            raise ValueError("no recovery is in progress")
        return self.status.recovery

    def set(self, **fields: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=fields)

    def set_record(self, **fields: Any) -> None:
        """Change fields of the recovery in progress."""
        self.set(recovery=self.record.model_copy(update=fields))

    def phase(self, phase: Phase, reason: str, message: str) -> None:
        """Say where the job stands, and why."""
        if phase is not self.status.phase:
            self.set(phase=phase, phase_since=self.now)
        self.set(reason=reason, message=message[:1024])

    def raise_epoch(self) -> int:
        """Begin a new epoch: the membership is about to change."""
        self.set(epoch=self.status.epoch + 1)
        return self.status.epoch

    def tell(self, reason: str, message: str, *, warning: bool = False, member: str = "") -> None:
        """Tell people, after the status is written."""
        event = Event(reason, message[:1024], self.status.epoch, warning, member or None)
        self.events.append(event)

    def members(self, role: Role) -> list[MemberStatus]:
        """Members of one role, by index."""
        return sorted((m for m in self.status.members if m.role is role), key=lambda m: m.index)

    def replace_members(self, changed: Iterable[MemberStatus]) -> None:
        """Put members into the seats of their role and index."""
        seats = {(m.role, m.index): m for m in self.status.members}
        seats |= {(m.role, m.index): m for m in changed}
        order = sorted(seats.items(), key=lambda item: (item[0][0].value, item[0][1]))
        self.set(members=tuple(m for _, m in order))

    def left(self, since: datetime | None, seconds: float) -> float:
        """Seconds until a deadline; the next pass is no later than that."""
        begun = self.now if since is None else since
        left = seconds - (self.now - begun).total_seconds()
        if left > 0:
            self.waits.append(left)
        return left

    def left_to_act(self, since: datetime | None, seconds: float) -> float:
        """The same for what an operator has to do something for: with none, no time passes."""
        began = self.seen.began
        if since is not None and began is not None:
            since = max(since, began)
        return self.left(since, seconds)

    def condition(self, kind: str, *, true: bool, reason: str, message: str = "") -> None:
        """Set a condition; its time moves only when it changes. One never true is not listed."""
        text = "True" if true else "False"
        old = next((c for c in self.status.conditions if c.type == kind), None)
        if old is None and not true:
            return
        same = old is not None and old.status == text
        if same and old is not None and (old.reason, old.message) == (reason, message):
            return
        time = old.last_transition_time if same and old is not None else self.now
        new = Condition(
            type=kind, status=text, reason=reason, message=message, last_transition_time=time
        )
        if old is None:
            self.set(conditions=(*self.status.conditions, new))
        else:
            self.set(conditions=tuple(new if c.type == kind else c for c in self.status.conditions))

    def close(self, outcome: str, sources: dict[str, int] | None = None) -> None:
        """Move the recovery in progress to those that ended."""
        record = self.record
        seconds = record.seconds
        if seconds is None:
            seconds = (self.now - (record.started_at or self.now)).total_seconds()
        update: dict[str, Any] = {"outcome": outcome, "seconds": round(max(0.0, seconds), 6)}
        if sources is not None:
            update["sources"] = sources
        closed = record.model_copy(update=update)
        # Their pods never said how they ended.
        self.events += [lost(x) for x in closed.losses if x.reason == PROCESS_ENDED]
        self.set(
            recovery=None,
            recoveries=(*self.status.recoveries, closed)[-KEPT_RECORDS:],
            outage_seconds=round(self.status.outage_seconds + (closed.seconds or 0.0), 6),
        )

    def is_true(self, kind: str) -> bool:
        """Whether a condition is true."""
        return any(c.type == kind and c.status == "True" for c in self.status.conditions)
