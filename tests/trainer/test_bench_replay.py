"""A replay never raises the loss above its value at the kill by more than 10 %."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from daruma_trainer.bench import replay
from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.replay import AFTER, BOUND, CELLS, Cell, World, measure
from daruma_trainer.bench.rework.problems import Table, Values
from daruma_trainer.layout import Floats
from daruma_trainer.rules import SGD, Adagrad, Adam
from daruma_trainer.worker.pushes import Update
from daruma_trainer.worker.residual import Residual


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.problem}-{c.rule}")
def test_a_replay_does_not_raise_the_loss(cell: Cell) -> None:
    # The longest ride of all is momentum's after 1,000 steps; Adam's is of one step, however long.
    outages = (10, 1000) if cell.problem == "mlr" and cell.rule != "Adam" else (10, 100)
    for found in measure(cell, outages, 1, ("Auto", "Drop")):
        assert found.largest["Auto"] <= BOUND, found
        assert 0 < found.rode["Auto"] < AFTER
        assert found.rode["Drop"] == 0
        # And is worth something, or harms nothing.
        assert found.later["Auto"] <= found.later["Drop"] * 1.03, found


def test_a_loss_that_rises_late_in_a_ride_is_seen() -> None:
    """Of a replay that does not heed where gradients turn: it goes too far after 14 steps."""
    with mock.patch.object(Residual, "_agrees", return_value=True):
        (found,) = measure(CELLS[0], (500,), 1, ("Auto",))
    assert found.largest["Auto"] > BOUND
    assert found.rode["Auto"] > 10


def test_what_still_rides_at_the_end_is_an_error() -> None:
    with (
        mock.patch.object(Residual, "_agrees", return_value=True),
        mock.patch.object(replay, "AFTER", 5),
        pytest.raises(BenchError, match="still rides 5 steps"),
    ):
        measure(CELLS[1], (10,), 1, ("Auto",))


def test_a_sum_does_raise_it() -> None:
    """So the cells show what they are for."""
    (found,) = measure(CELLS[3], (100,), 1, ("Sum",))
    assert found.largest["Sum"] > 2


WORDS, SIZE, CLASSES, LENGTH, SAMPLES = 400, 8, 5, 6, 2000


class Bags:
    """Classes of bags of words: an embedding, few of whose rows a batch has, and a linear layer."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        often = 1 / np.arange(1, WORDS + 1)
        self._bags = rng.choice(WORDS, (SAMPLES, LENGTH), p=often / often.sum())
        self.tables = (Table("words", WORDS, SIZE, SGD()), Table("head", SIZE, CLASSES, SGD()))
        values = [2 * value for value in self.initial(rng)]
        self._classes = self._probabilities(values, np.arange(SAMPLES))[1].argmax(1)

    def initial(self, rng: np.random.Generator) -> Values:
        shapes = [(1, table.rows, table.cols) for table in self.tables]
        return [np.float32(0.3) * rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def batch(self, rng: np.random.Generator, step: int) -> Any:
        del step
        return rng.integers(0, SAMPLES, 32)

    def _probabilities(self, values: Values, chosen: Any) -> tuple[Floats, Floats]:
        hidden = values[0][0][self._bags[chosen]].mean(1)
        logits = hidden @ values[1][0]
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return hidden, raised / raised.sum(1, keepdims=True)

    def pushes(self, values: Values, batch: Any) -> Values:
        hidden, slope = self._probabilities(values, batch)
        slope[np.arange(len(batch)), self._classes[batch]] -= 1
        slope /= len(batch)
        words = np.zeros_like(values[0])
        back = np.repeat(slope @ values[1][0].T / LENGTH, LENGTH, axis=0)
        np.add.at(words[0], self._bags[batch].reshape(-1), back)
        return [words, (hidden.T @ slope)[None]]

    def losses(self, values: Values) -> NDArray[np.float64]:
        found = self._probabilities(values, np.arange(SAMPLES))[1]
        return np.array([-np.log(found[np.arange(SAMPLES), self._classes] + 1e-9).mean()])


class RowWise(World):
    """Of the embedding workers push the rows that a batch has."""

    def updates(self, gradients: Sequence[Floats]) -> tuple[Update, ...]:
        words, head = super().updates(gradients)
        rows = np.flatnonzero(words.values.any(axis=1))
        return Update(0, words.lr, words.values[rows], rows), head


@pytest.mark.parametrize(
    "cell",
    [
        Cell("mlr", "SGD", SGD(), 1.0),
        Cell("mlr", "momentum", SGD(momentum=0.9), 0.1),
        Cell("mlr", "Adam", Adam(), 0.01),
        Cell("mlr", "Adagrad", Adagrad(), 0.05),
    ],
    ids=lambda cell: cell.rule,
)
def test_a_replay_of_single_rows_does_not_either(cell: Cell) -> None:
    outages = (10, 1000) if cell.rule in ("SGD", "Adam") else (10, 100)
    with mock.patch.multiple(replay, World=RowWise, mlr=Bags):
        outcomes = measure(cell, outages, 1, ("Auto", "Drop"))
    for found in outcomes:
        assert found.largest["Auto"] <= BOUND, found
        assert found.later["Auto"] <= found.later["Drop"] * 1.03, found
