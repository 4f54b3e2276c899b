"""What a server sends to its next replica, what that takes, and which pushes are covered."""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import Member, Membership, Role, Settings, Suspect
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.links import Answer
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.cover import Cover
from daruma_trainer.server.replication.messages import (
    Versions,
    encode_versions,
    encode_whole,
)
from daruma_trainer.server.replication.outflow import Outflow
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.server.replication.stream import RETRY_SECONDS, Stream
from daruma_trainer.server.replies import Reply
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import (
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    TablePush,
    decode_json,
    encode_json,
    encode_push,
    mask_of,
)

ALL = np.arange(4)
EVERY_SLOT = np.ones(4, np.bool_)


def some(*slots: int) -> Ints:
    return np.array(slots, np.int64)


def all_of_them(k: Ints) -> int:
    return len(k)


def began(window: int = 1000) -> Outflow:
    """A stream to a replica that has everything."""
    out = Outflow(4, window)
    out.reset(0)
    out.begin(np.ones(4, np.bool_))
    return out


# Outflow


def test_updates_of_clean_slots_go_out_as_they_came() -> None:
    out = began()
    out.since[3] = 1
    clean = out.update(5, some(1, 3), 10, forward=True)
    assert clean is not None
    assert clean.tolist() == [True, False]
    assert out.since.tolist() == [0, 0, 0, 1]


def test_nothing_is_covered_before_the_replica_says_what_it_has() -> None:
    out = Outflow(4)
    out.reset(7)
    assert out.update(8, ALL, 10, forward=True) is None
    assert out.covered == 0
    out.begin(np.array([True, True, True, False]))
    assert out.covered == 0
    found = out.next_whole(EVERY_SLOT, all_of_them)
    assert found is not None
    k, floor = found
    assert (k.tolist(), floor) == ([3], 1)
    out.sent(floor, 10)
    assert (out.covered, out.whole) == (0, False)
    out.answered(1)
    assert (out.covered, out.whole) == (8, True)


def test_a_slow_replica_gets_whole_slots_once_it_can_take_them() -> None:
    out = began(window=100)
    for number in (1, 2, 3):
        clean = out.update(number, ALL, 40, forward=True)
        assert (clean is not None) == (number < 3)
        if clean is not None:
            out.sent(number, 40)
    assert out.covered == 0
    assert out.next_whole(EVERY_SLOT, all_of_them) is None, "too much is under way"
    out.answered(1)
    assert out.covered == 1
    found = out.next_whole(EVERY_SLOT, all_of_them)
    assert found is not None
    assert found[1] == 3
    # What comes while the whole slots are on their way goes out one by one again.
    out.sent(3, 40)
    assert out.update(4, some(0), 10, forward=True) is not None
    out.sent(4, 10)
    out.answered(2)
    assert out.covered == 2
    out.answered(3)
    assert out.covered == 3
    out.answered(4)
    assert out.covered == 4


def test_one_message_too_large_for_the_window_goes_out_alone() -> None:
    out = began(window=100)
    assert out.update(1, ALL, 5000, forward=True) is not None
    out.sent(1, 5000)
    assert out.update(2, ALL, 1, forward=True) is None


def test_slots_that_are_updated_all_the_time_do_not_keep_the_others_waiting() -> None:
    out = began()
    seen = []
    for number in range(1, 5):
        out.update(number, ALL, 0, forward=False)
        found = out.next_whole(EVERY_SLOT, lambda _: 1)
        assert found is not None
        seen += found[0].tolist()
        out.sent(found[1], 1)
        out.answered(out.number)
    assert seen == [0, 1, 2, 3]


def test_what_could_not_be_sent_stays_dirty() -> None:
    out = began()
    out.update(1, some(2), 0, forward=False)
    out.update(2, some(0), 0, forward=False)
    found = out.next_whole(EVERY_SLOT, all_of_them)
    assert found is not None
    out.unsent(*found)
    assert out.covered == 0
    assert np.flatnonzero(out.since).tolist() == [0, 2]


