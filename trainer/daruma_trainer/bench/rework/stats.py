"""Means, intervals and reductions of rework. Two levels: seeds are drawn, then their failures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.bench.rework.arms import UNDISTURBED, Arm, Grid, Strategy
from daruma_trainer.bench.rework.trial import Run

Numbers = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm's result."""

    arm: str
    lost: int
    every: int
    rework: Interval
    reduction: Interval | None
    """Against FullCheckpoint at the same C; None where that had no rework."""
    capped: float
    """Share of runs past the cap."""
    delta: float
    """Mean ‖δ‖ of the parameters."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def resamples(seeds: int, failures: int, count: int = RESAMPLES) -> Numbers:
    """Weights (count, seeds × failures) of a two-level bootstrap; each row's sum is one."""
    rng = np.random.default_rng(3)
    weights = np.zeros((count, seeds, failures))
    for i in range(count):
        for seed in rng.integers(0, seeds, seeds):
            drawn = rng.integers(0, failures, failures)
            weights[i, seed] += np.bincount(drawn, minlength=failures)
    return weights.reshape(count, -1) / (seeds * failures)


def kappas(runs: Sequence[Run], arm: str) -> Numbers:
    """κ of an arm, seeds × failures in one row."""
    return np.array([k for run in runs for k in run.kappa[arm]], np.float64)


def cells(runs: Sequence[Run], grid: Grid, count: int = RESAMPLES) -> list[Cell]:
    """Return every arm's result."""
    weights = resamples(len(runs), len(runs[0].failures), count)
    base = kappas(runs, UNDISTURBED)
    full = {
        s.every: kappas(runs, s.name) - base for s in grid.savings() if s.strategy is Strategy.FULL
    }
    return [_cell(runs, arm, base, full[arm.saving.every], weights) for arm in grid.arms()]


def _cell(runs: Sequence[Run], arm: Arm, base: Numbers, full: Numbers, weights: Numbers) -> Cell:
    found = kappas(runs, arm.key)
    rework = found - base
    drawn, drawn_full = weights @ rework, weights @ full
    reduction = None
    # A resample in which even a full rollback cost nothing says nothing of a ratio.
    if full.mean() > 0 and (good := drawn_full > 0).any():
        ratios = 1 - drawn[good] / drawn_full[good]
        reduction = _interval(1 - rework.mean() / full.mean(), ratios)
    caps = np.array([run.cap for run in runs for _ in run.failures])
    deltas = np.array([d for run in runs for d in run.deltas[arm.key]])
    return Cell(
        arm.name, arm.lost, arm.saving.every, _interval(rework.mean(), drawn), reduction,
        float((found >= caps).mean()), float(deltas.mean()),
    )  # fmt: skip


def _interval(mean: float, drawn: Numbers) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(mean), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Standing:
    """What a way to save costs while nothing fails, a step."""

    name: str
    data: float
    """Bytes of blocks."""
    manifests: float
    """Bytes of manifests."""
    held_up_ms: float
    background_ms: float
    memory: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def standing(runs: Sequence[Run]) -> list[Standing]:
    """Return the standing costs."""
    out = []
    for name in runs[0].costs:
        costs = [run.costs[name] for run in runs]
        steps = sum(c.steps for c in costs)
        out.append(
            Standing(
                name,
                sum(c.data for c in costs) / steps,
                sum(c.manifests for c in costs) / steps,
                1000 * sum(c.held_up for c in costs) / steps,
                1000 * sum(c.background for c in costs) / steps,
                max(c.memory for c in costs),
            )
        )
    return out
