"""A replay never raises the loss above its value at the kill by more than 10 %."""

import pytest

from daruma_trainer.bench.replay import BOUND, CELLS, Cell, measure


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.problem}-{c.rule}")
def test_a_replay_does_not_raise_the_loss(cell: Cell) -> None:
    outages = (10, 100, 1000) if cell.problem == "mlr" else (10, 100)
    for found in measure(cell, outages, 1, ("Auto", "Drop")):
        assert found.largest["Auto"] <= BOUND, found
        # And is worth something, or harms nothing.
        assert found.later["Auto"] <= found.later["Drop"] * 1.03, found


def test_a_sum_does_raise_it() -> None:
    """So the cells show what they are for."""
    (found,) = measure(CELLS[3], (100,), 1, ("Sum",))
    assert found.largest["Sum"] > 2
