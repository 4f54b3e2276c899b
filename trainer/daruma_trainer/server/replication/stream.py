"""The stream to the next replica: over one connection, for as long as the membership names it."""

import logging
from collections.abc import Callable, Container, Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.contract import Member, Settings, Suspect
from daruma_trainer.layout import Ints
from daruma_trainer.links import Answer
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.messages import (
    decode_versions,
    encode_update,
    encode_whole,
)
from daruma_trainer.server.replication.outflow import MIN_WINDOW, Outflow
from daruma_trainer.wire import MAX_FRAME, Frame, Header, Kind, decode_json, encode_json, mask_of

LOG = logging.getLogger("daruma.server")
RETRY_SECONDS = 0.05
AT_ONCE = 4
"""Messages of whole slots between two turns of the loop: requests wait while they are copied."""
ROOM = MAX_FRAME - (64 << 10)
"""Bytes of parameters in one message."""


class Send(Enum):
    """What goes out by itself."""

    UPDATES = "updates"
    """Every update as it is made."""
    EVERY = "every"
    """Whole slots, every so many updates."""
    DEMAND = "demand"
    """Whole slots, when workers wait for their pushes to be covered."""


class Connection(Protocol):
    """To the next replica: a `links.Link`."""

    peer: Member
    connected: bool

    def request(self, header: Header, body: Sequence[Frame], answer: Answer | None) -> bool:
        """See Link."""

    def receive(
        self, ready: Container[object], unasked: Callable[[Any, Header, Sequence[Frame]], None]
    ) -> list[str]:
        """See Link."""

    def suspect(self, seconds: float) -> Suspect | None:
        """See Link."""

    def forget(self) -> None:
        """See Link."""

    def close(self) -> None:
        """See Link."""


def policy_of(settings: Settings, plane: DataPlane) -> Send:
    """Return what a head sends by itself."""
    if settings.chain:
        return Send.EVERY if settings.every_updates > 1 else Send.UPDATES
    # Workers' copies have no moments: of such tables every update has to be told.
    stateful = any(table.state for table in plane.shard.tables)
    return Send.UPDATES if stateful else Send.DEMAND


