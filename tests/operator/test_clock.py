"""A clock that is set in the middle of something."""

from datetime import UTC, datetime, timedelta

import pytest

from daruma_operator.clock import RATE, SteadyClock

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = 3600.0


class Machine:
    """Its clock, which can be set, and the seconds that have passed."""

    def __init__(self) -> None:
        self.passed = self.set_by = 0.0
        self.clock = SteadyClock(
            lambda: START + timedelta(seconds=self.passed + self.set_by), lambda: self.passed
        )

    def after(self, seconds: float) -> float:
        """Let time pass; returns what the clock shows then, in seconds since the start."""
        self.passed += seconds
        return (self.clock() - START).total_seconds()


def test_it_shows_the_machines_time() -> None:
    machine = Machine()
    machine.set_by = 0.5  # a correction that is no jump
    assert machine.after(10.0) == 10.5
    assert machine.after(10.0) == 20.5


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_passes_no_deadline_and_puts_none_off(jump: float) -> None:
    machine = Machine()
    assert machine.after(1.0) == 1.0
    machine.set_by = jump
    before = 1.0
    for _ in range(120):
        shown = machine.after(1.0)
        assert shown - before == pytest.approx(1.0 + (RATE if jump > 0 else -RATE))
        before = shown
    machine.after(3 * HOUR)
    assert machine.after(0.0) == machine.passed + jump, "at last it shows what the machine's does"