def test_a_new_stream_knows_nothing_of_what_was_sent_before() -> None:
    out = began()
    for number in (1, 2):
        out.update(number, ALL, 10, forward=True)
        out.sent(number, 10)
    stream = out.stream
    out.reset(2)
    assert out.stream > stream
    assert (out.number, out.covered) == (0, 0)
    out.begin(np.array([True, False, True, True]))
    assert out.covered == 0
    assert out.update(3, some(1), 10, forward=True) is None
    assert out.update(4, some(0), 10, forward=True) is not None


# Cover

A, B, C = "node-a", "node-b", "node-c"


def test_a_push_is_covered_on_as_many_nodes_as_asked_for_the_senders_not_counted() -> None:
    cover = Cover(2)
    cover.pushed(1, 0, 1)
    holders = [(A, 1, True), (B, 1, False), (C, 0, False)]
    assert cover.settle({0: B}, holders) == {}
    assert cover.settle({0: C}, holders) == {0: inf}
    assert not cover.any


def test_what_shares_a_node_is_one_node() -> None:
    cover = Cover(2)
    cover.pushed(1, 0, 1)
    assert cover.settle({0: C}, [(A, 1, True), (A, 1, False), (B, 0, False)]) == {}
    assert cover.settle({0: C}, [(A, 1, True), (A, 1, False), (B, 1, False)]) == {0: inf}


def test_fewer_nodes_than_asked_for_have_to_do() -> None:
    cover = Cover(3)
    cover.pushed(1, 0, 1)
    assert cover.settle({0: A}, [(B, 1, True), (C, 0, True)]) == {}
    assert cover.settle({0: A}, [(B, 1, True), (C, 1, True)]) == {0: inf}
    cover.pushed(2, 0, 2)
    assert cover.settle({0: A}, [(A, 2, True)]) == {0: inf}, "it is alone"


def test_shards_on_enough_nodes_cover_what_a_worker_on_one_of_them_sent() -> None:
    cover = Cover(2)
    cover.pushed(1, 0, 1)
    # Worker 1, on C, may never pull again.
    assert cover.settle({0: A, 1: C}, [(A, 1, True), (B, 0, True), (C, 0, False)]) == {}
    assert cover.settle({0: A, 1: C}, [(A, 1, True), (B, 1, True), (C, 0, False)]) == {0: inf}


def test_batches_are_covered_in_order_and_when_all_their_parts_are() -> None:
    cover = Cover(1)
    cover.pushed(1, 0, 1)
    cover.pushed(2, 1, 1)
    cover.pushed(3, 0, 2)
    cover.pushed(4, 0, 2)
    cover.pushed(5, 0, 3)
    assert len(cover.waiting()[0]) == 3
    assert cover.settle({}, [(A, 1, True)]) == {0: 1}
    assert cover.settle({}, [(A, 3, True)]) == {0: 1, 1: inf}, "half of batch 2 is on its way"
    assert len(cover.waiting()[0]) == 2
    assert cover.settle({}, [(A, 4, True)]) == {0: 2}
    assert cover.settle({}, [(A, 5, True)]) == {0: inf}


def test_a_worker_hears_each_batch_once_unless_it_begins_anew() -> None:
    cover = Cover(1)
    cover.pushed(4, 0, 9)
    assert cover.settle({}, [(A, 4, True)]) == {0: inf}
    assert cover.tell(0, 9)
    assert not cover.tell(0, 9)
    cover.again(4, 0)
    assert cover.settle({}, [(A, 3, True)]) == {}
    assert cover.settle({}, [(A, 4, True)]) == {0: inf}
    assert cover.tell(0, 9)


def test_a_worker_that_makes_a_batch_again_hears_of_it_again() -> None:
    """Its predecessor had pushed it here, so that it heard of it before it held it."""
    cover = Cover(1)
    cover.again(1, 0)
    assert cover.settle({0: A}, []) == {0: inf}
    assert cover.tell(0, 2)
    cover.pushed(1, 0, 2)
    assert cover.settle({0: A}, []) == {0: inf}
    assert cover.tell(0, 2)


# The stream

