"""What a server sends to its next replica, and what is known to have come. Pure.

Every update that a server makes has a number. A slot is *clean* when all its updates were sent; an
update of clean slots goes out as it came (the gradient), anything else makes them dirty, and dirty
slots go out whole. So a replica that joins, one that is slow, and one that is to get the newest
state only now and then are one case. Messages are numbered, and connections keep their order: what
was sent when one broke is asked for (`begin`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.layout import Ints

MIN_WINDOW = 32 << 20
"""Bytes under way to a replica; never less, and twice the shard for large ones. Beyond it updates
are not sent one by one: a replica that is slow gets whole slots when it can take them."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message that was not answered yet."""

    floor: int
    """The first update that the replica lacks if it does not take this."""
    size: int


@dataclass(slots=True)
class Outflow:
    """Of one shard to one replica; slots are indices into the shard's."""

    slots: int
    window: int = MIN_WINDOW
    began: bool = False
    """Whether the replica said what it has."""
    whole: bool = False
    """Whether it has had every slot of this stream once."""
    stream: int = 0
    """Raised at each new beginning: answers to an older stream say nothing."""
    number: int = 0
    """Of the last message."""
    updates: int = 0
    """How many updates this stream has seen: the number of the last one."""
    since: Ints = field(init=False)
    """By slot: the first update that was not sent; 0: clean."""
    unseen: NDArray[np.bool_] = field(init=False)
    """By slot: whether the replica has had nothing of it in this stream."""
    _seen_by: int = 0
    """The message with which the replica has had every slot; 0: not sent yet."""
    _sent: dict[int, _Sent] = field(default_factory=dict)
    _bytes: int = 0
    _turn: int = 0

    def __post_init__(self) -> None:
        self.since = np.ones(self.slots, np.int64)
        self.unseen = np.ones(self.slots, np.bool_)

    def reset(self, updates: int) -> None:
        """The connection broke, or there are more tables: the replica is to say what it has."""
        self.began, self.number, self.updates = False, 0, updates
        self.stream += 1
        self.since[:] = 1
        self.unseen[:] = True
        self._seen_by = 0
        self._sent.clear()
        self._bytes = 0

    def begin(self, same: NDArray[np.bool_]) -> None:
        """The replica said what it has; `same`: slots that are as they are here, just now."""
        self.began = True
        self.since[same] = 0
        self.unseen[same] = False
        self.whole |= bool(same.all())

    def update(self, number: int, k: Ints, size: int, *, forward: bool) -> NDArray[np.bool_] | None:
        """The slots `k` were updated; returns which of them it is to be forwarded for, or None.

        `size`: bytes of the message; not `forward`: it can only go out with the whole slots.
        """
        self.updates = number
        clean = self.since[k] == 0
        room = not self._bytes or self._bytes + size <= self.window
        if not (self.began and forward and room and clean.any()):
            self.since[k[clean]] = number
            return None
        return np.asarray(clean)

    def sent(self, floor: int, size: int) -> None:
        """A message went out, the next in number."""
        self.number += 1
        if not self._seen_by and not self.unseen.any():
            self._seen_by = self.number
        self._sent[self.number] = _Sent(floor, size)
        self._bytes += size

    def next_whole(
        self, wanted: NDArray[np.bool_], take: Callable[[Ints], int]
    ) -> tuple[Ints, int] | None:
        """Return the slots that go out whole next, and the first update that they lack.

        `wanted`: which may; `take(slots)`: how many of these, which are in order, fit one message.
        None: none, or too much is under way. They count as clean from now on.
        """
        if not self.began or self._bytes > self.window // 2:
            return None
        dirty = np.flatnonzero((self.since > 0) & wanted)
        if not len(dirty):
            return None
        # In turn: those that are updated all the time must not keep the others waiting.
        dirty = np.roll(dirty, -int(np.searchsorted(dirty, self._turn)))
        last = np.flatnonzero(np.diff(dirty) < 0)
        run = dirty[: last[0] + 1] if len(last) else dirty
        k = run[: max(1, take(run))]
        floor = int(self.since[k].min())
        self.since[k] = 0
        self.unseen[k] = False
        self._turn = int(k[-1]) + 1
        return k, floor

    def unsent(self, k: Ints, floor: int) -> None:
        """What `next_whole` or `update` gave could not be sent."""
        if not self._seen_by:
            self.unseen[k] = True
        self.since[k] = np.where(self.since[k] > 0, np.minimum(self.since[k], floor), floor)

    def answered(self, number: int) -> None:
        """The replica took this message, and all before it."""
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._bytes -= sent.size
        # Not when nothing is under way: while training goes on that may never be.
        self.whole |= bool(self._seen_by) and number >= self._seen_by

    def passed(self, update: int) -> bool:
        """Whether everything up to an update was sent."""
        dirty = self.since[self.since > 0]
        return not len(dirty) or int(dirty.min()) > update

    @property
    def covered(self) -> int:
        """The last update up to which the replica has everything."""
        return self.covered_in(np.ones(self.slots, np.bool_))

    def covered_in(self, some: NDArray[np.bool_]) -> int:
        """The last update up to which the replica has everything of these slots."""
        floors = [s.floor for s in self._sent.values()]
        dirty = self.since[(self.since > 0) & some]
        if len(dirty):
            floors.append(int(dirty.min()))
        return min(floors) - 1 if floors else (self.updates if self.began else 0)
