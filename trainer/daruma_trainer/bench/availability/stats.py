"""Means over seeds with their intervals, and how arms compare where time or gradients are equal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]
"""What `trial.run` returned."""
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t, for 1 to 9 degrees of freedom; above that the last is used."""
TIME, GRADIENTS, ACCURACY, LOSS = range(4)
"""Columns of a curve."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with half of its 95 % interval (Student); of one value there is none."""

    mean: float
    half: float | None
    count: int


def interval(values: Iterable[float | None]) -> Interval | None:
    """Return the mean of what there is; None: nothing."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Interval(mean, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))
    student = _STUDENT[min(len(found) - 1, len(_STUDENT)) - 1]
    return Interval(mean, student * spread / math.sqrt(len(found)), len(found))


def value_at(curve: Sequence[Sequence[float]], by: int, x: float, of: int) -> float | None:
    """Return a column's last value at or before `x` in column `by`; None: the curve is empty.

    Where a rollback takes gradients back the curve does not: those made again count again.
    """
    before = [point[of] for point in curve if point[by] <= x]
    if before:
        return float(before[-1])
    return float(curve[0][of]) if curve else None


def average(curve: Sequence[Sequence[float]], end: float, of: int) -> float | None:
    """Return a column's mean over time from 0 to `end`, each value holding until the next."""
    if not curve:
        return None
    times = [0.0, *(p[TIME] for p in curve[1:]), end]
    pieces = [p[of] * (b - a) for p, a, b in zip(curve, times, times[1:], strict=False)]
    return math.fsum(pieces) / end


def select(runs: Iterable[Run], scenario: str, arm: str | None = None) -> list[Run]:
    """Return the runs of a scenario, of one arm or of all."""
    return [r for r in runs if r["scenario"] == scenario and arm in (None, r["arm"])]


def equal_gradients(runs: Sequence[Run]) -> int:
    """Return how many gradients every one of these runs applied at least."""
    return min((int(r["curve"][-1][GRADIENTS]) for r in runs if r["curve"]), default=0)


def score(run: Run, measure: str, gradients: int) -> float | None:
    """Return one number of a run. `measure`: end, average, loss, or gradients (equal ones)."""
    curve, end = run["curve"], run["seconds"]
    match measure:
        case "end":
            return value_at(curve, TIME, end, ACCURACY)
        case "average":
            return average(curve, end, ACCURACY)
        case "loss":
            return value_at(curve, TIME, end, LOSS)
        case "gradients":
            return value_at(curve, GRADIENTS, gradients, ACCURACY)
        case _:
            raise ValueError(measure)


def paired(
    ours: Sequence[Run], theirs: Sequence[Run], measure: str, gradients: int = 0
) -> Interval | None:
    """Return by how much a measure is larger in `ours`, run by run of one seed."""
    other = {r["seed"]: score(r, measure, gradients) for r in theirs}
    differences = []
    for run in ours:
        mine, yours = score(run, measure, gradients), other.get(run["seed"])
        if mine is not None and yours is not None:
            differences.append(mine - yours)
    return interval(differences)


def phase_means(runs: Iterable[Run]) -> dict[str, Interval]:
    """Return the seconds of each phase of all recoveries, and of the whole (`seconds`)."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for record in run["recoveries"]:
            phases = {**record["phases"], "seconds": record["seconds"]}
            for name, seconds in phases.items():
                found.setdefault(name, []).append(float(seconds or 0.0))
    return {name: made for name, values in found.items() if (made := interval(values))}
