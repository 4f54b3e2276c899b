"""`daruma bench availability`, one short run through the real processes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from daruma_trainer.bench.availability.arms import Arm, Fault, Scenario
from daruma_trainer.bench.availability.trial import Size, run
from daruma_trainer.contract import Role

pytestmark = pytest.mark.faults
MODEL_BYTES = 4 * 813_258


@pytest.mark.timeout(900)  # two workers that start torch on a busy machine, three times at most
def test_a_server_is_held_away_and_what_it_costs_is_seen() -> None:
    scored: list[int]

    def score(files: Sequence[Path]) -> list[tuple[float, float]]:
        scored.extend(file.stat().st_size for file in files)
        return [(0.5, 1.0)] * len(files)

    arm = Arm("freshest", "Async", {"strategy": "Freshest"})
    away = Scenario("server", "a server is held away", (Fault(Role.SERVER, 0.1, 0.3, 1),))
    # A run's time is fixed, what the machine does beside it is not: a busy one gets a longer run.
    for seconds in (5.0, 20.0, 60.0):
        scored = []
        size = Size(seconds, updates=20, evaluate=4, points=10)
        found = run(arm, away, 0, size, score)
        if found["recoveries"]:
            break
    assert scored == [MODEL_BYTES] * len(found["curve"])
    assert found["applied"] > 0
    ((begin, end),) = found["outages"]
    assert begin >= 0.5
    assert end >= 1.5
    (recovery,) = found["recoveries"]
    assert (recovery["cause"], recovery["outcome"]) == ("ServerLost", "Succeeded")
    assert recovery["phases"]["replace"] > (end - begin) / 2, "it had no place for so long"
    assert found["utilisation_outage"] > 0, "workers went on"
    assert found["bytes"]["push"] > MODEL_BYTES
    assert found["memory"]["worker"] > found["memory"]["server"] > 0