SPEC = TableSpec(0, "t", (64, 2), 1, rule_to_json(SGD(momentum=0.5)))
HEAD = Member(Role.SERVER, 0, 1, "s0", "a:1")
NEXT = Member(Role.SERVER, 0, 4, "s1", "a:2")
THIRD = Member(Role.SERVER, 0, 5, "s2", "a:3")
WORKER = Member(Role.WORKER, 0, 1, "w0", "a:4")
CHAIN = Settings(replicas=2, chain=True, ack="Next")


class Link:
    """A connection whose peer says what it is told to."""

    def __init__(self, peer: Member) -> None:
        self.peer, self.connected = peer, True
        self.full = False
        self.events: list[str] = ["connected"]
        self.sent: list[tuple[Header, Sequence[Frame], Answer | None]] = []

    def request(self, header: Header, body: Sequence[Frame], answer: Answer | None) -> bool:
        if not self.full:
            self.sent.append((header, body, answer))
        return not self.full

    def receive(
        self, ready: Container[object], unasked: Callable[[Any, Header, Sequence[Frame]], None]
    ) -> list[str]:
        events, self.events = self.events, []
        return events

    def suspect(self, seconds: float) -> Suspect | None:
        return None

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def kinds(self) -> list[Kind]:
        return [header.kind for header, _, _ in self.sent]

    def answer(self, number: int, kind: Kind = Kind.OK, body: bytes = b"{}") -> None:
        """Answer one of what was sent."""
        answer = self.sent[number][2]
        assert answer is not None
        answer(Header(kind, 1, 1, 4), [b"", body])

    def answer_rest(self) -> None:
        """Answer what came after the streams' beginnings, and was not answered yet."""
        rest, self.sent[:] = list(self.sent), [(h, b, None) for h, b, _ in self.sent]
        for header, _, answer in rest:
            if answer is not None and header.kind in (Kind.UPDATE, Kind.WHOLE):
                answer(Header(Kind.OK, 1, 1, 4), [b"", b"{}"])


def membership(epoch: int = 1, **changes: Any) -> Membership:
    first = Membership(
        "uid", "ns", "job", epoch, 1, 1, (HEAD, WORKER), CHAIN, True, replicas=(NEXT,)
    )
    return replace(first, **changes)


def plane_of(member: Member, *, ready: bool = True) -> DataPlane:
    plane = DataPlane(membership(), 0, member.incarnation)
    if ready:
        assert plane.add_table(SPEC) is None
        plane.slots.state[:] = SlotState.READY
        plane.slots.lineage[:] = 1
        plane.note_given(np.arange(len(plane.slots.ids)))
    return plane


def versions(plane: DataPlane) -> bytes:
    """What a replica says that has all of this."""
    (frame,) = encode_versions(Versions(plane.slots.lineage, plane.slots.position))
    return bytes(frame)


NOTHING = bytes(encode_versions(Versions(np.zeros(1024, np.int64), np.zeros(1024, np.int64)))[0])


class Head:
    """A head's stream, with a clock."""

    def __init__(self, settings: Settings = CHAIN) -> None:
        self.now = 10.0
        self.plane = plane_of(HEAD)
        self.link = Link(NEXT)
        self.stream = Stream(
            self.plane, self.link, lambda kind: Header(kind, 0, 1, 1), lambda: self.now
        )
        self.stream.settings = settings
        self.turn()

    def turn(self, seconds: float = 0.0, *, demanded: bool = False) -> None:
        self.now += seconds
        self.stream.turn((), demanded=demanded)

    def follow(self) -> None:
        """The replica has everything, and knows that it is counted on."""
        self.link.answer(-1, body=versions(self.plane))
        self.turn()
        self.link.answer(-1)

    def push(self, batch: int) -> None:
        k = np.arange(len(self.plane.slots.ids))
        self.plane.slots.advance(k, 0, batch, batch)
        self.plane.updates += 1
        self.stream.forward(frames_of(batch), k, (0,))


def frames_of(batch: int) -> list[Frame]:
    values = np.full((64, 2), 0.5, np.float32)
    mask = mask_of(np.arange(1024))
    return encode_push(Push(0, batch, batch, 1, 0, mask, (TablePush(0, 0.1, values),)))


