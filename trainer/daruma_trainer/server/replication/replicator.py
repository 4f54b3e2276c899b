"""A server's place in its chain: the stream from the one before it, and to the next.

For the loop's thread. A chain is a seat's head and its replicas, in the order of their
incarnations; who is next follows from the membership alone.
"""

import time
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from daruma_trainer.contract import Member, Membership, Suspect
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.server.barrier import Made
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.covering import Covering
from daruma_trainer.server.replication.inflow import Inflow, OutOfOrderError
from daruma_trainer.server.replication.messages import (
    decode_update,
    decode_whole,
    encode_versions,
)
from daruma_trainer.server.replication.stream import ROOM, Connection, Stream
from daruma_trainer.server.replies import Reply, refuse
from daruma_trainer.wire import (
    MAX_SLOT_BYTES,
    Frame,
    Header,
    Kind,
    MalformedError,
    Push,
    Refusal,
    TablePush,
    decode_json,
    encode_push,
    mask_of,
)

OK = Reply(Kind.OK, [b"{}"])


class Surroundings(Protocol):
    """What replication needs of the loop."""

    def stream_header(self, kind: Kind) -> Header:
        """Return a header of the newest epoch and generation."""

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        """Send something to a member that has said something."""

    def answer(self, member: bytes, request: Header, reply: Reply) -> None:
        """Answer a request, later."""


