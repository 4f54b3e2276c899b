"""The study of the bound: random, adversarial and reset perturbations of contractions.

If ‖f(x) − x*‖ ≤ c‖x − x*‖, then after k steps the distance is at most cᵏ‖x(0) − x*‖, and that is
how many steps it takes to be *sure* of ε. A perturbation δ at step T adds at most
log(1 + ‖δ‖ / (cᵀ‖x(0) − x*‖)) / log(1/c) to them (SCAR). Rework is counted against that promise; a
step is whole, so against ⌈bound⌉. The assumption holds in both families:

* random linear contractions that shrink the start by exactly c a step, so that the run without
  failure keeps the promise to the step and rework is the measured difference of two runs;
* gradient descent on softmax regression with a ridge, which is strongly convex. Its runs are ahead
  of the promise, so its rework may be negative.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Map = Callable[[Vector], Vector]
"""x − x* of the next step from x − x*."""
MAX_STEPS = 100_000


class Kind(StrEnum):
    """What a failure does to the parameters."""

    RANDOM = "random"
    """A Gaussian direction."""
    ADVERSARIAL = "adversarial"
    """Straight away from x*."""
    RESET = "reset"
    """A random part of the coordinates back to x(0)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One perturbation of one iteration."""

    kind: Kind
    rework: float
    bound: float

    @property
    def limit(self) -> int:
        """⌈bound⌉, but for rounding."""
        return max(0, int(np.ceil(self.bound - 1e-9)))

    @property
    def violated(self) -> bool:
        """Whether it cost more than the bound allows."""
        return self.rework > self.limit


@dataclass(frozen=True, slots=True)
class Summary:
    """All samples of one kind."""

    family: str
    kind: str
    trials: int
    violations: int
    tightness: float
    """Median of rework ÷ ⌈bound⌉."""
    largest: float
    """Largest of the same; above 1 would be a violation."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def steps_until(step: Map, x: Vector, radius: float) -> int:
    """Steps until ‖x − x*‖ ≤ radius."""
    for n in range(MAX_STEPS):
        if np.linalg.norm(x) <= radius:
            return n
        x = step(x)
    raise ArithmeticError(f"not within {radius} after {MAX_STEPS} steps: no contraction")


def perturb(kind: Kind, x: Vector, start: Vector, rng: np.random.Generator) -> Vector:
    """Return x + δ."""
    if kind is Kind.RESET:
        lost = rng.random(x.size) < rng.choice([0.25, 0.5, 0.75])
        return np.where(lost, start, x)
    size = np.linalg.norm(x) * 10 ** rng.uniform(-1, 1)
    direction = x if kind is Kind.ADVERSARIAL else rng.normal(size=x.size)
    return np.asarray(x + size * direction / np.linalg.norm(direction))


def bound(delta: float, rate: float, at: int, start: float) -> float:
    """The bound on rework of one perturbation at step `at`."""
    return float(np.log1p(delta / (rate**at * start)) / np.log(1 / rate))


def contraction(rng: np.random.Generator) -> tuple[Map, float, Vector]:
    """A random linear contraction: its map, its rate c, and a start along its slowest direction.

    Half of them shrink every direction by c and turn it (an orthogonal matrix times c), half are
    symmetric with eigenvalues in (0, c], started in the eigenspace of c.
    """
    n = int(rng.integers(2, 33))
    rate = float(rng.uniform(0.5, 0.98))
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    if rng.random() < 0.5:
        matrix, start = rate * q, rng.normal(size=n)
    else:
        spectrum = np.sort(rng.uniform(0, rate, n))[::-1]
        spectrum[0] = rate
        matrix, start = q @ np.diag(spectrum) @ q.T, q[:, 0] * rng.normal()
    return (lambda x: matrix @ x), rate, start * 10 ** rng.uniform(0, 2)