def test_a_stream_whose_first_message_found_no_room_is_begun_again() -> None:
    head = Head()
    head.link.sent.clear()
    head.stream.restart()
    head.link.full = True
    head.turn()
    assert head.link.sent == []
    head.link.full = False
    head.turn(RETRY_SECONDS)
    assert head.link.kinds == [Kind.FOLLOW]


def test_answers_of_an_older_stream_say_nothing() -> None:
    head = Head()
    head.follow()
    head.push(1)
    assert head.link.kinds == [Kind.FOLLOW, Kind.FOLLOW, Kind.UPDATE]
    head.link.events = ["disconnected", "connected"]
    head.turn()
    head.link.answer(-1, body=NOTHING)
    head.turn()
    assert head.link.kinds[-1] is Kind.WHOLE
    head.link.answer(1)  # the older stream's first message; so is this
    head.link.answer(2)
    assert head.stream.covered <= 0
    head.link.answer(-1)
    head.turn()
    head.link.answer(-1)
    assert head.stream.covered == 1


def test_what_waits_for_a_replica_is_not_covered_before_that_knows() -> None:
    """Nobody would promote it, though it has everything."""
    head = Head()
    head.link.answer(-1, body=versions(head.plane))
    head.turn()
    assert decode_json(head.link.sent[-1][1][0]) == {"number": 1}
    head.push(1)
    head.push(2)
    head.link.events = ["disconnected", "connected"]  # it never heard
    head.turn()
    head.turn(RETRY_SECONDS)
    head.link.answer(-1, body=versions(head.plane))
    head.turn()
    assert decode_json(head.link.sent[-1][1][0]) == {"number": 1}
    assert head.stream.covered < 1
    head.link.answer(-1)
    assert head.stream.covered == 2


def test_a_replica_hears_that_it_is_counted_on_after_all_that_was_covered_before() -> None:
    """What is pushed before it has every slot is covered without it: it must not serve without."""
    head = Head(Settings(replicas=2, copies=2, copies_bytes_per_second=1000.0))
    head.link.answer(-1, body=NOTHING)
    head.turn(1.0)
    assert head.link.kinds == [Kind.FOLLOW, Kind.WHOLE]
    head.push(1)  # nothing is left of this second's bytes
    head.link.answer(-1)
    head.turn()
    assert head.stream.joined
    assert head.link.kinds == [Kind.FOLLOW, Kind.WHOLE]
    head.turn(60.0)
    assert head.link.kinds == [Kind.FOLLOW, Kind.WHOLE, Kind.WHOLE, Kind.FOLLOW]
    assert decode_json(head.link.sent[-1][1][0]) == {"number": 3}


def test_bytes_a_second_are_limited_and_what_waits_goes_out_whole() -> None:
    head = Head(Settings(replicas=2, copies=2, copies_bytes_per_second=1000.0))
    head.follow()
    head.turn(1.0)
    spent = head.stream.bytes_total
    for batch in range(1, 9):
        head.push(batch)
    first = head.stream.bytes_total - spent
    assert 0 < first < 1000 + len(b"".join(map(bytes, frames_of(1)))) + 200
    assert head.stream.busy
    head.turn(0.1)
    assert head.stream.bytes_total - spent == first, "there is nothing left of this second's"
    for _ in range(60):
        head.turn(1.0)
        head.link.answer_rest()
    assert Kind.WHOLE in head.link.kinds
    assert head.stream.covered == 8


def test_a_new_tables_slots_wait_for_its_first_values() -> None:
    head = Head()
    head.follow()
    assert head.plane.add_table(replace(SPEC, id=1, name="later")) is None
    head.turn()
    head.turn()
    head.link.answer(-1, body=NOTHING)
    head.turn()
    assert head.link.kinds == [Kind.FOLLOW] * 3
    head.plane.note_given(np.arange(len(head.plane.slots.ids)))
    head.turn()
    assert head.link.kinds == [*[Kind.FOLLOW] * 3, Kind.WHOLE]


