"""What the loss of servers costs this worker's program: how long, and how much of it in waiting."""

import time

from daruma_trainer.contract import Outage


class Outages:
    """The last outage: from a server's connection that broke to the first step with all of them.

    Under the client's lock.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._until: float | None = None
        self._blocked = 0.0
        """The program's seconds in `step()` when it began; once it is over, those within it."""
        self._gap = 0.0
        self._epoch = 0

    @property
    def on(self) -> bool:
        """Whether one goes on."""
        return self._since is not None and self._until is None

    def begin(self, blocked: float) -> None:
        """A server cannot be reached. `blocked`: seconds that the program waited so far."""
        if not self.on:
            self._since, self._until, self._blocked = time.monotonic(), None, blocked

    def end(self, blocked: float, epoch: int, gap: float) -> None:
        """The program has made a step with all servers. `gap`: the largest since it began."""
        if self.on:
            self._until, self._blocked = time.monotonic(), blocked - self._blocked
            self._epoch, self._gap = epoch, gap

    def report(self, blocked: float, epoch: int, gap: float) -> Outage | None:
        """Tell of it, as `end` would end it now. None: there was none."""
        if self._since is None:
            return None
        if self._until is None:
            seconds = time.monotonic() - self._since
            return Outage(seconds, blocked - self._blocked, gap, epoch)
        return Outage(self._until - self._since, self._blocked, self._gap, self._epoch, over=True)
