"""`daruma bench memory`, small: what an outage adds to a worker is bounded, however long it is."""

import pytest

from daruma_trainer.bench.bars import ADDED
from daruma_trainer.bench.memory import Cell, Plan, measure, page

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
CELL = Cell("Stateless", "adam")


def test_an_outage_adds_no_more_than_the_bar() -> None:
    plan = Plan((CELL,), mb=40, outages=(2.0, 6.0), before=3.0, after=1.0)
    result = measure(plan)
    (row,) = result["rows"]
    model = 1_000_000 * plan.mb
    assert row["before"] > model, "the worker has a copy of the table at least"
    assert row["batches"][1] > row["batches"][0] > 0, "it went on while the server was away"
    # Half of the table is the lost server's: what is kept for it is as large.
    assert 0.4 < max(row["added"]) <= ADDED
    assert "| Stateless | 1 | adam | dense |" in page(result)
