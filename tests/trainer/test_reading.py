"""Pulls from replicas: whom a worker asks, and that the server answers where no replica does."""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.layout import TableSpec
from daruma_trainer.links import Answer
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.server.data import MAX_READS, DataPlane
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import (
    OWN,
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    TablePush,
    bitmap,
    decode_state,
    encode_push,
    mask_of,
)
from daruma_trainer.worker import reading
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.reading import AGAIN_SECONDS, ANSWER_SECONDS, Readers

SETTINGS = Settings(replicas=3, chain=True, pulls_from_replicas=True)
HEAD = Member(Role.SERVER, 0, 1, "a", "a:1")
FIRST = Member(Role.SERVER, 0, 2, "b", "b:1")
SECOND = Member(Role.SERVER, 0, 3, "c", "c:1")
MEMBERSHIP = Membership("u", "n", "j", 5, 1, 3, (HEAD,), SETTINGS, replicas=(FIRST, SECOND))
STATE = Header(Kind.STATE, 0, 5, 2)
REFUSED = Header(Kind.REFUSED, 0, 5, 2, 0, Refusal.UNSURE)


class Link:
    """What `links.Link` is."""

    def __init__(self, peer: Member, first: int) -> None:
        self.peer, self.first = peer, first
        self.connected, self.closed = True, False
        self.events: list[str] = []
        self.answers: list[Answer] = []

    def request(
        self, header: Header, body: Sequence[Frame], answer: Answer, *, patient: bool
    ) -> bool:
        self.answers.append(answer)
        return True

    def receive(self, ready: Container[object], unasked: Callable[..., None]) -> list[str]:
        events, self.events = self.events, []
        return events

    def forget(self) -> None:
        """Its answers are not expected any more; they may come all the same."""

    def close(self) -> None:
        self.closed = True


