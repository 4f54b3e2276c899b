"""What benchmarks say of the bars that were set beforehand."""

import pytest

from daruma_trainer.bench.bars import Verdict, judge, table, worst

MET, NOT_RESOLVED, NOT_MET = Verdict.MET, Verdict.NOT_RESOLVED, Verdict.NOT_MET


@pytest.mark.parametrize(
    ("slack", "half", "expected"),
    [
        (0.2, 0.1, MET),
        (0.1, 0.1, MET),
        (0.0, 0.0, MET),
        (0.05, 0.1, NOT_RESOLVED),
        (-0.05, 0.1, NOT_RESOLVED),
        (-0.2, 0.1, NOT_MET),
        (0.2, None, NOT_RESOLVED),
    ],
)
def test_a_bar_within_the_interval_is_not_resolved(
    slack: float, half: float | None, expected: Verdict
) -> None:
    assert judge(slack, half) is expected


def test_the_worst_of_several_counts() -> None:
    assert worst([MET, NOT_RESOLVED, MET]) is NOT_RESOLVED
    assert worst([NOT_RESOLVED, NOT_MET]) is NOT_MET


def test_there_is_no_table_without_rows() -> None:
    assert table([], "a note") == []
