"""What comes over a connection and is no message: it ends neither a server nor a worker."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import zmq

from daruma_trainer.agent import Command
from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.errors import GaveUpError
from daruma_trainer.identity import Identity
from daruma_trainer.links import Link
from daruma_trainer.server.door import Door
from daruma_trainer.wire import MAX_META, Frame, Header, Kind, bitmap
from daruma_trainer.worker.client import Client
from local_cluster import TOKEN, free_ports

SECONDS = 20.0


class Peer:
    """Server 0, which says what it is told to."""

    def __init__(self) -> None:
        self.port = free_ports()
        me = Identity("n", "j", Role.SERVER, 0, 1, TOKEN, ("127.0.0.1", self.port))
        self.member = Member(Role.SERVER, 0, 1, "p", f"127.0.0.1:{self.port}")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.poller = zmq.Poller()
        self._door = Door(me, self.context, self.poller)

    def turn(self) -> tuple[dict[object, int], bytes, list[Frame]]:
        """Take in what has come, if anything has: what is ready, from whom, and what."""
        ready: dict[object, int] = dict(self.poller.poll(50))
        found = self._door.receive() if self._door.let_in(ready) else None
        return (ready, *(found or (b"", [])))

    def hear(self, kind: Kind) -> bytes:
        """Wait for a message of a kind; returns from whom it is."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            _, sender, frames = self.turn()
            if frames and Header.decode(frames).kind is kind:
                return sender
        raise TimeoutError(f"no {kind.name}")

    def say(self, to: bytes, kind: Kind, body: bytes) -> None:
        assert self._door.send(to, Header(kind, 0, 1, 1), [body])

    def close(self) -> None:
        self._door.close()
        self.context.destroy(linger=0)


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def test_a_message_that_is_none_is_passed_over_and_the_next_is_taken(peer: Peer) -> None:
    link = Link(peer.context, "server-1-1", TOKEN, peer.member, peer.poller)
    assert link.request(Header(Kind.HELLO, 0, 1, 0), [b"{}"], None)
    heard: list[Kind] = []

    def unasked(_link: Link, header: Header, _frames: Sequence[Frame]) -> None:
        heard.append(header.kind)

    sender = peer.hear(Kind.HELLO)
    peer.say(sender, Kind.MEMBERSHIP, b"x" * (MAX_META + 1))
    peer.say(sender, Kind.READY, b"{}")
    end = time.monotonic() + SECONDS
    while not heard and time.monotonic() < end:
        link.receive(peer.turn()[0], unasked)
    assert heard == [Kind.READY]
    link.close()


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(Identity("n", "j", Role.WORKER, 0, 1, TOKEN, ("127.0.0.1", free_ports())))
    yield made
    made.close()


def join(client: Client, *others: Member, servers: int = 1, workers: int = 1) -> None:
    """Give a worker its first membership."""
    me = Member(Role.WORKER, 0, 1, "w", f"127.0.0.1:{client.me.listen[1]}")
    members = (*others, me)
    membership = Membership(
        "u", "n", "j", 1, servers, workers, members, Settings(suspect_seconds=0.05)
    )
    assert client._command(Command("membership", membership)).status == 204


def test_a_worker_outlives_a_question_that_it_cannot_answer(peer: Peer, client: Client) -> None:
    join(client, peer.member)
    worker = peer.hear(Kind.REPORT)
    everything = bitmap(np.ones(1024, np.bool_))
    for malformed in (b"short", everything + bytes(12), everything + b"x"):
        peer.say(worker, Kind.FETCH, malformed)
    peer.say(worker, Kind.COVERED, b"{}")
    peer.say(worker, Kind.FETCH, everything)  # of nothing that it has: there is no answer
    for _ in range(4):  # the first ones may have been on their way
        assert peer.hear(Kind.REPORT) == worker
    assert client.failure is None


def gives_up(client: Client, seconds: float = 0.3) -> str:
    with pytest.raises(GaveUpError) as raised:
        client.wait(lambda: False, seconds, "a step")
    return str(raised.value)


def test_a_worker_that_gives_up_says_whom_it_waited_for(peer: Peer, client: Client) -> None:
    assert "worker-0-1: a step did not come within 0.3 s: the operator" in gives_up(client)
    nobody = Member(Role.SERVER, 1, 4, "q", f"127.0.0.1:{free_ports()}")
    missing = Member(Role.WORKER, 1, 5, "w1")
    join(client, peer.member, nobody, missing, servers=3, workers=2)
    peer.hear(Kind.REPORT)  # and it is not answered
    said = gives_up(client)
    assert "server-0-1 gives no answer for 0 s: see its log; " in said
    assert "server-1-4 cannot be reached for 0 s: see its log; " in said
    assert "server-2 does not run, or was lost: see the job's events; " in said
    assert said.endswith("worker-1-5 has no address yet")
