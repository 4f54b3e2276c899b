"""Estimates of rework: right where training is a contraction, absent where it is not."""

import random
from math import exp, log, sqrt

import pytest

from daruma_operator.recovery.price import EXACT, UNKNOWN, Delta, DeltaKind
from daruma_operator.recovery.rework import Decay, estimate, fit
from daruma_trainer.contract import Move


def contraction(c: float, start: float, step: int, every: int, noise: float = 0.0) -> list[Move]:
    """The moves of x(t) = c^t x(0): its norm shrinks along a straight line."""
    rng = random.Random(0)
    return [
        Move(t, t + every, start * (c**t - c ** (t + every)) * exp(rng.gauss(0, noise)))
        for t in range(0, step, every)
    ]


def found(shards: list[list[Move]], servers: int, step: int) -> Decay:
    decay = fit(shards, servers, step)
    assert decay is not None
    return decay


@pytest.mark.parametrize("c", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("every", [1, 12, 50])
def test_a_contractions_rate_and_distance_are_found(c: float, every: int) -> None:
    step = 12 * every
    decay = found([contraction(c, 7.0, step, every)], 1, step)
    assert decay.rates == pytest.approx((-log(c), -log(c)), rel=1e-6)
    assert decay.distances == pytest.approx((7.0 * c**step,) * 2, rel=1e-6)


def test_shards_add_up_and_those_unheard_of_count_as_the_others() -> None:
    one = contraction(0.98, 3.0, 120, 12)
    whole = found([one, one, one, one], 4, 120)
    assert whole.distances[0] == pytest.approx(2 * 3.0 * 0.98**120)
    assert found([one, one], 4, 120).distances == pytest.approx(whole.distances)


def test_the_interval_holds_the_truth_where_moves_are_noisy() -> None:
    step, c = 180, 0.99
    decay = found([contraction(c, 5.0, step, 12, noise=0.05)], 1, step)
    assert decay.rates[0] < -log(c) < decay.rates[1]
    assert decay.distances[1] < 5.0 * c**step < decay.distances[0]


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param([], id="nothing"),
        pytest.param(contraction(0.9, 1.0, 4, 1), id="too few"),
        pytest.param([Move(t, t + 1, 1.0) for t in range(12)], id="a random walk"),
        pytest.param([Move(t, t + 1, 1.1**t) for t in range(12)], id="it diverges"),
        pytest.param([Move(t, t + 1, 9.0 if t % 2 else 1.0) for t in range(12)], id="it jumps"),
        pytest.param([Move(t, t + 1, 0.0) for t in range(12)], id="it stands still"),
    ],
)
def test_what_is_no_geometric_decay_is_unknown(moves: list[Move]) -> None:
    assert fit([moves], 1, 12) is None


def test_the_estimate_is_the_bound() -> None:
    c, start, step = 0.97, 4.0, 96
    decay = found([contraction(c, start, step, 12)], 1, step)
    delta = Delta(0.3, DeltaKind.UPPER_BOUND)
    expected = log(1 + 0.3 / (start * c**step)) / -log(c)
    interval = estimate(delta, decay)
    assert interval is not None
    assert interval == pytest.approx((0.0, expected), abs=1e-3)
    # A contraction that is thrown off by δ, away from x*, needs just so many steps more.
    thrown = start * c**step + 0.3
    needed = log(thrown / (start * c**step)) / -log(c)
    assert needed == pytest.approx(expected)


def test_nothing_lost_costs_nothing_and_the_unknown_is_not_guessed() -> None:
    assert estimate(EXACT, None) == (0.0, 0.0)
    assert estimate(UNKNOWN, None) is None
    assert estimate(Delta(sqrt(2), DeltaKind.UPPER_BOUND), None) is None
