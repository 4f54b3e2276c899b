"""Sets of numbers as stretches do what sets do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daruma_trainer.contract import ContractError
from daruma_trainer.stretches import MOST, Stretches

NUMBERS = st.sets(st.integers(0, 40))


@given(NUMBERS, NUMBERS, st.integers(-1, 41))
def test_they_are_sets(one: set[int], other: set[int], last: int) -> None:
    a, b = Stretches.these(one), Stretches.these(other)
    assert set(a) == one
    assert list(a) == sorted(one)
    assert len(a) == len(one)
    assert set(a | b) == one | other
    assert set(a & b) == one & other
    assert set(a - b) == one - other
    assert set(a.up_to(last)) == {n for n in one if n <= last}
    assert Stretches.read(a.text()) == a
    gaps = zip(a.pairs, a.pairs[1:], strict=False)
    assert all(before + 1 < after for (_, before), (after, _) in gaps)


def test_all_that_can_be_read_can_be_counted() -> None:
    assert len(Stretches.read(f"0-{MOST}")) == MOST + 1


def test_a_million_are_one_stretch() -> None:
    most = Stretches.of((1, 10**12)) - Stretches.of((5, 5))
    assert most.text() == "1-4,6-1000000000000"
    assert most.text(1) == "6-1000000000000"
    assert len(most) == 10**12 - 1


@pytest.mark.parametrize(
    "text",
    ["4-2", "a-b", "1,,x", "1-2-3", "-1-2", f"1-{1 << 62}", "9" * 4000, "9" * 5000],
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ContractError, match="stretch"):
        Stretches.read(text)
