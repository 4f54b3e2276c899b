"""The ladder: which rung can work, and why the others cannot."""

import pytest

from daruma_operator.api.spec import StrategyName
from daruma_operator.recovery.ladder import Means, Rung, find_rung, lacks

FULL, PARTIAL = StrategyName.FULL_CHECKPOINT, StrategyName.PARTIAL
STATELESS, FRESHEST = StrategyName.STATELESS, StrategyName.FRESHEST


@pytest.mark.parametrize(
    ("strategy", "means", "works"),
    [
        (FRESHEST, Means(store=False, cut=False, peers=True), True),
        (FRESHEST, Means(store=True, cut=False, peers=False), True),
        (FRESHEST, Means(store=False, cut=False, peers=False), False),
        (STATELESS, Means(store=True, cut=False, peers=False), True),
        (PARTIAL, Means(store=False, cut=False, peers=True), False),
        (PARTIAL, Means(store=True, cut=False, peers=False), True),
        (FULL, Means(store=True, cut=False, peers=True), False),
        (FULL, Means(store=True, cut=True, peers=False), True),
        (FULL, Means(store=True, cut=False, peers=False, nothing=True), True),
    ],
)
def test_what_each_strategy_needs(strategy: StrategyName, means: Means, works: bool) -> None:
    assert (lacks(strategy, means) is None) is works


def test_a_rung_that_cannot_work_is_passed_over_and_named() -> None:
    rung = find_rung([FULL, PARTIAL], 0, Means(store=True, cut=False, peers=False))
    assert rung == Rung(1, PARTIAL, ("FullCheckpoint: there is no full checkpoint",))


def test_the_end_of_the_ladder_gives_reasons() -> None:
    nothing = Means(store=False, cut=False, peers=False)
    found = find_rung([FRESHEST, FULL], 0, nothing)
    assert isinstance(found, str)
    assert "no worker is left" in found
    assert "full checkpoint" in found
    assert find_rung([FRESHEST], 1, nothing) == "every strategy of the job was tried"