def test_what_was_under_way_to_a_lazy_replica_is_sent_again_at_once() -> None:
    """Else it would lack what came until the next time, on top of what it lacks anyway."""
    head = Head(replace(CHAIN, ack="None", every_updates=3))
    head.follow()
    before = versions(head.plane)
    for batch in range(1, 4):
        head.push(batch)
        head.turn()
    assert head.link.kinds == [*[Kind.FOLLOW] * 2, Kind.WHOLE]
    head.push(4)
    head.link.events = ["disconnected", "connected"]
    head.turn()
    head.link.answer(-1, body=before)
    head.turn()
    assert head.link.kinds[3:5] == [Kind.FOLLOW, Kind.WHOLE]


def test_what_comes_while_a_lazy_replica_is_told_counts_as_what_it_may_lack() -> None:
    head = Head(replace(CHAIN, ack="None", every_updates=10))
    head.follow()

    def push(last: int) -> None:
        for batch in range(head.plane.updates + 1, last + 1):
            head.push(batch)
            head.turn()

    def sent() -> int:
        return head.link.kinds.count(Kind.WHOLE)

    push(9)
    assert sent() == 0
    push(13)
    assert sent() == 1
    head.link.answer(-1)
    head.turn()
    push(16)
    assert sent() == 1
    push(17)
    assert sent() == 2, "not at 20: by then it would lack the 3 that come on the way as well"
    head.link.answer(-1)
    head.turn()
    push(26)
    assert sent() == 2
    push(27)
    assert sent() == 3, "nothing came on the way"


def test_one_late_answer_of_a_lazy_replica_does_not_make_it_get_every_update() -> None:
    head = Head(replace(CHAIN, ack="None", every_updates=100))
    head.follow()
    sent: list[int] = []
    """By message: as of which update it went out."""
    answered = 0

    def push(last: int, late: int) -> None:
        """Answers come so many updates late."""
        nonlocal answered
        for batch in range(head.plane.updates + 1, last + 1):
            head.push(batch)
            head.turn()
            sent.extend([batch] * (head.link.kinds.count(Kind.WHOLE) - len(sent)))
            while answered < len(sent) and sent[answered] <= batch - late:
                head.link.answer(2 + answered)  # after those that began the stream
                answered += 1

    push(198, late=98)
    assert sent == [100]
    push(698, late=4)
    assert len(sent) <= 1 + 12, "once in some hundred, but for the few after the one that was late"
    assert head.plane.updates - sent[-1] <= 100


def test_what_was_measured_on_a_connection_that_broke_is_forgotten() -> None:
    head = Head(replace(CHAIN, ack="None", every_updates=10))
    head.follow()
    for batch in range(1, 15):
        head.push(batch)
        head.turn()
    head.link.answer(-1)
    head.turn()
    assert head.link.kinds.count(Kind.WHOLE) == 1
    head.link.events = ["disconnected", "connected"]
    head.turn()
    head.turn(RETRY_SECONDS)
    head.follow()
    for batch in range(15, 24):
        head.push(batch)
        head.turn()
    assert head.link.kinds.count(Kind.WHOLE) == 1, "the replica has the first 14"


def test_a_lazy_replica_gets_a_new_table_at_once() -> None:
    """Before that it could not be promoted: its slots would lack the table."""
    head = Head(replace(CHAIN, ack="None", every_updates=100))
    head.follow()
    head.push(1)
    head.turn()
    assert head.link.kinds == [Kind.FOLLOW] * 2
    assert head.plane.add_table(replace(SPEC, id=1, name="later")) is None
    head.plane.note_given(np.arange(len(head.plane.slots.ids)))
    head.turn()
    head.turn()
    head.link.answer(-1, body=NOTHING)
    head.turn()
    assert head.link.kinds == [*[Kind.FOLLOW] * 3, Kind.WHOLE]


# A replica


class Around:
    def __init__(self) -> None:
        self.told: list[tuple[str, Kind]] = []
        self.answered: list[bytes] = []

    def stream_header(self, kind: Kind) -> Header:
        return Header(kind, 0, 1, 1)

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        self.told.append((member, kind))
        return True

    def answer(self, member: bytes, request: Header, reply: Reply) -> None:
        self.answered.append(member)


