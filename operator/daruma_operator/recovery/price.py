"""What a recovery cost. Everything here was measured, or says that it is a bound or unknown."""

from collections.abc import Callable, Iterable, Mapping
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

    A push is lost once if any slot lost it. Servers tell a worker which of its batches they lost,
    and it counts each once; what a worker did not come to say is in the servers' counts alone, of
    which the largest is taken.
    """
    servers, found = 0, gone.pushes
    workers: dict[str, Report] = {}
    for member in live:
        report = reports.get(member)
        if report is None:
            continue
        if member.startswith("server-"):
            servers = max(servers, report.lost)
        else:
            workers[member.split("-")[1]] = report
            found = found.plus(counted(report))
    lost = sum(len(_besides(workers.get(i), text, _lost)) for i, text in gone.lost.items())
    skipped = sum(len(_besides(workers.get(i), text, _skipped)) for i, text in gone.skipped.items())
    found = found.plus(Pushes(lost=lost, skipped=skipped))
    return found.model_copy(update={"lost": max(servers, found.lost)})


def remember(gone: Gone, index: str, report: Report) -> Gone:
    """Return `gone` with what a lost worker of this index had counted."""
    lost, unnamed_lost = _remembered(report, gone.lost.get(index, ""), _lost)
    skipped, unnamed_skipped = _remembered(report, gone.skipped.get(index, ""), _skipped)
    # What it could not name, and what has no place any more, are numbers from now on.
    numbers = {"lost": unnamed_lost, "skipped": unnamed_skipped}
    return Gone(
        gone.pushes.plus(counted(report).model_copy(update=numbers)),
        {**gone.lost, index: lost},
        {**gone.skipped, index: skipped},
    )


Counted = Callable[[Report], tuple[Stretches, int]]
"""Which batches a worker names that met one fate, and how many it counts."""


def _lost(report: Report) -> tuple[Stretches, int]:
    return _named(report.lost_batches, report.lost), report.lost


def _skipped(report: Report) -> tuple[Stretches, int]:
    return _named(report.skipped_batches, report.skipped), report.skipped


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


def _besides(report: Report | None, past: str, fate: Counted) -> Stretches:
    """Return which batches of past lives count besides those that the newest one counts."""
    still = _still(report, past)
    return still if report is None else still - fate(report)[0]


def _remembered(report: Report, past: str, fate: Counted) -> tuple[str, int]:
    """Return the batches of past lives, this one's with them, and how many have no name there."""
    (mine, number), still = fate(report), _still(report, past)
    text = (mine | still).text(MAX_STRETCHES)
    return text, number - len(mine) + len(mine | still) - len(Stretches.read(text))


def counted(report: Report) -> Pushes:
    """Return what one worker counted."""
    return Pushes(
        lost=report.lost, replayed=report.replayed, skipped=report.skipped, mixed=report.mixed
    )
