"""When what waits to be covered has to go to a replica: no other worker has it in time. Pure.

Workers pull after each of their pushes, and a copy of theirs costs nothing. So nothing is sent
while that is likely to do: only when a worker has as many uncovered pushes as it may have and the
others are too slow for it, when it waits already, or when it pushes no more and nobody comes.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

PATIENCE_SECONDS = 0.1, 30.0
"""A worker rests that has not pushed for two of its steps: at least and at most so long."""
LIVELY = 3
"""So many of its steps without a push, and a worker is none that pulls in time."""
LIVELY_SECONDS = 1.0
"""But never less."""


@dataclass(slots=True)
class _Pace:
    """Of one worker's pushes."""

    batch: int
    newest: float
    """The last one, and when it came."""
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    """Seconds between those before it; some may be pauses."""

    @property
    def gap(self) -> float:
        return median(self.gaps) if self.gaps else 0.0


@dataclass(slots=True)
class Demand:
    """Of one shard's workers; times are of any one clock, in seconds."""

    _paces: dict[int, _Pace] = field(default_factory=dict)

    def pushed(self, worker: int, batch: int, now: float) -> None:
        """A batch of a worker came, or a part of it."""
        pace = self._paces.get(worker)
        if pace is None:
            self._paces[worker] = _Pace(batch, now)
        elif batch > pace.batch:
            pace.gaps.append(now - pace.newest)
            pace.batch, pace.newest = batch, now

    def heard(self, worker: int, now: float) -> None:
        """A worker is there; which batches it makes is to be seen."""
        self._paces.setdefault(worker, _Pace(0, now))

    def forget(self, worker: int) -> None:
        """A worker was lost: its successor may make older batches again, at a pace of its own."""
        self._paces.pop(worker, None)

    def rests(self, worker: int, now: float) -> bool:
        """Whether a worker has pushed nothing for so long that it may be at its end."""
        pace, (least, most) = self._paces.get(worker), PATIENCE_SECONDS
        return pace is None or now - pace.newest > min(max(least, 2 * pace.gap), most)

    def in_time(self, worker: int, limit: int, now: float) -> set[int]:
        """Return which workers push, so pull, at least once in `limit` of this worker's steps."""
        most = limit * self._paces[worker].gap
        return {
            other
            for other, pace in self._paces.items()
            if pace.gap <= most and now - pace.newest <= max(LIVELY * pace.gap, LIVELY_SECONDS)
        }
