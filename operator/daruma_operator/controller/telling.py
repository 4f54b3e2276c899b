"""What people are told of a recovery, at once or by the operator after the one that died. Pure.

Events are told after the status was written: who dies between the two leaves them untold. They are
made from the status alone, so the next operator can tell them again; their names make each once.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime

from daruma_operator.api.status import Loss, Phase, RecoveryRecord, TrainingJobStatus
from daruma_operator.controller.verdicts import PROCESS_ENDED, event_of
from daruma_operator.names import seat
from daruma_operator.substrate.protocol import Event
from daruma_trainer.contract import Role

RECENT_SECONDS = 1800.0
"""What ended longer ago is not told again: the cluster forgets events after an hour, and with them
what was told."""
HAND_BACK = "HandBack"
"""Cause of a recovery without a loss, and reason of the end of the incarnation that hands over."""
CUT_NOT_LOADED = "CutNotLoaded"
"""Replaced because it could not go back to the cut: no failure of its own."""


def started(losses: Sequence[Loss]) -> Event:
    """A recovery began with these losses, all of one epoch."""
    names = ", ".join(seat(x.role, x.index) for x in losses)
    reasons = ", ".join(sorted({x.reason for x in losses}))
    return Event("RecoveryStarted", f"{names} lost: {reasons}", losses[0].epoch)


def lost(loss: Loss, sentence: str | None = None) -> Event:
    """A member was lost; `sentence`: what is known besides."""
    text = sentence or f"{loss.pod} was lost ({loss.reason})"
    where = seat(loss.role, loss.index)
    return Event(event_of(loss.reason), text[:1024], loss.epoch, warning=True, member=where)


def over(record: RecoveryRecord, more: str = "") -> Event:
    """A recovery succeeded."""
    seconds, why = record.seconds or 0.0, record.reason
    if record.cause == HAND_BACK:
        names = ", ".join(seat(Role.SERVER, index) for index in record.indexes)
        text = f"{names} has its slots back after {seconds:.2f} s ({why})"
        return Event("HandedBack", text, record.epoch)
    text = f"recovered by {record.strategy} in {seconds:.2f} s ({why}){more}"
    return Event("RecoverySucceeded", text[:1024], record.epoch)


def untold(status: TrainingJobStatus, now: datetime) -> tuple[Event, ...]:
    """Return what the operator before may not have told."""
    return tuple(_untold(status, now))


def _untold(status: TrainingJobStatus, now: datetime) -> Iterator[Event]:
    record = status.recovery
    if record is None and status.recoveries and _is_recent(status.recoveries[-1], now):
        record = status.recoveries[-1]
    if record is not None:
        yield from _of(record)
    ended = status.completion_time
    if ended is not None and (now - ended).total_seconds() < RECENT_SECONDS:
        failed = status.phase is Phase.FAILED
        reason = "Failed" if failed else "Succeeded"
        yield Event(reason, status.message, status.epoch, warning=failed)


def _of(record: RecoveryRecord) -> Iterator[Event]:
    ended = record.outcome is not None
    losses = [x for x in record.losses if x.reason not in (CUT_NOT_LOADED, HAND_BACK)]
    if losses and losses[0] == record.losses[0]:
        # Not where they joined a hand-back, which is no start.
        yield started([x for x in losses if x.epoch == losses[0].epoch])
    yield from (lost(x) for x in losses if ended or x.reason != PROCESS_ENDED)
    if record.outcome == "Succeeded":
        yield over(record)


def _is_recent(record: RecoveryRecord, now: datetime) -> bool:
    if record.started_at is None or record.seconds is None:
        return False
    return (now - record.started_at).total_seconds() - record.seconds < RECENT_SECONDS
