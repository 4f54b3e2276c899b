"""Servers without sockets and workers without programs: real shards, real copies and positions.

Messages arrive when a test says so, and every answer at once. A worker w's batch b adds
`gives(w, b)` to every row of a table (rule add), or is such a gradient (SGD, rate 1).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from daruma_trainer.contract import Member, Membership, Role, Settings, indexes, slots_to_hex
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, TableSpec
from daruma_trainer.rules import Rule, rule_to_json
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replies import Reply
from daruma_trainer.wire import (
    ENTER,
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Slots,
    TablePush,
    bitmap,
    decode_json,
    decode_state,
    encode_json,
    encode_push,
)
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.position import Position

UID, ROWS, COLS = "uid-of-planes", 24, 3


@dataclass(eq=False)
class Seat:
    """One incarnation of one worker."""

    index: int
    incarnation: int
    copy: HostCopy
    position: Position = field(default_factory=Position)
    batch: int = 0
    resumed: bool = False
    missing: set[int] = field(default_factory=set)
    """Servers whose answer to the present pull is still to come."""
    flying: list[tuple[int, int]] = field(default_factory=list)
    """(server, batch) of pushes that have not arrived."""
    requests: Iterator[int] = field(default_factory=partial(itertools.count, 1))
    """Their numbers on its connection."""

    @property
    def id(self) -> bytes:
        return f"worker-{self.index}-{self.incarnation}".encode()


class Planes:
    """A job's servers, and the seats of its workers."""

    def __init__(
        self,
        settings: Settings,
        rule: Rule,
        *,
        servers: int = 2,
        workers: int = 3,
        gives: Callable[[int, int], float | Floats] = lambda _worker, _batch: 1.0,
    ) -> None:
        members = tuple(Member(Role.SERVER, i, 1, f"s{i}", f"s:{i}") for i in range(servers))
        members += tuple(Member(Role.WORKER, i, 1, f"w{i}", f"w:{i}") for i in range(workers))
        self.settings, self.gives = settings, gives
        self.membership = Membership(UID, "n", "j", 1, servers, workers, members, settings)
        self.spec = TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(rule))
        self.planes = [DataPlane(self.membership, i, 1) for i in range(servers)]
        self.masks: list[Slots] = []
        for plane in self.planes:
            assert plane.add_table(self.spec) is None
            plane.note_given(np.arange(len(plane.slots.ids)))
            plane.beginning.open_slots()
            mask = np.zeros(1024, np.bool_)
            mask[plane.slots.ids] = True
            self.masks.append(mask)
        self.seats = [self._seat(w, 1) for w in range(workers)]

    def _seat(self, index: int, incarnation: int) -> Seat:
        relays = self.settings.consistency == "Sync" and not self.membership.elastic
        copy = HostCopy(
            UID, len(self.planes), self.membership.workers, keeps_for=index if relays else None
        )
        copy.add(self.spec)
        copy.arrange()
        return Seat(index, incarnation, copy)

    # What workers do

    def enter(self, seat: Seat) -> None:
        """Ask every server for what there is, and take a position; they hear of it later."""
        for server in range(len(self.planes)):
            self.ask(seat, server, 0)
        assert not seat.missing, "a first pull waits for nobody"
        identity = Identity("n", "j", Role.WORKER, seat.index, seat.incarnation, "t", ("h", 1))
        seat.batch = seat.position.choose(seat.copy, self.membership, identity)
        seat.resumed = True

    def resync(self, seat: Seat, server: int) -> list[int]:
        """Tell a server of the position; returns the batches that it counts as lost."""
        body = {
            "worker": seat.index, "done": seat.batch, "held": "",
            "slots": slots_to_hex(np.flatnonzero(self.masks[server]).tolist()),
            "skipped": seat.position.skipped.text(),
        }  # fmt: skip
        reply = self.planes[server].resync(seat.id, [b"", encode_json(body)])
        self._answer_waiting(server)
        return sorted(indexes(decode_json(reply.body[0])["lost"]))

    def make(self, seat: Seat) -> None:
        """Make the next batch; its pushes are under way to all servers."""
        seat.batch += 1
        seat.flying += [(server, seat.batch) for server in range(len(self.planes))]

    def arrive(self, seat: Seat, server: int) -> None:
        """Let the oldest push to a server arrive."""
        batch = next(b for s, b in seat.flying if s == server)
        seat.flying.remove((server, batch))
        plane = self.planes[server]
        values = np.zeros_like(plane.shard.tables[0].data)
        values[:] = self.gives(seat.index, batch)
        push = Push(
            seat.index, batch, batch, 1, 0, self.masks[server], (TablePush(0, 1.0, values),)
        )
        header = Header(Kind.PUSH, next(seat.requests), 1, 1)
        plane.push(seat.id, header, [b"", *self._wire(encode_push(push))])
        self._answer_waiting(server)

    def ask(self, seat: Seat, server: int, min_step: int) -> None:
        """Pull a server's slots."""
        flags = ENTER * (not seat.resumed)
        meta = PULL.pack(min_step, 1, flags) + bitmap(self.masks[server])
        seat.missing.add(server)
        header = Header(Kind.PULL, next(seat.requests), 1, 1)
        reply = self.planes[server].pull(seat.id, header, [b"", meta])
        if reply is not None:
            self._take(seat, server, reply)

    def step(self, seat: Seat) -> None:
        """Make a batch, let it arrive everywhere, and ask for what follows."""
        self.make(seat)
        for server in range(len(self.planes)):
            self.arrive(seat, server)
            self.ask(seat, server, self.pace(seat))

    def pace(self, seat: Seat) -> int:
        """As daruma_trainer.worker.footing has it."""
        return max(0, seat.batch - self.settings.max_staleness)

    def _take(self, seat: Seat, server: int, reply: Reply) -> None:
        assert reply.kind is Kind.STATE, reply
        if not seat.resumed:
            seat.position.hear(server, reply.flags)
        seat.copy.take(decode_state([b"", *self._wire(list(reply.body))]))
        seat.missing.discard(server)

    @staticmethod
    def _wire(frames: list[Frame]) -> list[bytes]:
        return [bytes(frame) for frame in frames]

    def _answer_waiting(self, server: int) -> None:
        for waiting in self.planes[server].take_waiting():
            reply = self.planes[server].pull(waiting.identity, waiting.header, waiting.frames)
            seat = next((s for s in self.seats if s.id == waiting.identity), None)
            if reply is not None and seat is not None:
                self._take(seat, server, reply)

    # What becomes of them

    def lose(self, worker: int) -> None:
        """A worker dies, with all that is under way; nobody knows yet."""
        epoch = self.membership.epoch + 1
        gone = Member(Role.WORKER, worker, epoch, f"w{worker}")
        members = tuple(
            gone if (m.role, m.index) == (Role.WORKER, worker) else m
            for m in self.membership.members
        )
        self.membership = replace(self.membership, epoch=epoch, members=members, initialised=True)
        self.seats[worker] = self._seat(worker, epoch)

    def tell(self, server: int) -> None:
        """A server hears of the newest membership."""
        self.planes[server].follow(self.membership)
        self._answer_waiting(server)

    def leave(self, seat: Seat) -> None:
        """A worker's program ends."""
        for server in range(len(self.planes)):
            self.planes[server].worker_left(seat.index, seat.batch)
            self._answer_waiting(server)

    def values(self, server: int) -> Floats:
        """A server's part of the table; all of its rows are equal."""
        return self.planes[server].shard.tables[0].data