class Replica:
    """Of the head, in a chain."""

    def __init__(self, *after: Member, **changes: Any) -> None:
        self.around = Around()
        self.links: list[Link] = []
        self.requests = 0
        self.plane = plane_of(NEXT, ready=False)
        self.plane.slots.state[:] = SlotState.RESTORING
        me = Identity("ns", "job", Role.SERVER, 0, NEXT.incarnation, "")
        self.replicator = Replicator(me, self.connect, self.around, lambda: 0.0)
        self.replicator.attach(self.plane)
        self.replicator.follow(membership(replicas=(NEXT, *after), **changes))
        self.replicator.turn(())

    def connect(self, member: Member) -> Link:
        self.links.append(Link(member))
        return self.links[-1]

    def take(self, kind: Kind, *frames: Frame) -> Reply | None:
        self.requests += 1
        return self.again(kind, *frames)

    def again(self, kind: Kind, *frames: Frame) -> Reply | None:
        """Take what came last once more."""
        header = Header(kind, self.requests, 1, NEXT.incarnation)
        return self.replicator.take(HEAD.id, header, [b"", *frames])

    def follow(self) -> None:
        reply = self.take(Kind.FOLLOW, encode_json({"tables": [SPEC.to_json()]}))
        assert reply is not None
        assert reply.kind is Kind.OK


def whole(number: int, plane: DataPlane) -> list[Frame]:
    return encode_whole(number, plane.whole(np.arange(len(plane.slots.ids))))


def test_a_missing_message_is_refused() -> None:
    replica = Replica()
    replica.follow()
    plane = plane_of(HEAD)
    reply = replica.take(Kind.WHOLE, *whole(2, plane))
    assert reply is not None
    assert (reply.kind, reply.flags) == (Kind.REFUSED, Refusal.UNSURE)
    assert not replica.plane.slots.ready.any()


def test_what_comes_twice_is_taken_once() -> None:
    replica = Replica()
    replica.follow()
    plane = plane_of(HEAD)
    assert replica.take(Kind.WHOLE, *whole(1, plane)) is not None
    before = replica.plane.updates
    assert replica.again(Kind.WHOLE, *whole(2, plane)) is None
    replica.follow()  # the stream's numbers begin anew, those of requests do not
    replica.requests -= 2
    assert replica.take(Kind.WHOLE, *whole(1, plane)) is None
    assert replica.plane.updates == before


def test_a_replica_that_is_promoted_takes_nothing_more_at_once() -> None:
    """In the same turn of the loop: what it serves from now on must not be overwritten."""
    replica = Replica()
    replica.follow()
    promoted = membership(2, members=(NEXT, WORKER), replicas=())
    replica.replicator.follow(promoted)
    reply = replica.take(Kind.WHOLE, *whole(1, plane_of(HEAD)))
    assert reply is not None
    assert (reply.kind, reply.flags) == (Kind.REFUSED, Refusal.STALE_INCARNATION)
    assert not replica.plane.slots.ready.any()


def test_what_waited_for_a_tail_that_is_dropped_is_answered() -> None:
    tail = replace(CHAIN, replicas=3, ack="Tail")
    replica = Replica(THIRD, settings=tail)
    replica.follow()
    following = replica.replicator._next
    assert following is not None
    following.joined = True  # one that has yet to join is not waited for
    assert replica.take(Kind.WHOLE, *whole(1, plane_of(HEAD))) is None
    replica.replicator.turn(())
    assert replica.around.answered == []
    replica.replicator.follow(membership(2, replicas=(NEXT,), settings=tail))
    replica.replicator.turn(())
    assert replica.around.answered == [HEAD.id.encode()]


@pytest.mark.parametrize("replicas", [(NEXT,), (NEXT, THIRD)])
def test_following_is_known_by_whoever_was_counted_on(replicas: tuple[Member, ...]) -> None:
    replica = Replica(*replicas[1:])
    assert replica.replicator.follows is None
    replica.follow()
    assert replica.replicator.follows is None
    assert replica.take(Kind.WHOLE, *whole(1, plane_of(HEAD))) is not None
    assert replica.take(Kind.FOLLOW, encode_json({"number": 2})) is not None
    assert replica.replicator.follows == HEAD.id
