"""What a recovery cost. Everything here was measured, or says that it is a bound or unknown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Gone:
    """What workers had counted that are gone."""

    pushes: Pushes = field(default_factory=Pushes)
    """Without the batches below."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """By worker index, which batches its past lives counted as lost: `1-4,9`."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """The same of those that they skipped."""


def counters(reports: Mapping[str, Report], live: Iterable[str], gone: Gone) -> Pushes:
    """Return what became of pushes, as the members that live count them and those did that died.

    A push is lost once if any slot lost it: servers tell a worker, in each of its lives, which of
    its batches they lost.
    """
    workers = {m.split("-")[1]: reports.get(m) for m in live if not m.startswith("server-")}
    found = gone.pushes
    for index in {*workers, *gone.lost, *gone.skipped}:
        report = workers.get(index)
        lost, skipped, others = _missing(gone, index, report)
        found = found.plus(others).plus(Pushes(lost=len(lost), skipped=len(skipped)))
    return found


def remember(gone: Gone, index: str, report: Report) -> Gone:
    """Return `gone` with what a lost worker of this index had counted."""
    *missing, others = _missing(gone, index, report)
    lost, skipped = (batches.text(MAX_STRETCHES) for batches in missing)
    # What has no place any more is a number from now on.
    more = [len(a) - len(Stretches.read(b)) for a, b in zip(missing, (lost, skipped), strict=True)]
    return Gone(
        gone.pushes.plus(others).plus(Pushes(lost=more[0], skipped=more[1])),
        {**gone.lost, index: lost},
        {**gone.skipped, index: skipped},
    )


def _missing(gone: Gone, index: str, report: Report | None) -> tuple[Stretches, Stretches, Pushes]:
    """Return which batches of a worker's lives were lost and which skipped, each in one of them.

    And what the newest life counts that it does not name.
    """
    lost, skipped = (_still(report, past.get(index, "")) for past in (gone.lost, gone.skipped))
    others = Pushes()
    if report is not None:
        own = _named(report.lost_batches, report.lost)
        passed = _named(report.skipped_batches, report.skipped)
        numbers = {"lost": report.lost - len(own), "skipped": report.skipped - len(passed)}
        others = counted(report).model_copy(update=numbers)
        lost, skipped = lost | own, skipped | passed
    # A server lacks what an earlier life skipped, and a later one does not know of that.
    return lost - skipped, skipped, others


def _named(text: str, most: int) -> Stretches:
    """Return the batches that a report names; none where it names what cannot be."""
    try:
        named = Stretches.read(text)
    except ContractError:
        return Stretches()
    return named if len(named) <= most else Stretches()


def _still(report: Report | None, past: str) -> Stretches:
    """Return which batches of past lives the newest one does not make again."""
    batches = Stretches.read(past)
    return batches if report is None or report.after is None else batches.up_to(report.after)


def counted(report: Report) -> Pushes:
    """Return what one worker counted."""
    return Pushes(
        lost=report.lost, replayed=report.replayed, skipped=report.skipped, mixed=report.mixed
    )