class Stream:
    """Of one shard to its next replica."""

    def __init__(
        self,
        plane: DataPlane,
        link: Connection,
        header: Callable[[Kind], Header],
        clock: Callable[[], float],
    ) -> None:
        self._plane, self.link, self._header, self._clock = plane, link, header, clock
        self.settings = Settings()
        self.relays = False
        """Whether this is no head: what came goes on as soon as it can."""
        self.counted_on = True
        """Whether this is the head, or a replica that the one before it counts on: else nobody has
        promised anything that the next one could keep."""
        self._out = Outflow(len(plane.slots.ids), self._window())
        self.joined = False
        """Whether pushes are not covered before the replica has them. From its first complete state
        on, until the membership drops it: a broken connection changes nothing."""
        self._told_joined = False
        self._joined_at = 0
        """As of which update pushes wait for the replica."""
        self._tables = 0
        """How many the stream was begun with."""
        self._retry_at: float | None = None
        self._flushed = 0
        """Of `every`: the update at which slots were last set to go out."""
        self._flushing: int | None = None
        """And the first such whose slots have not all come."""
        self._meanwhile = 0
        """Updates that came while the last ones of `every` were on their way."""
        self._flush: NDArray[np.bool_] = np.zeros(len(plane.slots.ids), np.bool_)
        """Of those that are sent every so many updates: slots that are to go out now."""
        self._allowance, self._allowed_at = 0.0, clock()
        self._more = False
        """Whether whole slots are left for the next turn."""
        self.bytes_total = 0

    @property
    def covered(self) -> int:
        """The last update up to which the replica has everything.

        What has yet to come to a replica itself, it need not pass on: the one before it may wait
        for its answers before it sends the rest.
        """
        return self._out.covered_in(self._whole) if self.relays else self._out.covered

    @property
    def busy(self) -> bool:
        """Whether something is to be done soon, though nobody sends anything."""
        return self._retry_at is not None or self._allowance < 0 or self._more

    def turn(self, ready: Container[object], *, demanded: bool) -> None:
        """Take in answers, and send what is due. `demanded`: workers wait for it."""
        now, out = self._clock(), self._out
        for event in self.link.receive(ready, lambda _link, _header, _frames: None):
            self.restart(RETRY_SECONDS if event == "disconnected" else 0.0)
        if self._retry_at is not None and now >= self._retry_at and self.link.connected:
            self._begin()
        elif len(self._plane.shard.specs) != self._tables and out.began:
            self.restart()
        self._pump(now, demanded=demanded)
        self._join()

    def restart(self, seconds: float = 0.0) -> None:
        """Begin anew in a while: ask the replica what it has."""
        self._out.reset(self._plane.updates)
        self.link.forget()
        self._told_joined = False
        self._flushing, self._meanwhile = None, 0
        self._retry_at = self._clock() + seconds

    def roll_back(self) -> None:
        """What the replica has is of a lineage that is no more."""
        self.joined = self._out.whole = False
        self.restart()

    def touched(self, k: Ints) -> None:
        """The slots `k` changed, in a way that only they themselves can tell."""
        self._out.update(self._plane.updates, k, 0, forward=False)

    def forward(self, frames: Sequence[Frame], k: Ints, workers: Sequence[int]) -> None:
        """The slots `k` were updated by a push; `workers`: whose batch it is.

        `frames`: the push without its header.
        """
        number, out = self._plane.updates, self._out
        goes = self._policy is Send.UPDATES and self._may_send(self._clock())
        clean = out.update(number, k, sum(len(frame) for frame in frames), forward=goes)
        if clean is None:
            return
        mask = mask_of(self._plane.slots.ids[k[clean]])
        if not self._send(
            Kind.UPDATE, encode_update(out.number + 1, mask, workers, frames), number
        ):
            out.unsent(k[clean], number)

    @property
    def _policy(self) -> Send:
        return policy_of(self.settings, self._plane)

    @property
    def _whole(self) -> NDArray[np.bool_]:
        """Which slots may go out whole: of a table that is new, the first values may be to come."""
        return self._plane.slots.ready & self._plane.given

    def _window(self) -> int:
        return max(MIN_WINDOW, 2 * self._plane.shard.nbytes)

    def _begin(self) -> None:
        specs, out = self._plane.shard.specs, self._out
        self._retry_at = None if specs else self._clock() + RETRY_SECONDS
        if not specs:
            return
        self._tables = len(specs)
        out.reset(self._plane.updates)
        out.window = self._window()
        body = [encode_json({"tables": [spec.to_json() for spec in specs]})]
        answer = partial(self._on_versions, out.stream)
        if not self.link.request(self._header(Kind.FOLLOW), body, answer):
            self._retry_at = self._clock() + RETRY_SECONDS

    def _on_versions(self, stream: int, header: Header, frames: Sequence[Frame]) -> None:
        if self._out.stream != stream:
            return
        if header.kind is Kind.REFUSED:
            self._refused(frames)
            return
        slots = self._plane.slots
        there = decode_versions(frames[1], len(slots.ids))
        # It may lack a table that is new: then it has nothing that would do for a promotion.
        self._out.whole &= bool((there.lineage > 0).all())
        same = (there.lineage == slots.lineage) & (there.position == slots.position)
        self._out.begin(same & self._whole & (there.lineage > 0))
        # Of those that are sent every so many updates: what was under way is due at once.
        self._flushed, self._flush = self._plane.updates, self._out.since > 0

    def _join(self) -> None:
        """Count on the replica once it has everything; it hears of that after it is so."""
        out = self._out
        if self._policy is Send.DEMAND:
            self.joined |= out.began
        elif out.began and out.whole and self.counted_on:
            if not self.joined:
                self.joined, self._joined_at = True, self._plane.updates
            lazy = self._policy is Send.EVERY  # of which nothing is ever promised
            if not self._told_joined and (lazy or out.passed(self._joined_at)):
                # What has waited since is not covered before it knows: else nobody promotes it.
                body = [encode_json({"number": out.number + 1})]
                self._told_joined = self._send(Kind.FOLLOW, body, self._joined_at)

    def _on_answer(self, stream: int, number: int, header: Header, frames: Sequence[Frame]) -> None:
        if self._out.stream != stream:
            return
        if header.kind is Kind.REFUSED:
            self._refused(frames)
        else:
            self._out.answered(number)

    def _refused(self, frames: Sequence[Frame]) -> None:
        message = decode_json(frames[1]).get("message")
        LOG.info("%s does not follow: %s", self.link.peer.id, message)
        self.restart(RETRY_SECONDS)

    def _send(self, kind: Kind, body: Sequence[Frame], floor: int) -> bool:
        """Send the stream's next message; False if the replica's queue is full."""
        out = self._out
        size = sum(len(frame) for frame in body)
        answer = partial(self._on_answer, out.stream, out.number + 1)
        if not self.link.request(self._header(kind), body, answer):
            return False
        out.sent(floor, size)
        self.bytes_total += size
        self._allowance -= size
        return True

    def _may_send(self, now: float) -> bool:
        """Whether spec.recovery.copiesBytesPerSecond lets anything go out."""
        rate = self.settings.copies_bytes_per_second
        if rate is None:
            self._allowance = 0.0
            return True
        # At most a burst of a second's bytes.
        self._allowance = min(rate, self._allowance + rate * (now - self._allowed_at))
        self._allowed_at = now
        return self._allowance > 0

    def _pump(self, now: float, *, demanded: bool) -> None:
        """Send slots whole where they are due, as many as may be under way."""
        out, plane, policy = self._out, self._plane, self._policy
        if not out.began:
            return
        wanted = self._whole
        if policy is Send.EVERY and not self.relays:
            self._set_due()
            wanted = wanted & (self._flush if out.whole else out.unseen)
        elif policy is Send.DEMAND and not (demanded or self.relays):
            return
        sizes = plane.shard.layout.slot_bytes

        def fit(k: Ints) -> int:
            return int(np.searchsorted(np.cumsum(sizes[k]), ROOM, side="right"))

        self._more = False
        for _ in range(AT_ONCE):
            found = out.next_whole(wanted, fit) if self._may_send(now) else None
            if found is None:
                return
            k, floor = found
            body = encode_whole(out.number + 1, plane.whole(k))
            if not self._send(Kind.WHOLE, body, floor):
                out.unsent(k, floor)
                return
            self._flush[k] = False
        self._more = True

    def _set_due(self) -> None:
        """Let slots go out where it is time (`every`)."""
        out, updates = self._out, self._plane.updates
        if self._flushing is not None and out.covered >= self._flushing:
            self._meanwhile = updates - self._flushing
            self._flushing = None
        # Until it has these it lacks what comes meanwhile, too: all that may be so many.
        due = max(1, self.settings.every_updates - self._meanwhile)
        if updates - self._flushed >= due or not out.whole:
            self._flushed, self._flush = updates, out.since > 0
            if self._flushing is None:
                self._flushing = updates
