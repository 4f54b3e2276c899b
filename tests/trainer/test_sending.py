"""What a worker pushes to one server, message by message."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from daruma_trainer.contract import SLOTS, Replay, Settings
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import (
    Frame,
    Header,
    Kind,
    Push,
    Slots,
    bitmap,
    decode_push,
)
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.pushes import Held, Pushes, Update
from daruma_trainer.worker.sending import Sender

NOTHING = np.zeros(SLOTS, np.bool_)
Take = Callable[[Any, Header, Sequence[Frame]], None]


class Server:
    """A session with server 1 of two, whose shard takes several messages, and a replay for it."""

    def __init__(self, **settings: Any) -> None:
        self.copy = HostCopy("uid", 2, 1)
        self.copy.add(TableSpec(0, "t", (2048, 2048), 1, rule_to_json(Add())))
        self.copy.arrange()
        self.pushes = Pushes(Replay())
        self.membership = SimpleNamespace(settings=Settings(**settings))
        self.asked: list[tuple[Push, Take]] = []
        self.again = 0
        worker = SimpleNamespace(me=SimpleNamespace(index=0))
        self.sender = Sender(cast("Any", self), cast("Any", worker))
        values = np.ones((2048, 2048), np.float32)
        self.pushes.begin(1)
        held = Held(1, 1, (Update(0, 1.0, values),))
        self.pushes.hold(held)
        self.pushes.accumulate(held, 1, self.copy, 0.0, [Add()])
        self.pushes.note_applied(1, self.copy.slots_of(0))
        self.pushes.seal(1, None, [Add()])

    def synced(self, server: int) -> object:
        assert server == 1
        return self

    def ask(
        self, _session: object, kind: Kind, body: Sequence[Frame], then: Take, *, patient: bool
    ) -> None:
        assert kind is Kind.PUSH
        assert patient
        frames = [np.ascontiguousarray(frame).tobytes() for frame in body]
        self.asked.append((decode_push([b"", *frames]), then))

    def retry(self, _session: object) -> None:
        self.again += 1

    def send(self) -> list[tuple[Push, Take]]:
        self.asked = []
        for done in self.pushes.sealed.get(1, []):
            self.sender.sealed(1, done)
        return self.asked

    def answer(self, sent: tuple[Push, Take], applied: Slots, overlap: Slots = NOTHING) -> None:
        body = bitmap(applied) + bitmap(overlap)
        sent[1](self, Header(Kind.ACK, 0, 1, 1), [b"", memoryview(body)])


def test_a_replay_of_several_messages_is_kept_until_all_are_acknowledged() -> None:
    server = Server()
    first, *others = server.send()
    assert others
    server.answer(first, first[0].slots)
    assert server.pushes.acked == 0
    assert server.pushes.unsent(1) == Stretches.of((1, 1)), "or the server counts it as lost"
    # The connection breaks; what came is not sent again.
    rest = server.send()
    assert [push.slots.tolist() for push, _ in rest] == [p.slots.tolist() for p, _ in others]
    for sent in rest:
        server.answer(sent, sent[0].slots)
    assert (server.pushes.acked, server.pushes.sealed, server.again) == (1, {}, 0)


def test_what_a_server_could_not_take_of_a_replay_is_sent_again() -> None:
    server = Server()
    first, *_ = server.send()
    some = first[0].slots & (np.cumsum(first[0].slots) > 1)
    server.answer(first, some)
    assert server.again == 1
    assert len(server.send()) > 1, "all of them: the first lacks a slot"


def test_a_new_incarnation_gets_all_of_a_replay() -> None:
    server = Server()
    sent = server.send()
    server.answer(sent[0], sent[0][0].slots)
    server.pushes.hold_again(1, server.copy.slots_of(1))
    assert len(server.send()) == len(sent)


def test_a_replay_that_overlaps_in_one_message_is_lost_and_done_with_all() -> None:
    server = Server()
    for sent in server.send():
        server.answer(sent, NOTHING, sent[0].slots)
    assert server.pushes.lost == Stretches.of((1, 1))
    assert server.pushes.sealed == {}


def test_a_replay_that_was_kept_for_copies_is_let_go_when_none_are_asked_for() -> None:
    """Nobody may say any more that it is covered."""
    server = Server(copies=2)
    for sent in server.send():
        server.answer(sent, sent[0].slots)
    assert (server.pushes.acked, len(server.pushes.sealed[1])) == (0, 1)
    server.membership.settings = Settings()
    server.pushes.cover_nothing()
    for sent in server.send():
        server.answer(sent, sent[0].slots)
    assert (server.pushes.acked, server.pushes.sealed) == (1, {})


def test_a_replay_took_until_it_was_applied_however_long_it_is_kept() -> None:
    server = Server(copies=2)
    for sent in server.send():
        assert server.pushes.latency.seen.count == 0
        server.answer(sent, sent[0].slots)
    assert server.pushes.latency.seen.count == 1
    assert server.pushes.sealed, "it is not covered yet"
