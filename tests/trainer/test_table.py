"""A table's push is checked before it goes anywhere: what is wrong is never dropped in silence."""

from typing import Any, cast

import numpy as np
import pytest

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import TableSpec
from daruma_trainer.worker.job import Job
from daruma_trainer.worker.table import Table


def table(*shape: int) -> Table:
    spec = TableSpec(0, "topics", shape, 1, '{"rule": "assign"}')
    return Table(cast("Job", None), spec)


@pytest.mark.parametrize(
    ("shape", "rows", "delta", "sent"),
    [
        ((3, 2), None, np.ones((3, 2)), np.ones((3, 2))),
        ((3, 2), [2, 0], [[1, 2], [3, 4]], [[3, 4], [1, 2]]),
        ((3, 2), [1], [5, 6], [[5, 6]]),
        ((3,), [1, 2], [5, 6], [[5], [6]]),
        ((3, 2, 2), [1], np.ones((1, 2, 2)), np.ones((1, 4))),
        ((3, 2, 2), [0, 1], np.ones((2, 4)), np.ones((2, 4))),
        ((), None, 7.0, [[7.0]]),
        ((3, 2), [], [], np.zeros((0, 2))),
        ((0, 2), None, np.zeros((0, 2)), np.zeros((0, 2))),
    ],
)
def test_what_has_the_shape_of_its_rows_is_sent(
    shape: tuple[int, ...], rows: Any, delta: Any, sent: Any
) -> None:
    update = table(*shape).change(rows, delta)
    assert np.array_equal(update.values, sent)
    assert (None if update.rows is None else update.rows.tolist()) == (rows and sorted(rows))


@pytest.mark.parametrize(
    ("rows", "delta", "said"),
    [
        ([3], [[1, 2]], "has rows 0 to 2, and no row 3"),
        ([-1, 0], np.ones((2, 2)), "and no row -1"),
        ([1, 1], np.ones((2, 2)), "a row is pushed twice"),
        ([0, 1], np.ones((3, 2)), r"values of shape \(3, 2\) for 2 rows of shape \(2,\)"),
        (None, np.ones((2, 2)), r"values of shape \(2, 2\) for 3 rows of shape \(2,\)"),
        (None, np.ones((2, 3)), r"values of shape \(2, 3\) for 3 rows"),
        (None, np.ones(6), r"values of shape \(6,\) for 3 rows"),
        ([], [1.0], r"values of shape \(1,\) for 0 rows"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Any, delta: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"table 'topics'.*{said}"):
        table(3, 2).change(rows, delta)


def test_a_table_is_described_for_people() -> None:
    assert str(table(3, 2).spec) == '\'topics\' (shape (3, 2), {"rule": "assign"}, 1 row a block)'


@pytest.mark.parametrize("rows", [None, [0, 1, 2]])
def test_the_program_may_change_what_it_pushed(rows: Any) -> None:
    """It may go out, or out again, after the program went on."""
    delta = np.ones((3, 2), np.float32)
    assert not np.shares_memory(table(3, 2).change(rows, delta).values, delta)