class World:
    """Readers of one worker, with a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worker: int = 1) -> None:
        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(reading, "time", clock)
        self.links: list[Link] = []
        self.readers = Readers(worker, self.connect)
        self.readers.follow(MEMBERSHIP)
        self.useful = True
        self.taken = self.instead = 0

    def connect(self, member: Member, first: int) -> Any:
        self.links.append(Link(member, first))
        return self.links[-1]

    def ask(self) -> bool:
        def take(_header: Header, _frames: Sequence[Frame]) -> bool:
            self.taken += self.useful
            return self.useful

        def instead() -> None:
            self.instead += 1

        return self.readers.ask(0, Header(Kind.PULL, 0, 5, 0), [b""], take, instead)

    def turn(self) -> None:
        self.readers.turn({}, lambda *_: None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.mark.parametrize(("worker", "found"), [(0, []), (1, [FIRST]), (2, [SECOND])])
def test_each_worker_reads_another_one_of_the_chain(
    monkeypatch: pytest.MonkeyPatch, worker: int, found: list[Member]
) -> None:
    world = World(monkeypatch, worker)
    assert [link.peer for link in world.links] == found
    assert world.ask() == bool(found)


def test_nobody_reads_a_replica_unless_the_job_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    plain = replace(MEMBERSHIP, settings=replace(SETTINGS, pulls_from_replicas=False))
    world.readers.follow(plain)
    assert world.links[0].closed
    assert not world.ask()


def test_an_answer_is_taken_once(world: World) -> None:
    assert world.ask()
    world.links[0].answers[0](STATE, [])
    world.links[0].answers[0](STATE, [])
    assert (world.taken, world.instead) == (1, 0)


@pytest.mark.parametrize("refused", [True, False])
def test_the_server_is_asked_where_an_answer_is_a_refusal_or_too_old(
    world: World, refused: bool
) -> None:
    world.useful = False
    assert world.ask()
    world.links[0].answers[0](REFUSED if refused else STATE, [])
    assert (world.taken, world.instead) == (0, 1)
    assert not world.ask(), "and for a while no replica is"
    world.now += AGAIN_SECONDS
    assert world.ask()


@pytest.mark.parametrize("how", ["late", "broken", "dropped", "promoted"])
def test_the_server_is_asked_where_no_answer_comes(world: World, how: str) -> None:
    assert world.ask()
    assert world.ask()
    world.now += ANSWER_SECONDS / 2
    world.turn()
    assert world.instead == 0
    if how == "late":
        world.now += ANSWER_SECONDS
        world.turn()
    elif how == "broken":
        world.links[0].events.append("disconnected")
        world.turn()
    elif how == "dropped":
        world.readers.follow(replace(MEMBERSHIP, replicas=(SECOND,)))
    else:
        world.readers.follow(replace(MEMBERSHIP, members=(FIRST,), replicas=(SECOND,)))
    assert world.instead == 2
    for answer in world.links[0].answers:
        answer(STATE, [])
    assert (world.taken, world.instead) == (0, 2), "what comes afterwards is passed over"


def test_no_two_connections_number_their_requests_alike(world: World) -> None:
    world.readers.follow(replace(MEMBERSHIP, replicas=()))
    world.readers.follow(MEMBERSHIP)
    firsts = [link.first for link in world.links]
    assert len(firsts) == 2
    assert len({*firsts, 0}) == 3


# What a replica answers

SPEC = TableSpec(0, "t", (64,), 1, rule_to_json(Add()))
ALL = mask_of(np.arange(1024))
WORKER = b"worker-1-1"


@pytest.fixture
def plane() -> DataPlane:
    plane = DataPlane(MEMBERSHIP, 0, 2)
    plane.add_table(SPEC)
    plane.slots.state[:] = SlotState.READY
    plane.note_given(np.arange(1024))
    return plane


def pull(plane: DataPlane, batch: int) -> Kind | None:
    reply = plane.pull(
        WORKER, Header(Kind.PULL, 1, 5, 2), [b"", PULL.pack(batch, 1, OWN) + bitmap(ALL)]
    )
    return None if reply is None else reply.kind


def push(plane: DataPlane, worker: int, batch: int) -> None:
    part = TablePush(0, 1.0, np.ones(64, np.float32))
    frames = encode_push(Push(worker, batch, batch, 1, 0, ALL, (part,)))
    plane.push(f"worker-{worker}-1".encode(), Header(Kind.PUSH, 1, 5, 2), [b"", *frames])


@pytest.mark.parametrize("consistency", ["Async", "Sync"])
def test_a_pull_waits_for_the_workers_own_batch_alone(plane: DataPlane, consistency: str) -> None:
    plane.sync = plane.steps.clocked = consistency == "Sync"
    plane.slots.last[:, 0] = 1
    assert pull(plane, 1) is None
    plane.slots.last[:, 1] = 1
    plane.slots.last[5, 1] = 0
    assert pull(plane, 1) is None, "one slot lacks it"
    plane.slots.last[5, 1] = 1
    # Worker 2 may be at its end: a replica does not know.
    assert pull(plane, 1) is Kind.STATE


def test_a_pull_is_refused_where_a_slot_is_not_here_or_too_many_wait(plane: DataPlane) -> None:
    for _ in range(MAX_READS):
        assert pull(plane, 1) is None
    assert pull(plane, 1) is Kind.REFUSED
    plane.pulls.clear()
    plane.slots.state[7] = SlotState.RESTORING
    push(plane, 1, 1)
    assert pull(plane, 1) is Kind.REFUSED


def test_a_copy_knows_what_is_older_than_itself(plane: DataPlane) -> None:
    def state() -> Any:
        reply = plane.pull(
            WORKER, Header(Kind.PULL, 1, 5, 2), [b"", PULL.pack(0, 1, 0) + bitmap(ALL)]
        )
        assert reply is not None
        return decode_state([b"", *reply.body])

    copy = HostCopy("u", 1, 3)
    copy.add(SPEC)
    copy.arrange()
    before = state()
    push(plane, 1, 1)
    after = state()
    copy.take(before)
    assert not copy.outdates(before)
    copy.take(after)
    assert copy.outdates(before)
    assert not copy.outdates(after)
    plane.slots.position[:] = 0
    plane.slots.lineage[:] = 9
    assert not copy.outdates(state()), "a newer lineage begins at any position"
