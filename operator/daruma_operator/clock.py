"""The time that deadlines in status are measured by: a clock that nobody can set by a jump."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

RATE = 0.5
"""How much faster or slower than time this clock goes until it shows what the machine's does."""


def utc_now() -> datetime:
    """Return the machine's time with its zone."""
    return datetime.now(UTC)


class SteadyClock:
    """Shows the machine's time, but where that jumps, goes there by and by.

    Status has times, not durations, so that another operator may go on with it. A machine whose
    clock is set, or that slept, in the middle of a recovery would else find each deadline passed,
    and fail the job; or wait for hours, if it is set back.
    """

    def __init__(
        self,
        wall: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._shown, self._at = wall(), monotonic()

    def __call__(self) -> datetime:
        """Return the time. Of two calls the later one shows the later time."""
        at = self._monotonic()
        spent = timedelta(seconds=at - self._at)
        steady = self._shown + spent
        most = RATE * spent
        self._shown, self._at = steady + max(-most, min(most, self._wall() - steady)), at
        return self._shown
