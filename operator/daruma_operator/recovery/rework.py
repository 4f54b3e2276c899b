"""Estimate the iterations that a perturbation costs by SCAR's bound (Qiao et al., 2019). Pure.

Where x(t) comes nearer to x* by a factor c a step, a perturbation δ at step T costs at most
log(1 + ‖δ‖ / ‖x(T) − x*‖) / log(1/c) iterations. Neither c nor x* is known; but then the way gone
between steps a and b is ‖x(0) − x*‖ · (c^a − c^b), so the servers' own moves tell both. Where those
do not shrink geometrically, nothing is estimated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf, log, sinh, sqrt

from daruma_operator.recovery.price import Delta, DeltaKind
from daruma_trainer.contract import Move

MIN_MOVES = 5
"""Moves of a shard that a fit needs."""
RECENT = 8
"""Moves of a shard that are looked at: the rate changes in the course of training."""
MAX_SCATTER = 0.35
"""Standard deviation of the moves about the fit, in natural logarithms."""
SIGMAS = 2.0
"""Width of the interval for the rate, in standard errors on each side."""


@dataclass(frozen=True, slots=True)
class Decay:
    """A geometric approach to x*."""

    rates: tuple[float, float]
    """−log c, a step: the lower and the upper end."""
    distances: tuple[float, float]
    """‖x(T) − x*‖ that goes with each."""


def fit(shards: Iterable[Sequence[Move]], servers: int, step: int) -> Decay | None:
    """Fit one rate, and a distance at `step`, to the moves of several shards.

    Shards that were not heard of count as the mean of the others: which parameters a server holds
    is random. None: too few moves, or they do not shrink geometrically.
    """
    lines = [line for moves in shards if (line := _line(moves)) is not None]
    spread = sum(line.spread for line in lines)
    freedom = sum(len(line.points) for line in lines) - len(lines) - 1
    if not spread or freedom < 1:
        return None
    slope = sum(line.slope_weight for line in lines) / spread
    scatter = sum(line.residue(slope) for line in lines) / freedom
    error = SIGMAS * sqrt(scatter / spread)
    if sqrt(scatter) > MAX_SCATTER or slope + error >= 0.0:
        return None
    low, high = -(slope + error), -(slope - error)
    near, far = (_distance(lines, rate, servers, step) for rate in (high, low))
    return Decay((low, high), (far, near))


def estimate(delta: Delta, decay: Decay | None) -> tuple[float, float] | None:
    """Return the interval of iterations that δ costs; None: unknown."""
    if delta.kind is DeltaKind.EXACT:
        return (0.0, 0.0)
    if delta.value is None or decay is None:
        return None
    ends = [
        log(1.0 + delta.value / distance) / rate if distance > 0.0 else inf
        for rate, distance in zip(decay.rates, decay.distances, strict=True)
    ]
    # δ is an upper bound, so the cost may be anything below.
    return None if max(ends) == inf else (0.0, round(max(ends), 3))


@dataclass(frozen=True, slots=True)
class _Line:
    """The logarithms of a shard's speeds over time, about their means."""

    points: tuple[tuple[float, float], ...]
    middle: float
    height: float
    length: float
    """Steps of a move, in the mean."""

    @property
    def spread(self) -> float:
        return sum((t - self.middle) ** 2 for t, _ in self.points)

    @property
    def slope_weight(self) -> float:
        return sum((t - self.middle) * (y - self.height) for t, y in self.points)

    def residue(self, slope: float) -> float:
        return sum((y - self.height - slope * (t - self.middle)) ** 2 for t, y in self.points)


def _line(moves: Sequence[Move]) -> _Line | None:
    recent = [m for m in moves if m.last > m.first and 0.0 < m.norm < inf][-RECENT:]
    if len(recent) < MIN_MOVES:
        return None
    points = tuple(((m.first + m.last) / 2, log(m.norm / (m.last - m.first))) for m in recent)
    n = len(points)
    middle, height = sum(t for t, _ in points) / n, sum(y for _, y in points) / n
    return _Line(points, middle, height, sum(m.last - m.first for m in recent) / n)


def _distance(lines: Sequence[_Line], rate: float, servers: int, step: int) -> float:
    """‖x(step) − x*‖ over all servers: speeds, summed up from `step` to infinity."""
    squares = 0.0
    for line in lines:
        half = rate * line.length / 2
        # The mean speed over a move is a little more than the speed at its middle.
        bend = half / sinh(half) if half < 300 else 0.0
        speed = exp(min(700.0, line.height - rate * (step - line.middle))) * bend
        squares += (speed / rate) ** 2
    return sqrt(squares * servers / len(lines))
