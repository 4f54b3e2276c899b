"""How long a push takes: from when it was first sent until all slots have applied it."""

import math
import time
from array import array
from collections.abc import Callable

from daruma_trainer.histogram import Histogram

SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5,
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""From a small model's to those of an outage at its limit (recovery.replay.maxAgeSeconds)."""


class Latency:
    """Of one worker's batches, as it learns of it. Under the client's lock.

    It begins when the program hands a batch over, which is when it goes to all servers that can be
    reached; the wait for the others is part of it, and under `Sync` that for the other workers. A
    batch that was lost, or that a rollback dropped, was never applied by all: it does not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds since whenever."""
        self.seen = Histogram(SECONDS)
        self._clock = clock
        self._first = 1
        """The batch of the first of the times."""
        self._since = array("d")
        """By batch: eight bytes, as an outage has many. NaN: nothing is counted of it any more."""
        self._over = 0
        """How many NaNs there are at the front."""

    def sent(self, batch: int) -> None:
        """A new batch goes out: the next one, but after `forget`."""
        if batch != self._first + len(self._since):
            self.forget()
            self._first = batch
        self._since.append(self._clock())

    def applied(self, batch: int) -> None:
        """All slots have it. Said again, or of a batch that was lost: nothing."""
        at = batch - self._first
        if 0 <= at < len(self._since) and not math.isnan(since := self._since[at]):
            self.seen.observe(self._clock() - since)
            self._drop(at, at + 1)

    def lost(self, first: int, last: int) -> None:
        """Some slot will never have these."""
        self._drop(max(0, first - self._first), min(len(self._since), last + 1 - self._first))

    def forget(self) -> None:
        """Of what is under way nothing counts any more (a rollback)."""
        self._first += len(self._since)
        self._over = 0
        del self._since[:]

    def _drop(self, start: int, stop: int) -> None:
        for at in range(start, stop):
            self._since[at] = math.nan
        while self._over < len(self._since) and math.isnan(self._since[self._over]):
            self._over += 1
        if 2 * self._over > len(self._since):
            del self._since[: self._over]
            self._first += self._over
            self._over = 0
