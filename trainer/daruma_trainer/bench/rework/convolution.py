"""A small convolutional network with Adam, in numpy so that all arms are computed at once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.bench.rework.problems import (
    Samples,
    Table,
    Values,
    digits,
    mean_cross_entropy,
    softmax_error,
)
from daruma_trainer.layout import Floats
from daruma_trainer.rules import Adam

SIDE, KERNEL, STRIDE = 8, 3, 2
PLACES = ((SIDE - KERNEL) // STRIDE + 1) ** 2
CHANNELS, HIDDEN = 8, 64
BATCH = 32


@dataclass(slots=True)
class Pass:
    """What a forward pass leaves for the backward one; all with a leading axis of arms."""

    maps: Floats
    """(arms, samples, channels × places)"""
    hidden: Floats
    logits: Floats


class Convolution:
    """Convolution, two dense layers, softmax; a row of each table is an output and its bias."""

    name = "cnn"
    budget = 300

    def __init__(self, samples: Samples | None = None) -> None:
        self._samples = samples or digits()
        self.title = (
            f"a convolutional network ({CHANNELS} maps of {KERNEL} × {KERNEL}, stride {STRIDE}, "
            f"{HIDDEN} hidden units), {len(self._samples.x)} of scikit-learn's digits; Adam, "
            f"batch {BATCH}"
        )
        self.lr = 1e-3
        rule = Adam(lr=self.lr)
        self.tables: tuple[Table, ...] = (
            Table("convolution", CHANNELS, KERNEL * KERNEL + 1, rule),
            Table("hidden", HIDDEN, CHANNELS * PLACES + 1, rule),
            Table("output", self._samples.classes, HIDDEN + 1, rule),
        )
        self._patches = _patches(self._samples.x[:, : SIDE * SIDE])

    def initial(self, rng: np.random.Generator) -> Values:
        """See Problem.initial: as torch initialises, uniform within 1/√inputs."""
        out = []
        for t in self.tables:
            bound = 1 / np.sqrt(t.cols - 1)
            out.append(rng.uniform(-bound, bound, (1, t.rows, t.cols)).astype(np.float32))
        return out

    def batch(self, rng: np.random.Generator, step: int) -> NDArray[np.int64]:
        """See Problem.batch."""
        del step
        return rng.integers(0, len(self._samples.x), BATCH)

    def derive(self, values: Values) -> Values:
        """See Problem.derive."""
        del values
        return []

    def pushes(self, values: Values, batch: NDArray[np.int64]) -> Values:
        """See Problem.pushes."""
        patches = self._patches[batch]
        done = _forward(values, patches)
        n, arms = len(batch), len(values[0])
        error = softmax_error(done.logits, self._samples.y[batch])
        output = _by_weights(error, done.hidden)
        error = np.matmul(error, values[2][:, :, :-1])
        error *= done.hidden > 0
        hidden = _by_weights(error, done.maps)
        error = np.matmul(error, values[1][:, :, :-1])
        error *= done.maps > 0
        by_place = error.reshape(arms, n * PLACES, CHANNELS)
        flat = patches.reshape(n * PLACES, -1)
        convolution = np.matmul(by_place.transpose(0, 2, 1), flat)
        return [convolution, hidden, output]

    def losses(self, values: Values) -> NDArray[np.float64]:
        """See Problem.losses."""
        out = np.empty(len(values[0]))
        y = self._samples.y
        for i in range(len(out)):
            done = _forward([v[i : i + 1] for v in values], self._patches)
            picked = done.logits[0, np.arange(len(y)), y].mean(dtype=np.float64)
            logits = np.ascontiguousarray(done.logits.transpose(2, 0, 1))
            out[i] = mean_cross_entropy(logits, np.array([picked]))[0]
        return out


def _patches(images: Floats) -> Floats:
    """(samples, places, kernel² + 1): the pixels below each position, and a one for the bias."""
    square = images.reshape(-1, SIDE, SIDE)
    windows = np.lib.stride_tricks.sliding_window_view(square, (KERNEL, KERNEL), axis=(1, 2))
    windows = windows[:, ::STRIDE, ::STRIDE].reshape(len(images), PLACES, KERNEL * KERNEL)
    ones = np.ones((len(images), PLACES, 1), np.float32)
    return np.concatenate([windows, ones], axis=2)


def _forward(values: Values, patches: Floats) -> Pass:
    arms, n = len(values[0]), len(patches)
    flat = patches.reshape(n * PLACES, -1)
    maps = np.matmul(flat, values[0].transpose(0, 2, 1))
    np.maximum(maps, 0, out=maps)
    maps = maps.reshape(arms, n, PLACES * CHANNELS)
    hidden = _dense(maps, values[1])
    np.maximum(hidden, 0, out=hidden)
    return Pass(maps, hidden, _dense(hidden, values[2]))


def _dense(inputs: Floats, table: Floats) -> Floats:
    out: Floats = np.matmul(inputs, table[:, :, :-1].transpose(0, 2, 1))
    out += table[:, None, :, -1]
    return out


def _by_weights(error: Floats, inputs: Floats) -> Floats:
    """Gradient of a dense layer's table: weights, and the bias as the last column."""
    weights = np.matmul(error.transpose(0, 2, 1), inputs)
    return np.concatenate([weights, error.sum(axis=1)[:, :, None]], axis=2)
