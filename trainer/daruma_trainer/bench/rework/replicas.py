"""One way to keep replicas of all servers of a run: the servers' own streams, in one process.

A head's `Stream` sends, a `Replicator` takes; between them is a queue in place of a connection.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.arena import Servers, membership, seconds_of
from daruma_trainer.bench.rework.arms import SERVERS, Cost, Replication
from daruma_trainer.contract import Member, Membership, Role, Settings, Suspect
from daruma_trainer.identity import Identity
from daruma_trainer.links import Answer
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.inflow import Inflow
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.server.replication.stream import Connection, Send, Stream, policy_of
from daruma_trainer.server.replies import Reply
from daruma_trainer.wire import Frame, Header, Kind

REPLICA = 2
"""Incarnation of every replica."""
JOINING = 8
"""Turns after which every replica has everything."""


class Replicas:
    """One replica of each server.

    Where workers keep their pushes until these are covered, the last step's updates are still
    under way whenever somebody looks; elsewhere everything that was sent has come.
    """

    def __init__(self, servers: Servers, replication: Replication) -> None:
        self._held_up = self._background = 0.0
        self._first = 0
        """Bytes that were sent until all had joined."""
        self._servers, self._settings = servers, _settings(replication)
        self._membership = _membership(servers.uid, self._settings)
        self._planes = [DataPlane(self._membership, i, REPLICA) for i in range(SERVERS)]
        self._wires = [_Wire(plane, i, self._membership) for i, plane in enumerate(self._planes)]
        self._streams = []
        for plane, wire in zip(servers.planes, self._wires, strict=True):
            stream = Stream(plane, wire, lambda kind: Header(kind, 0, 1, REPLICA), lambda: 0.0)
            stream.settings = self._settings
            self._streams.append(stream)

    def begin(self) -> None:
        """Let the replicas join; BenchError if one does not."""
        for stream in self._streams:
            stream.restart()
        for _ in range(JOINING):
            self._turn()
            self.deliver()
        if not all(stream.joined for stream in self._streams):
            raise BenchError("a replica did not join")
        self._held_up = self._background = 0.0
        self._first = self._sent

    def pushed(self) -> None:
        """The servers have just applied a push."""
        self.deliver()
        self._held_up += seconds_of(self._forward)
        if not self._settings.covers:
            self.deliver()

    def deliver(self) -> None:
        """What was sent comes, and is answered."""
        for wire in self._wires:
            self._background += seconds_of(wire.deliver)

    @property
    def by_itself(self) -> bool:
        """Whether the heads send without being asked to: else workers' copies are fresher."""
        return policy_of(self._settings, self._servers.planes[0]) is not Send.DEMAND

    def promote(self, server: int) -> DataPlane:
        """Return a new shard of what a replica has, and of what its worker pushes again."""
        mine = self._planes[server]
        plane = DataPlane(self._membership, server, REPLICA)
        inflow = Inflow(plane)
        inflow.begin("", self._servers.specs)
        inflow.whole("", 1, mine.whole(np.arange(len(mine.slots.ids))))
        if self._settings.covers:
            self._servers.push_again(plane, server)
        return plane

    @property
    def cost(self) -> Cost:
        """What they have cost since all had joined; the steps are left to the caller."""
        tables = [table for plane in self._planes for table in plane.shard.tables]
        memory = sum(array.nbytes for t in tables for array in (t.data, *t.state))
        return Cost(0, self._sent - self._first, 0, self._held_up, self._background, memory)

    @property
    def _sent(self) -> int:
        return sum(stream.bytes_total for stream in self._streams)

    def _forward(self) -> None:
        for stream, plane, frames in zip(
            self._streams, self._servers.planes, self._servers.frames, strict=True
        ):
            stream.forward(frames, np.arange(len(plane.slots.ids)), (0,))
        self._turn()

    def _turn(self) -> None:
        for stream in self._streams:
            stream.turn((), demanded=False)


class _Wire:
    """From a head to its replica: what a `links.Link` is, without sockets."""

    def __init__(self, plane: DataPlane, index: int, members: Membership) -> None:
        self.peer = members.chain(index)[1]
        self.connected = True
        self._head = members.chain(index)[0].id
        me = Identity(members.namespace, members.name, Role.SERVER, index, REPLICA, "")
        self._replica = Replicator(me, _no_connection, _Nobody())
        self._replica.attach(plane)
        self._replica.follow(members)
        self._queue: list[tuple[Header, Sequence[Frame], Answer | None]] = []
        self._requests = 0

    def deliver(self) -> None:
        """Let the replica take and answer what is under way."""
        queue, self._queue = self._queue, []
        for header, body, answer in queue:
            reply = self._replica.take(self._head, header, [header.encode(), *body])
            if reply is None or reply.kind is Kind.REFUSED:
                raise BenchError(f"{self.peer.id} refuses its head's stream: {reply}")
            if answer is not None:
                answer(Header(reply.kind, 0, 1, REPLICA), [b"", *reply.body])

    def request(self, header: Header, body: Sequence[Frame], answer: Answer | None) -> bool:
        """See Connection."""
        self._requests += 1
        self._queue.append((replace(header, request=self._requests), body, answer))
        return True

    def receive(
        self, ready: Container[object], unasked: Callable[[Any, Header, Sequence[Frame]], None]
    ) -> list[str]:
        """See Connection: `deliver` has done it."""
        del ready, unasked
        return []

    def suspect(self, seconds: float) -> Suspect | None:
        """See Connection."""
        del seconds
        return None

    def forget(self) -> None:
        """See Connection."""
        self._queue.clear()

    def close(self) -> None:
        """See Connection."""


class _Nobody:
    """The surroundings of a replica that is the last of its chain: it answers at once."""

    def stream_header(self, kind: Kind) -> Header:
        """See Surroundings."""
        raise NotImplementedError

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        """See Surroundings."""
        raise NotImplementedError

    def answer(self, member: bytes, request: Header, reply: Reply) -> None:
        """See Surroundings."""
        raise NotImplementedError


def _no_connection(member: Member) -> Connection:
    raise NotImplementedError(f"nobody follows {member.id}")


def _settings(replication: Replication) -> Settings:
    """What a job that replicates so has of its spec."""
    ack, every = replication.ack, replication.every
    if ack is None:
        return Settings(replicas=2, copies=2)
    return Settings(replicas=2, chain=True, ack=ack.value, every_updates=every)


def _membership(uid: str, settings: Settings) -> Membership:
    """The job of `arena.membership`, with a replica of each server in the pod of the next one."""
    members = membership(uid)
    replicas = tuple(
        Member(Role.SERVER, i, REPLICA, f"server-{(i + 1) % SERVERS}", f"host:{7500 + i}")
        for i in range(SERVERS)
    )
    return replace(members, settings=settings, replicas=replicas)
