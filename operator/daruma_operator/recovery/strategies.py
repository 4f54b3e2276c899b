"""The strategies: presets of three choices (docs/architecture.md). The planner sees only those."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from daruma_operator.api.spec import StrategyName
from daruma_trainer.contract import SourceKind, WorkersMeanwhile


@dataclass(frozen=True, slots=True)
class Preset:
    """Which copies a strategy takes, and what survivors and workers do meanwhile."""

    sources: frozenset[SourceKind]
    rollback: bool
    """Survivors go back to the same cut; else they keep their values."""
    meanwhile: WorkersMeanwhile


_PEER, _RUNNING = SourceKind.PEER, SourceKind.RUNNING_CHECKPOINT
_FULL, _REPLICA = SourceKind.FULL_CHECKPOINT, SourceKind.REPLICA

PRESETS: Mapping[StrategyName, Preset] = {
    StrategyName.FULL_CHECKPOINT: Preset(frozenset({_FULL}), True, WorkersMeanwhile.WAIT),
    StrategyName.PARTIAL: Preset(frozenset({_RUNNING}), False, WorkersMeanwhile.WAIT),
    StrategyName.CHAIN: Preset(frozenset({_REPLICA}), False, WorkersMeanwhile.WAIT),
    StrategyName.STATELESS: Preset(frozenset({_PEER, _RUNNING}), False, WorkersMeanwhile.REPLAY),
    StrategyName.FRESHEST: Preset(
        frozenset({_REPLICA, _PEER, _RUNNING}), False, WorkersMeanwhile.REPLAY
    ),
}


def preset_of(strategy: str) -> Preset:
    """Return the preset of a strategy as status names it."""
    return PRESETS[StrategyName(strategy)]


def rolls_back(strategies: Iterable[StrategyName]) -> bool:
    """Whether cuts have to be taken for a ladder."""
    return any(PRESETS[s].rollback for s in strategies)


def keeps_running(strategies: Iterable[StrategyName]) -> bool:
    """Whether a running checkpoint has to be kept for a ladder."""
    return any(_RUNNING in PRESETS[s].sources for s in strategies)
