"""What is trained: tables, a step's pushes, and the loss on all data. Pure, many arms at once.

Every state array has a leading axis of *arms*: what became of one training run in as many ways.
All arms of one failure draw the same batches, so one pass of numpy computes all of them.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.layout import Floats
from daruma_trainer.programs.data import classification
from daruma_trainer.rules import SGD, Rule

Values = list[Floats]
"""One array (arms, rows, cols) for each table."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a problem."""

    name: str
    rows: int
    cols: int
    rule: Rule


class Problem(Protocol):
    """An iterative algorithm on tables."""

    name: str
    title: str
    """A sentence of what is trained on what, for the page."""
    tables: tuple[Table, ...]
    lr: float
    budget: int
    """Steps of a run without failures; ε is what the pilots' mean reaches at 60 % of it."""

    def initial(self, rng: np.random.Generator) -> Values:
        """Return initial values, with one arm."""

    def batch(self, rng: np.random.Generator, step: int) -> Any:
        """Draw all that is random in step number `step` (1: the first)."""

    def derive(self, values: Values) -> Values:
        """Return what is made from the tables alone and is quicker to keep than to make again.

        It may follow the tables in the `values` of `losses`, and of `pushes`, which then change all
        of it in place and return it. Nothing, for most.
        """

    def pushes(self, values: Values, batch: Any) -> Values:
        """Return what the workers push after a pull of `values`: whole tables."""

    def losses(self, values: Values) -> NDArray[np.float64]:
        """Return the loss of each arm on all data; shape (arms,)."""


ARMS_AT_ONCE = 16
"""Arms whose logits are computed together: more of them leave the cache."""


def mean_cross_entropy(logits: Floats, picked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean softmax cross-entropy of (classes, arms, samples); overwrites the logits.

    `picked` is the mean logit of the true classes; shape (arms,).
    """
    top = logits.max(axis=0)
    logits -= top
    np.exp(logits, out=logits)
    total = np.log(logits.sum(axis=0)) + top
    return np.asarray(total.mean(axis=1, dtype=np.float64) - picked)


def softmax_error(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    """Gradient of the mean cross-entropy by the logits (arms, batch, classes); overwrites them."""
    logits -= logits.max(axis=2, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=2, keepdims=True)
    logits[:, np.arange(len(labels)), labels] -= 1
    logits *= np.float32(1 / len(labels))
    return logits


@dataclass(frozen=True)
class Samples:
    """Features (n, d) with a last column of ones, and labels (n,)."""

    x: Floats
    y: NDArray[np.int64]
    classes: int


class Softmax:
    """Multinomial logistic regression by minibatch SGD; a row, so a block, for each feature."""

    def __init__(
        self, name: str, title: str, samples: Samples, settings: "SoftmaxSettings"
    ) -> None:
        self.name, self.title = name, title
        self.lr, self.budget = settings.lr, settings.budget
        self._batch, self._init = settings.batch, settings.init
        self.samples = samples
        self.tables: tuple[Table, ...] = (
            Table("weight", samples.x.shape[1], samples.classes, SGD(lr=self.lr)),
        )
        # The mean logit of the true class is linear in the weights.
        hot = np.eye(samples.classes, dtype=np.float64)[samples.y]
        self._picked = samples.x.T.astype(np.float64) @ hot / len(samples.x)
        self._xt = np.ascontiguousarray(samples.x.T)

    def initial(self, rng: np.random.Generator) -> Values:
        """See Problem.initial."""
        table = self.tables[0]
        start = rng.normal(size=(1, table.rows, table.cols)) * self._init
        return [start.astype(np.float32)]

    def batch(self, rng: np.random.Generator, step: int) -> NDArray[np.int64]:
        """See Problem.batch."""
        del step
        return rng.integers(0, len(self.samples.x), self._batch)

    def derive(self, values: Values) -> Values:
        """See Problem.derive."""
        del values
        return []

    def pushes(self, values: Values, batch: NDArray[np.int64]) -> Values:
        """See Problem.pushes."""
        x, y = self.samples.x[batch], self.samples.y[batch]
        error = softmax_error(np.matmul(x, values[0]), y)
        return [np.matmul(np.ascontiguousarray(x.T), error)]

    def losses(self, values: Values) -> NDArray[np.float64]:
        """See Problem.losses."""
        w = values[0]
        out = np.empty(len(w))
        for a in range(0, len(w), ARMS_AT_ONCE):
            part = w[a : a + ARMS_AT_ONCE]
            flat = np.ascontiguousarray(part.transpose(2, 0, 1)).reshape(-1, part.shape[1])
            logits = (flat @ self._xt).reshape(part.shape[2], len(part), -1)
            picked = np.tensordot(part.astype(np.float64), self._picked, axes=2)
            out[a : a + ARMS_AT_ONCE] = mean_cross_entropy(logits, picked)
        return out


@dataclass(frozen=True, slots=True)
class SoftmaxSettings:
    """How a softmax regression is trained."""

    lr: float
    budget: int
    batch: int
    init: float


def toy() -> Softmax:
    """Softmax regression on Gaussian features of very different scales."""
    rng = np.random.default_rng(20)
    n, d, k = 600, 64, 5
    scale = np.geomspace(1.0, 0.003, d)
    x = rng.normal(size=(n, d)) * scale
    truth = rng.normal(size=(d, k)) * 2
    y = (x @ truth + rng.gumbel(size=(n, k))).argmax(axis=1)
    features = np.hstack([x, np.ones((n, 1))]).astype(np.float32)
    return Softmax(
        "toy",
        f"softmax regression, {n} samples of {k} classes, {d} Gaussian features whose scales fall "
        "from 1 to 0.003; SGD, batch 32",
        Samples(features, y, k),
        SoftmaxSettings(lr=0.1, budget=300, batch=32, init=0.0),
    )


def digits() -> Samples:
    """Return scikit-learn's digits: the training samples that `programs.mlr` has."""
    (x, y), _ = classification("digits")
    return Samples(np.hstack([x, np.ones((len(x), 1), np.float32)]), y, 10)


def mlr() -> Softmax:
    """Multinomial logistic regression on the digits."""
    samples = digits()
    return Softmax(
        "mlr",
        f"multinomial logistic regression, {len(samples.x)} of scikit-learn's digits; SGD, "
        "batch 32",
        samples,
        SoftmaxSettings(lr=0.1, budget=300, batch=32, init=0.01),
    )