def study_contractions(trials: int, seed: int) -> list[Sample]:
    """Perturb random contractions, each in all three ways."""
    found = []
    for i in range(trials):
        rng = np.random.default_rng([seed, i])
        step, rate, start = contraction(rng)
        found += [_sample(kind, step, rate, start, rng) for kind in Kind]
    return found


def _sample(kind: Kind, step: Map, rate: float, start: Vector, rng: np.random.Generator) -> Sample:
    at = int(rng.integers(1, 40))
    x = start
    for _ in range(at):
        x = step(x)
    changed = perturb(kind, x, start, rng)
    delta = float(np.linalg.norm(changed - x))
    size = float(np.linalg.norm(start))
    # Well beyond the failure, so that the perturbed run has something left to do.
    radius = rate ** (at + rng.integers(10, 60)) * size * (1 + 1e-9)
    rework = steps_until(step, changed, radius) - steps_until(step, x, radius)
    return Sample(kind, rework, bound(delta, rate, at, size))


class Ridge:
    """Gradient descent on softmax regression with a ridge; full batch, so nothing is random."""

    def __init__(self, rng: np.random.Generator) -> None:
        n, d, self.k = 120, 8, 3
        self.x = rng.normal(size=(n, d))
        self.y = np.eye(self.k)[(self.x @ rng.normal(size=(d, self.k))).argmax(axis=1)]
        self.ridge = float(rng.uniform(0.05, 0.3))
        # The Hessian of softmax is at most half of the features' second moment.
        largest = 0.5 * float(np.linalg.eigvalsh(self.x.T @ self.x / n)[-1]) + self.ridge
        self.lr = 2 / (largest + self.ridge)
        self.rate = 1 - self.lr * self.ridge
        self.shape = (d, self.k)
        self.best = np.zeros(d * self.k)
        for _ in range(MAX_STEPS):
            gradient = self.gradient(self.best)
            if np.linalg.norm(gradient) < 1e-13:
                break
            self.best = self.best - self.lr * gradient

    def gradient(self, w: Vector) -> Vector:
        """Gradient of the mean loss and the ridge."""
        logits = self.x @ w.reshape(self.shape)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        flat = (self.x.T @ (p - self.y) / len(self.x)).ravel()
        return np.asarray(flat + self.ridge * w)

    def step(self, x: Vector) -> Vector:
        """One step, around the optimum."""
        w = x + self.best
        return np.asarray(w - self.lr * self.gradient(w) - self.best)


def study_softmax(trials: int, seed: int) -> list[Sample]:
    """Perturb strongly convex regressions; rework is counted from the promised step."""
    found = []
    for i in range(trials):
        rng = np.random.default_rng([seed, 1, i])
        problem = Ridge(rng)
        start = -problem.best + rng.normal(size=problem.best.size)
        for kind in Kind:
            at = int(rng.integers(1, 20))
            x = start
            for _ in range(at):
                x = problem.step(x)
            changed = perturb(kind, x, start, rng)
            size, rate = float(np.linalg.norm(start)), problem.rate
            promised = at + int(rng.integers(5, 20))
            radius = max(rate**promised * size, 1e-9)
            took = at + steps_until(problem.step, changed, radius)
            limit = bound(float(np.linalg.norm(changed - x)), rate, at, size)
            found.append(Sample(kind, took - promised, limit))
    return found


def summarise(family: str, samples: list[Sample]) -> list[Summary]:
    """One row a kind."""
    out = []
    for kind in Kind:
        mine = [s for s in samples if s.kind is kind]
        ratio = [s.rework / s.limit for s in mine if s.limit]
        out.append(
            Summary(
                family, kind.value, len(mine), sum(s.violated for s in mine),
                float(np.median(ratio)), float(max(ratio)),
            )
        )  # fmt: skip
    return out


def study(trials: int, seed: int = 0) -> list[Summary]:
    """The whole study; the regressions are a tenth of it, because they take longer."""
    return [
        *summarise("linear contractions", study_contractions(trials, seed)),
        *summarise("softmax with a ridge", study_softmax(max(1, trials // 10), seed)),
    ]
