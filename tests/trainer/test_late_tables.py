"""Tables that are declared once training has begun, while servers are lost."""

from dataclasses import replace

import numpy as np

from daruma_trainer.contract import (
    Copies,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    slots_from_hex,
    slots_to_hex,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints
from daruma_trainer.rules import Add
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.wire import (
    PARTIAL,
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    TablePush,
    bitmap,
    decode_json,
    decode_state,
    encode_json,
    encode_push,
    mask_of,
)
from daruma_trainer.worker.copies import HostCopy
from planes import COLS, ROWS, UID, Planes

EVERY = np.ones(1024, np.bool_)
WORKERS = b"worker-0-1", b"worker-1-1"


class World:
    """One server, its successor, and two workers' copies."""

    def __init__(self) -> None:
        self.planes = Planes(Settings(), Add(), servers=1, workers=2)
        self.plane = self.planes.planes[0]
        self.late = replace(self.planes.spec, id=1, name="late")
        self.copies = [HostCopy(UID, 1, 2) for _ in WORKERS]
        for copy in self.copies:
            copy.add(self.planes.spec)
            copy.arrange()

    def pull(self, worker: int) -> bool:
        """Let a worker take everything; whether there is more than it knows."""
        copy = self.copies[worker]
        meta = PULL.pack(0, len(copy.specs), 0) + bitmap(EVERY)
        header = Header(Kind.PULL, 1, 1, 1)
        reply = self.plane.pull(WORKERS[worker], header, [b"", meta])
        assert reply is not None
        assert reply.kind is Kind.STATE
        state = decode_state([b"", *map(bytes, reply.body)])
        copy.take(state, partial=bool(reply.flags & PARTIAL))
        return bool(reply.flags & PARTIAL)

    def push(self, worker: int, batch: int, *tables: int) -> Refusal | None:
        """A worker adds 1 to all of these tables; returns why not."""
        rows = sum(len(t.rows) for t in self.plane.shard.layout.tables[:1])
        parts = tuple(TablePush(t, 0.0, np.ones((rows, COLS), np.float32)) for t in tables)
        frames = encode_push(Push(worker, batch, batch, 1, 0, EVERY, parts))
        reply = self.plane.push(WORKERS[worker], Header(Kind.PUSH, 1, 1, 1), [b"", *frames])
        assert reply is not None
        return Refusal(reply.flags) if reply.kind is Kind.REFUSED else None

    def declare(self, worker: int) -> None:
        copy = self.copies[worker]
        copy.add(self.late)
        copy.arrange()

    def create(self) -> bool:
        """The server hears of the table; whether it wants its values."""
        reply = self.plane.beginning.create([b"", encode_json(self.late.to_json())])
        return bool(decode_json(reply.body[0])["wanted"])

    def initial(self, value: float) -> None:
        values = np.full((ROWS, COLS), value, np.float32)
        values = values[self.plane.shard.layout.tables[1].rows]
        frames: list[Frame] = encode_push(Push(0, 1, 1, 1, 0, EVERY, (TablePush(1, 0.0, values),)))
        assert self.plane.beginning.init([b"", *frames]).kind is Kind.OK

    def offered(self, worker: int) -> list[tuple[int, int, int]]:
        """(lineage, position, slots) of what a worker's copy offers."""
        found = self.copies[worker].versions(EVERY)
        return [(c.lineage, c.position, len(slots_from_hex(c.slots))) for c in found]

    def replace_server(self, *worker: int) -> None:
        """Its successor takes everything from these workers, the first one first; from none: it
        begins again (allowReset)."""
        membership = replace(self.planes.membership, initialised=True)
        plane, copies = DataPlane(membership, 0, 2), self.copies
        assert plane.add_table(self.planes.spec) is None
        assert plane.add_table(self.late) is None
        asked: list[tuple[str, Ints, int]] = []

        def fetch(member: str, ids: Ints, number: int) -> bool:
            asked.append((member, ids, number))
            return True

        everything = np.arange(len(plane.slots.ids))
        me = Identity("n", "j", Role.SERVER, 0, 2, "")
        restorer = Restorer(
            plane, None, ByHand(), "", me, fetch, lambda: plane.restored(everything)
        )
        named = [WORKERS[w].decode() for w in worker]
        every = slots_to_hex(plane.slots.ids.tolist())
        sources = tuple(Source(SourceKind.PEER, every, name) for name in named)
        sources = sources or (Source(SourceKind.INITIAL, every),)
        restorer.begin(Restore(1, 2, "server-0-2", sources))
        for member, ids, number in asked:
            for state in copies[int(member.split("-")[1])].give(mask_of(ids)):
                restorer.on_copy(member, number, state)
        assert plane.slots.ready.all()
        self.plane = plane


def test_a_declared_table_takes_nothing_from_what_a_copy_offers() -> None:
    world = World()
    world.push(0, 1, 0)
    world.pull(1)
    before = world.offered(1)
    assert before == [(1, 1, 1024)]
    world.declare(1)
    assert world.offered(1) == before
    (state,) = world.copies[1].give(EVERY)
    assert len(state.values) == 1, "of the other it has zeros"


def test_a_pull_that_lacks_a_table_promises_no_more_than_the_last_that_did_not() -> None:
    world = World()
    world.push(0, 1, 0)
    assert not world.pull(1)
    assert world.create()
    world.push(0, 2, 0)
    assert not world.pull(1), "there is nothing of it yet"
    assert world.offered(1) == [(1, 2, 1024)]
    world.initial(7.0)
    world.declare(0)
    assert not world.pull(0)
    assert world.push(0, 3, 0, 1) is None
    assert world.pull(1)
    assert world.copies[1].position.tolist() == [3] * 1024
    assert world.offered(1) == [(1, 2, 1024)]
    world.declare(1)
    assert not world.pull(1)
    assert world.offered(1) == [(1, 3, 1024)]


def test_first_values_come_again_where_no_copy_had_them() -> None:
    world = World()
    world.push(0, 1, 0)
    world.pull(1)
    world.create()
    world.initial(7.0)
    world.replace_server(1)
    assert (world.plane.shard.tables[0].data == 1.0).all()
    assert world.plane.complete_tables == 1
    assert world.push(0, 2, 0, 1) is Refusal.RESTORING, "its part would be overwritten"
    assert world.push(0, 2, 0) is None, "who does not know the table goes on"
    assert world.create()
    world.initial(7.0)
    assert not world.create()
    assert world.push(1, 1, 0, 1) is None
    assert (world.plane.shard.tables[1].data == 8.0).all()
    world.initial(3.0)
    assert (world.plane.shard.tables[1].data == 8.0).all(), "values are given once"


def test_what_begins_again_does_so_from_first_values_not_from_zeros() -> None:
    world = World()
    world.replace_server()
    assert world.plane.complete_tables == 0
    assert world.push(0, 1, 0) is Refusal.RESTORING
    assert world.create()
    world.initial(7.0)
    assert (world.plane.shard.tables[1].data == 7.0).all()


def test_of_a_pull_that_was_half_done_each_slot_is_given_with_its_own_tables() -> None:
    world = World()
    world.pull(1)
    world.create()
    world.initial(7.0)
    world.declare(1)
    copy, half = world.copies[1], np.arange(1024) < 512
    k = world.plane.slots.index_of(np.flatnonzero(half))
    copy.take(world.plane.state(k, 2))
    assert [len(state.values) for state in copy.give(EVERY)] == [1, 2]
    world.replace_server(1)
    lacks = ~world.plane.given
    assert (lacks == ~half).all()
    world.create()
    world.initial(5.0)
    table = world.plane.shard.tables[1]
    slot = np.repeat(world.plane.slots.ids, np.diff(table.layout.slot_rows))
    assert (table.data == np.where(slot < 512, 7.0, 5.0)[:, None]).all()


def test_copies_of_a_lineage_that_is_no_more_are_not_offered() -> None:
    world = World()
    world.pull(0)
    world.copies[0].forget()
    assert world.copies[0].versions(EVERY) == ()
    assert isinstance(world.pull(0), bool)
    assert world.copies[0].versions(EVERY) == (Copies(1, 0, slots_to_hex(range(1024))),)
