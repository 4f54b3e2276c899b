"""Values that this server has overwritten, from a worker that has them still, to one in need.

Under `Sync` a worker may die between its push to one server and to the next: one has made the step
and the other waits. The replacement computes that batch again, on what all slots were before it. It
asks the server that went on; the server hands the question to the live workers, one after the
other, and their answer back. Nothing is kept of an answer that does not come: the question is asked
again, and goes to the next one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daruma_trainer.contract import Member, Membership, Role
from daruma_trainer.server.replies import Reply, refuse, worker_of
from daruma_trainer.wire import (
    BITMAP,
    ORIGIN,
    PULL,
    Frame,
    Header,
    Kind,
    MalformedError,
    Refusal,
    decode_state,
)

FIRST = 1 << 20
"""Numbers of requests to workers from here on are of this module; a restore's are far below."""
MAX_OPEN = 1024


@dataclass(frozen=True, slots=True)
class _Question:
    asker: bytes
    header: Header
    batch: int
    asked: str


class Relay:
    """Questions under way; for the serve loop alone."""

    def __init__(self, send: Callable[[str, int, bytes], bool]) -> None:
        """`send`: put a question of this number to a worker; False: it cannot be reached now."""
        self._send = send
        self._numbers = itertools.count(FIRST)
        self._open: dict[int, _Question] = {}
        self._without: dict[bytes, tuple[tuple[int, int], set[str]]] = {}
        """By asker: the last (generation, batch) it asked for, and workers that did not have it."""

    def ask(
        self, asker: bytes, header: Header, frames: Sequence[Frame], membership: Membership
    ) -> Reply | None:
        """BEFORE: pass the question on; None: the answer comes later, or never."""
        meta = memoryview(frames[1])
        if len(meta) != PULL.size + BITMAP:
            raise MalformedError(f"a question's meta of {len(meta)} bytes")
        batch, _, _ = PULL.unpack_from(meta)
        live = [m for m in membership.of(Role.WORKER) if m.address and m.id != asker.decode()]
        what = header.generation, batch
        if self._without.get(asker, (what, ()))[0] != what:
            del self._without[asker]  # of something else: that says nothing of this
        _, without = self._without.setdefault(asker, (what, set()))
        left = [m for m in live if m.id not in without]
        if not left:
            del self._without[asker]
            return refuse(Refusal.NOT_KEPT, f"no live worker has batch {batch} any more")
        number = next(self._numbers)
        origin = ORIGIN.pack(worker_of(asker.decode()), batch)
        chosen: Member = left[number % len(left)]
        if not self._send(chosen.id, number, bytes(meta[PULL.size :]) + origin):
            return refuse(Refusal.UNSURE, f"{chosen.id} is not connected")
        self._open[number] = _Question(asker, header, batch, chosen.id)
        while len(self._open) > MAX_OPEN:
            self._open.pop(next(iter(self._open)))
        return None

    def answer(
        self, member: str, number: int, frames: Sequence[Frame]
    ) -> tuple[bytes, Header, Reply] | None:
        """Take a worker's copy; returns for whom it is, and what to say. None: nobody waits."""
        question = self._open.pop(number, None)
        if question is None or question.asked != member:
            return None
        if not decode_state(frames).slots.any():
            what, without = self._without.get(question.asker, (None, set()))
            if what == (question.header.generation, question.batch):
                without.add(member)
            reply = refuse(Refusal.UNSURE, f"{member} does not have it")
        else:
            reply = Reply(Kind.STATE, frames[1:])
        return question.asker, question.header, reply
