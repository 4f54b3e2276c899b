"""The ladder: a job's strategy, then its fallbacks, then initial values if they are allowed."""

from collections.abc import Sequence
from dataclasses import dataclass

from daruma_operator.api.spec import StrategyName
from daruma_operator.recovery.strategies import PRESETS
from daruma_trainer.contract import SourceKind


@dataclass(frozen=True, slots=True)
class Means:
    """What there is to recover from."""

    store: bool
    """The job has a store."""
    cut: bool
    """A consistent cut is known to exist."""
    peers: bool
    """A worker that lives may hold a copy."""
    replicas: bool = False
    """Every lost server lives on in a replica that has all."""
    predecessors: bool = False
    """Every lost server has a predecessor that is frozen, and can hand its slots over."""
    nothing: bool = False
    """No lost server has slots: there is nothing to recover."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder that can be tried."""

    number: int
    strategy: StrategyName
    skipped: tuple[str, ...] = ()
    """Why those before it could not be."""


def find_rung(ladder: Sequence[StrategyName], start: int, means: Means) -> Rung | str:
    """Return the first rung from `start` on that has a source; else the reasons, as a sentence."""
    skipped: list[str] = []
    for number in range(start, len(ladder)):
        missing = lacks(ladder[number], means)
        if missing is None:
            return Rung(number, ladder[number], tuple(skipped))
        skipped.append(f"{ladder[number]}: {missing}")
    return "; ".join(skipped) or "every strategy of the job was tried"


def lacks(strategy: StrategyName, means: Means) -> str | None:
    """Return why a strategy cannot work at all, or None."""
    preset = PRESETS[strategy]
    if means.nothing:
        return None
    if preset.rollback:
        return None if means.cut else "there is no full checkpoint"
    if means.predecessors or (SourceKind.REPLICA in preset.sources and means.replicas):
        return None
    if preset.sources == {SourceKind.REPLICA}:
        return "no replica of it is left that has everything"
    if SourceKind.PEER in preset.sources and means.peers:
        return None
    if SourceKind.RUNNING_CHECKPOINT in preset.sources and means.store:
        return None
    if SourceKind.PEER in preset.sources:
        return "no worker is left that holds a copy, and the job has no store"
    return "the job has no store"
