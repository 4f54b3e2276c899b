"""Matrix factorisation by alternating least squares: rule `assign`, nothing random.

In a step the workers solve all users against the items that they pulled, and then, behind a
barrier, all items against those users. So whatever users were lost are solved anew from the items.
"""

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.bench.rework.problems import Table, Values
from daruma_trainer.layout import Floats
from daruma_trainer.rules import Assign

USERS, ITEMS, RANK = 160, 96, 5
OBSERVED = 0.4
RIDGE = 0.3


class Factors:
    """R ≈ U Vᵀ on the observed entries, with a ridge."""

    name = "mf"
    title = (
        f"matrix factorisation by ALS, {USERS} × {ITEMS} with {OBSERVED:.0%} observed, rank {RANK} "
        "and noise; a step solves all users, then all items; nothing is random after the initial "
        "values"
    )
    lr = 1.0
    budget = 140

    def __init__(self) -> None:
        rng = np.random.default_rng(21)
        scale = np.geomspace(1.0, 0.8, RANK)
        u, v = rng.normal(size=(USERS, RANK)) * scale, rng.normal(size=(ITEMS, RANK))
        noise = rng.normal(size=(USERS, ITEMS))
        self._mask = (rng.random((USERS, ITEMS)) < OBSERVED).astype(np.float64)
        self._seen = (u @ v.T + noise) * self._mask
        self._count = float(self._mask.sum())
        self.tables: tuple[Table, ...] = (
            Table("users", USERS, RANK, Assign()),
            Table("items", ITEMS, RANK, Assign()),
        )

    def initial(self, rng: np.random.Generator) -> Values:
        """See Problem.initial."""
        return [
            (0.3 * rng.normal(size=(1, t.rows, t.cols))).astype(np.float32) for t in self.tables
        ]

    def batch(self, rng: np.random.Generator, step: int) -> None:
        """See Problem.batch: nothing is drawn."""

    def derive(self, values: Values) -> Values:
        """See Problem.derive."""
        del values
        return []

    def pushes(self, values: Values, batch: None) -> Values:
        """See Problem.pushes."""
        del batch
        users = _solve(values[1], self._mask, self._seen)
        return [users, _solve(users, self._mask.T, self._seen.T)]

    def losses(self, values: Values) -> NDArray[np.float64]:
        """See Problem.losses: squared error and ridge, an observed entry."""
        users, items = (v.astype(np.float64) for v in values)
        error = (users @ items.transpose(0, 2, 1)) * self._mask - self._seen
        ridge = np.square(users).sum(axis=(1, 2)) + np.square(items).sum(axis=(1, 2))
        return np.asarray((np.square(error).sum(axis=(1, 2)) + RIDGE * ridge) / self._count)


def _solve(fixed: Floats, mask: NDArray[np.float64], seen: NDArray[np.float64]) -> Floats:
    """Solve each row of the other factor; `fixed` is (arms, n, rank), `mask` (rows, n)."""
    arms, n, rank = fixed.shape
    f = fixed.astype(np.float64)
    outer = (f[:, :, :, None] * f[:, :, None, :]).reshape(arms, n, rank * rank)
    gram = np.matmul(mask, outer).reshape(arms, len(mask), rank, rank)
    gram += RIDGE * np.eye(rank)
    return np.linalg.solve(gram, np.matmul(seen, f)[..., None])[..., 0].astype(np.float32)
