"""What a recovery cost. Everything here was measured, or says that it is a bound or unknown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, sqrt

from daruma_operator.api.status import Pushes
from daruma_trainer.contract import ContractError, Report
from daruma_trainer.stretches import Stretches


class DeltaKind(StrEnum):
    """How well ‖δ‖ is known."""

    EXACT = "Exact"
    UPPER_BOUND = "UpperBound"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class Delta:
    """The perturbation: L2 distance between the lost state and the restored one."""

    value: float | None
    kind: DeltaKind


UNKNOWN = Delta(None, DeltaKind.UNKNOWN)
EXACT = Delta(0.0, DeltaKind.EXACT)


@dataclass(frozen=True, slots=True)
class LostShard:
    """What bounds the perturbation of one restored shard."""

    updates: int | None
    """Updates that may have been applied after the restored state; None: not known."""
    update_norm: float | None
    """L2 norm of the largest recent update of the shard."""
    distance: float | None = 0.0
    """Distance that the restored state had already when it was saved; 0 for a peer's copy."""


def bound(shards: Iterable[LostShard]) -> Delta:
    """Bound ‖δ‖ over all restored shards, which are orthogonal parts of the model."""
    total = 0.0
    exact = True
    for shard in shards:
        if shard.distance is None or shard.updates is None:
            return UNKNOWN
        if shard.updates > 0 and shard.update_norm is None:
            return UNKNOWN
        moved = shard.distance + shard.updates * (shard.update_norm or 0.0)
        exact = exact and moved == 0.0
        total += moved * moved
    if not isfinite(total):
        return UNKNOWN  # it diverged; and JSON has no infinity
    return EXACT if exact else Delta(sqrt(total), DeltaKind.UPPER_BOUND)


MAX_STRETCHES = 200
"""Of batches of one worker's past lives that are remembered one by one; of older ones the number
is."""


def counters(
    reports: Mapping[str, Report],
    live: Iterable[str],
    gone: Pushes,
    gone_lost: Mapping[str, str] | None = None,
) -> Pushes:
    """Return what became of pushes, as the members that live count them and those did that died.

    A push is lost once if any slot lost it. Servers tell a worker which of its batches they lost,
    and it counts each once; what a worker did not come to say is in the servers' counts alone, of
    which the largest is taken. `gone_lost`: by worker index which batches its past lives counted
    as lost; `gone` does not have them.
    """
    servers, found = 0, gone
    before = {index: Stretches.read(text) for index, text in (gone_lost or {}).items()}
    found = found.plus(Pushes(lost=sum(map(len, before.values()))))
    for member in live:
        report = reports.get(member)
        if report is None:
            continue
        if member.startswith("server-"):
            servers = max(servers, report.lost)
        else:
            found = found.plus(counted(report))
            past = before.get(member.split("-")[1], Stretches())
            twice = (past - _still_lost(report, past)) | (past & _named(report))
            found = found.model_copy(update={"lost": found.lost - len(twice)})
    return found.model_copy(update={"lost": max(servers, found.lost)})


def _named(report: Report) -> Stretches:
    """Return the lost batches that a report names; none where it names what cannot be."""
    try:
        named = Stretches.read(report.lost_batches)
    except ContractError:
        return Stretches()
    return named if len(named) <= report.lost else Stretches()


def _still_lost(report: Report, past: Stretches) -> Stretches:
    """Return which batches that past lives lost the newest one does not make again."""
    return past if report.after is None else past.up_to(report.after)


def remember(report: Report, before: str) -> tuple[Pushes, str]:
    """Return what a lost worker's count adds to `gone`, and to `gone_lost`, which was `before`."""
    mine, known = _named(report), _still_lost(report, Stretches.read(before))
    text = (mine | known).text(MAX_STRETCHES)
    # What it could not name, and what has no place any more, are numbers from now on.
    rest = report.lost - len(mine) + len(mine | known) - len(Stretches.read(text))
    return counted(report).model_copy(update={"lost": rest}), text


def counted(report: Report) -> Pushes:
    """Return what one worker counted."""
    return Pushes(
        lost=report.lost, replayed=report.replayed, skipped=report.skipped, mixed=report.mixed
    )
