"""How long a push takes: from when it was first sent until all slots have applied it."""

import time
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
        self._since: dict[int, float] = {}

    def sent(self, batch: int) -> None:
        """A new batch goes out."""
        self._since[batch] = self._clock()

    def applied(self, batch: int) -> None:
        """All slots have it. Said again, or of a batch that was lost: nothing."""
        since = self._since.pop(batch, None)
        if since is not None:
            self.seen.observe(self._clock() - since)

    def lost(self, first: int, last: int) -> None:
        """Some slot will never have these."""
        self._since = {b: at for b, at in self._since.items() if not first <= b <= last}

    def forget(self) -> None:
        """Of what is under way nothing counts any more (a rollback)."""
        self._since.clear()
