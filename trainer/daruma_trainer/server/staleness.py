"""How stale a push is: how many updates others made between its worker's pull and itself.

This is the τ of asynchronous SGD's theory (Lian et al., NeurIPS 2015), in updates of the slots that
the push is for; about (workers − 1) where all are equally fast. The server sees it: it alone knows
in which order it answered pulls and applied pushes, so nothing of it is on the wire.

A histogram, and no gauge: a rate is divided by the mean (staleness-aware SGD: Zhang et al., IJCAI
2016), and what spoils a run is the tail, a straggler's few pushes among thousands. A gauge shows
one push a scrape.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from daruma_trainer.histogram import Histogram
from daruma_trainer.layout import Ints

UPDATES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KEPT = 8
"""Answered pulls that are remembered of a worker. It is one at a time, but while a cut in the
making holds its pushes back."""


@dataclass(slots=True)
class _Course:
    """One worker's, in the slots of one message."""

    own: int = 0
    """Its updates."""
    pulled: list[tuple[int, int]] = field(default_factory=list)
    """Pulls that no push followed: the request's number, and how many updates of others it got."""


class Staleness:
    """Of all pushes that this process applied to its shard (`Async`, `Bounded`).

    A push counts from the newest pull that its worker put to this server before it; numbers of
    requests say so, since a push may wait for a cut that a later pull does not wait for. One
    without such a pull does not count: after a restore, or where a replica answered. A worker that
    runs ahead, as it does while a server is away, may not have taken that pull in yet: its pushes
    to the other servers are staler than it is said here.

    Slots that travel in one message are pulled and updated together: the first stands for all. As
    everywhere a part of a push that needs several messages counts as a push, and a replay as one.
    """

    def __init__(self) -> None:
        self.seen = Histogram(UPDATES)
        self._updates: dict[int, int] = defaultdict(int)
        """By a message's first slot."""
        self._courses: dict[tuple[int, int], _Course] = defaultdict(_Course)
        """By worker and a message's first slot."""

    def pulled(self, worker: int, request: int, k: Ints) -> None:
        """A worker's pull of the slots `k` is answered now. `request`: its number."""
        first = int(k[0])
        course = self._courses[worker, first]
        others = self._updates[first] - course.own
        course.pulled = [*course.pulled[1 - KEPT :], (request, others)]

    def applied(self, worker: int, request: int, k: Ints, new: Ints) -> None:
        """A worker's push for the slots `k` is applied now, to those that `new` names, if any."""
        if not len(new):
            return
        first = int(k[0])
        course = self._courses[worker, first]
        others = self._updates[first] - course.own
        self._updates[first] += 1
        course.own += 1
        before = [had for number, had in course.pulled if number < request]
        course.pulled = [pull for pull in course.pulled if pull[0] > request]
        if before:
            self.seen.observe(others - before[-1])