class Replicator:
    """Of one server or replica."""

    def __init__(
        self,
        me: Identity,
        connect: Callable[[Member], Connection],
        around: Surroundings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me, self._around = me, around
        self._connect, self._clock = connect, clock
        self._plane: DataPlane | None = None
        self._membership: Membership | None = None
        self._newest: Membership | None = None
        self._chain: tuple[Member, ...] = ()
        self._before: str | None = None
        """Who sends to this one; None: it is the head."""
        self._inflow: Inflow | None = None
        self.follows: str | None = None
        """The one before, once it counts on this replica."""
        self._next: Stream | None = None
        self._covering: Covering | None = None
        self._late: list[tuple[int, bytes, Header]] = []
        """Answers that wait for the next replica: (update, who asked, the request)."""

    # The loop

    def attach(self, plane: DataPlane) -> None:
        """Look after this shard; again changes nothing."""
        if plane is not self._plane:
            self._plane, self._inflow = plane, Inflow(plane)

    def follow(self, membership: Membership) -> None:
        """Take a newer membership; connections change at the next `turn`."""
        self._newest = membership
        # At once: what the one that was before it sends now must not reach a promoted replica.
        self._before = self._member_before(membership)

    def turn(self, ready: Container[object]) -> None:
        """Take in answers, and send what is due."""
        if self._newest is not None and self._plane is not None:
            new, self._newest = self._newest, None
            self._adopt(self._plane, new)
        covering = self._covering
        if self._next is not None:
            self._next.counted_on = not self._next.relays or self.counted_on
            self._next.turn(ready, demanded=covering is not None and covering.demanded)
        if covering is not None:
            nodes = [m.failure_domain for m in self._chain]
            covering.settle(nodes, self._next, self._around.tell)
        while self._late and not self._waits(self._late[0][0]):
            _, member, request = self._late.pop(0)
            self._around.answer(member, request, OK)

    @property
    def counted_on(self) -> bool:
        """Whether the one before counts on this replica."""
        return self.follows is not None

    @property
    def busy(self) -> bool:
        """Whether something is to be done soon, though nobody sends anything."""
        uncovered = self._covering is not None and self._covering.any
        return uncovered or (self._next is not None and self._next.busy)

    @property
    def bytes_total(self) -> int:
        """Bytes sent to the next replica."""
        return 0 if self._next is None else self._next.bytes_total

    def suspects(self, seconds: float) -> tuple[Suspect, ...]:
        """The next replica, if it cannot be reached."""
        found = None if self._next is None else self._next.link.suspect(seconds)
        return () if found is None else (found,)

    def close(self) -> None:
        """Close the connection."""
        if self._next is not None:
            self._next.link.close()
            self._next = None

    def _waits(self, update: int) -> bool:
        """Whether an answer has to wait for the next replica, which has yet to get an update.

        Not for one that has yet to join: nobody counts on it.
        """
        following = self._next
        return following is not None and following.joined and following.covered < update

    def _member_before(self, membership: Membership) -> str | None:
        chain = [m.id for m in membership.chain(self._me.index)]
        place = chain.index(self._me.id) if self._me.id in chain else 0
        return chain[place - 1] if place else None

    def _adopt(self, plane: DataPlane, new: Membership) -> None:
        old, self._membership = self._membership, new
        chain = self._chain = new.chain(self._me.index)
        place = next((i for i, m in enumerate(chain) if m.id == self._me.id), 0)
        before = self._member_before(new)
        rolled_back = old is not None and new.rollback.generation != old.rollback.generation
        if rolled_back:
            self.follows = None
        elif self.follows is not None and before is not None:
            # Whoever is before it now counts on it as the one did that is gone (below).
            self.follows = before
        plane.observer = self if new.settings.replicates else None
        following = chain[place + 1] if place + 1 < len(chain) else None
        if following is not None and following.address is None:
            following = None
        if (None if self._next is None else self._next.link.peer) != following:
            self.close()
            if following is not None:
                header, link = self._around.stream_header, self._connect(following)
                self._next = Stream(plane, link, header, self._clock)
                # One that was in the chain already has what was covered: that has to stay true.
                known = () if old is None or rolled_back else old.replicas
                self._next.joined = any(m == following for m in known)
        elif self._next is not None and rolled_back:
            self._next.roll_back()
        if self._next is not None:
            self._next.settings, self._next.relays = new.settings, place > 0
        if place == 0 and new.settings.covers and not plane.steps.slotless:
            if self._covering is None:
                self._covering = Covering(plane, new, self._clock)
            self._covering.follow(new)

    # Observer

    def pushed(self, push: Push, frames: Sequence[Frame], k: Ints) -> None:
        """See Observer."""
        plane = self._plane
        if plane is None:
            return
        if self._covering is not None:
            self._covering.changed(k)
            self._covering.pushed(push.worker, push.first)
        if self._next is None:
            return
        if plane.sums.active:
            self._next.touched(k)
        elif len(k):
            self._next.forward(frames, k, (push.worker,))

    def stepped(self, step: int, workers: Sequence[int], k: Ints, made: Made | None) -> None:
        """See Observer."""
        plane = self._plane
        if plane is None:
            return
        if self._covering is not None:
            self._covering.changed(k)
            for worker in workers:
                self._covering.pushed(worker, step)
        if self._next is None:
            return
        if made is None:
            self._next.touched(k)
            return
        for a, b in _parts(plane.shard.layout.slot_bytes[k]):
            mask = mask_of(plane.slots.ids[k[a:b]])
            tables = tuple(_cut(plane, made, k, a, b))
            if sum(part.values.nbytes + 8 * len(part.values) for part in tables) > MAX_SLOT_BYTES:
                self._next.touched(k[a:b])  # single rows of many workers
                continue
            push = Push(workers[0], step, step, 1, 0, mask, tables)
            self._next.forward(encode_push(push), k[a:b], workers)

    def touched(self, k: Ints) -> None:
        """See Observer."""
        if self._plane is not None:
            self._plane.updates += 1
            if self._covering is not None:
                self._covering.changed(k)
            if self._next is not None:
                self._next.touched(k)

    def pulled(self, worker: int, k: Ints) -> None:
        """See Observer."""
        if self._covering is not None:
            self._covering.pulled(worker, k)

    def resynced(self, worker: int) -> None:
        """See Observer."""
        if self._covering is not None:
            self._covering.again(worker)

    # From the one before

    def take(self, member: str, header: Header, frames: Sequence[Frame]) -> Reply | None:
        """Take a message of the stream; None: it is answered later, or was (it comes again)."""
        inflow, plane, membership = self._inflow, self._plane, self._newest or self._membership
        if inflow is None or plane is None or membership is None:
            return refuse(Refusal.UNSURE, "no membership yet")
        if header.incarnation != self._me.incarnation or member != self._before:
            return refuse(Refusal.STALE_INCARNATION, f"{member} is not before {self._me.id}")
        if header.generation != membership.rollback.generation:
            return refuse(Refusal.WRONG_GENERATION, f"not of generation {header.generation}")
        if not inflow.is_newer(member, header.request):
            return None
        try:
            if header.kind is Kind.FOLLOW:
                return self._begin(inflow, member, frames)
            if header.kind is Kind.UPDATE:
                number, mask, workers, push, original = decode_update(frames)
                k = inflow.update(member, number, mask, workers, push)
                plane.updates += 1
                if self._next is not None:
                    self._next.forward(original, k, workers)
            else:
                number, state = decode_whole(frames)
                self.touched(inflow.whole(member, number, state))
        except OutOfOrderError as error:
            return refuse(Refusal.UNSURE, str(error))
        if membership.settings.to_tail and self._waits(plane.updates):
            self._late.append((plane.updates, member.encode(), header))
            return None
        return OK

    def _begin(self, inflow: Inflow, member: str, frames: Sequence[Frame]) -> Reply:
        body = decode_json(frames[1])
        if "number" in body:
            inflow.expect(member, int(body["number"]))
            self.follows = member
            return OK
        raw = body.get("tables")
        if not isinstance(raw, list):
            raise MalformedError("a stream without tables")
        versions = inflow.begin(member, [TableSpec.from_json(spec) for spec in raw])
        return Reply(Kind.OK, encode_versions(versions))

    # Covered pushes

    def has(self, member: str, frames: Sequence[Frame]) -> None:
        """HAVE: a worker's copy of some slots has everything up to an update."""
        if self._covering is not None:
            self._covering.has(member, frames)


def _parts(sizes: Ints) -> list[tuple[int, int]]:
    """Cut slots of these sizes into ranges that fit one message each, where one can."""
    ranges, begin, size = [], 0, 0
    for i, b in enumerate(sizes.tolist()):
        if size and size + b > ROOM:
            ranges.append((begin, i))
            begin, size = i, 0
        size += b
    return [*ranges, (begin, len(sizes))]


def _cut(plane: DataPlane, made: Made, k: Ints, a: int, b: int) -> list[TablePush]:
    """Return what a step changed in the slots k[a:b] alone."""
    if (a, b) == (0, len(k)):
        return made
    cut = []
    for part in made:
        layout = plane.shard.tables[part.table].layout
        if part.rows is None:
            offsets = plane.shard.row_offsets(part.table, k) * layout.table.cols
            values = part.values.reshape(-1)[int(offsets[a]) : int(offsets[b])]
            cut.append(TablePush(part.table, part.lr, values))
            continue
        inside = layout.find_in(k[a:b], part.rows) >= 0
        values = part.values.reshape(-1, layout.table.cols)[inside]
        cut.append(TablePush(part.table, part.lr, values, part.rows[inside]))
    return cut
