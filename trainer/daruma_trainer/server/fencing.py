"""When a server may no longer be sure that it is the one: fencing without clocks and operator.

A server that stood still for a second, or heard nobody for two, may have been replaced meanwhile.
Before it answers again it asks two members for the newest membership (all there are, if fewer).
Until one answers it refuses with `Unsure`; if it was replaced it learns so here, and ends.
"""

import time
from collections.abc import Callable, Sequence

STILL_SECONDS = 1.0
SILENT_SECONDS = 2.0
ANSWER_SECONDS = 0.3
"""Then the members are asked again; one answer of those asked is enough from here on."""
ASKED = 2


class Fence:
    """Whether this server may answer."""

    def __init__(
        self, ask: Callable[[int], Sequence[str]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        """Ask so many members for their newest membership; returns whom."""
        self._clock = clock
        self._turned_at = clock()
        self._heard_at = clock()
        self._doubt_since: float | None = None
        self._asked: set[str] = set()
        self._answered: set[str] = set()

    def turn(self) -> None:
        """The loop goes round; a long gap since the last time means that it stood still."""
        now = self._clock()
        if now - self._turned_at > STILL_SECONDS:
            self._doubt(now)
        self._turned_at = now

    def heard(self) -> None:
        """A member spoke. The first word after a silence is doubted, whoever says it."""
        now = self._clock()
        if self._doubt_since is None and now - self._heard_at > SILENT_SECONDS:
            self._doubt(now)
        self._heard_at = now

    def answered(self, member: str) -> None:
        """A member told its newest membership, and we are still in it."""
        if member in self._asked:
            self._answered.add(member)
            if len(self._answered) >= min(ASKED, len(self._asked)):
                self._doubt_since = None

    def sure(self) -> bool:
        """Return whether a request may be answered; asks around if it may not."""
        now = self._clock()
        if self._doubt_since is None and now - self._heard_at > SILENT_SECONDS:
            self._doubt(now)
        if self._doubt_since is None:
            return True
        if now - self._doubt_since > ANSWER_SECONDS:
            if self._answered:
                self._doubt_since = None
                return True
            self._doubt(now)
        return False

    def _doubt(self, now: float) -> None:
        self._doubt_since = now
        self._answered.clear()
        self._asked = set(self._ask(ASKED))
