"""A simulated network: what `links.Link` and `server.door.Door` are, moved by hand.

What a connection does is what ZeroMQ's do: it keeps order; when it breaks, what was on its way is
lost, what waited in the sender's queue is not, and its owner hears of it.
"""

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from daruma_trainer.contract import Member, Suspect
from daruma_trainer.links import Answer
from daruma_trainer.wire import Frame, Header

Message = list[bytes]


@dataclass(slots=True)
class Network:
    """All connections there are, and who listens."""

    wires: list["Wire"] = field(default_factory=list)
    inboxes: dict[str, deque[tuple[bytes, Message]]] = field(default_factory=dict)
    """By server: (sender, message) that came and were not read yet."""


class Everything:
    """Sockets at which the poller saw something."""

    def __contains__(self, _socket: object) -> bool:
        return True


class Wire:
    """A connection from a member to a server: what `links.Link` is."""

    def __init__(self, network: Network, own: str, peer: Member, first: int = 0) -> None:
        self.network, self.own, self.peer = network, own, peer
        self.connected = self.closed = self.full = False
        self.up: deque[Message] = deque()
        self.down: deque[Message] = deque()
        self.came: deque[Message] = deque()
        self._events: list[str] = []
        self._pending: dict[int, Answer] = {}
        self._request = first
        network.wires.append(self)

    # What a Link does

    def request(
        self, header: Header, body: Sequence[Frame], answer: Answer | None, *, patient: bool = False
    ) -> bool:
        self._request += 1
        whole = replace(header, request=self._request, incarnation=self.peer.incarnation)
        if not self.send(whole, body):
            return False
        if answer is not None:
            self._pending[self._request] = answer
        return True

    def send(self, header: Header, body: Sequence[Frame]) -> bool:
        if self.full:
            return False
        self.up.append([header.encode(), *map(bytes, body)])
        return True

    def receive(
        self, ready: Container[object], unasked: Callable[[Any, Header, Sequence[Frame]], None]
    ) -> list[str]:
        while self.came:
            parts = self.came.popleft()
            header = Header.decode(parts)
            if header.incarnation != self.peer.incarnation:
                continue
            answer = self._pending.pop(header.request, None) if header.request else None
            if answer is not None:
                answer(header, parts)
            else:
                unasked(self, header, parts)
        events, self._events = self._events, []
        return events

    def suspect(self, seconds: float) -> Suspect | None:
        return None

    def forget(self) -> None:
        self._pending.clear()

    def expire(self, seconds: float, patience: float = 0.0) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.came.clear()
        self._pending.clear()
        if not (self.connected and self.up):
            self.network.wires.remove(self)

    # What the network does

    def connect(self) -> None:
        self.connected = True
        self._events.append("connected")

    def cut(self, lost: int, kept: int) -> None:
        """Break: the first messages on their way are lost; those that had come are read."""
        if not self.connected:
            return
        self.connected = False
        self._events.append("disconnected")
        for _ in range(min(lost, len(self.up))):
            self.up.popleft()
        self.came.extend(list(self.down)[:kept])
        self.down.clear()

    def drop(self, number: int) -> None:
        """One of the messages on their way is lost, and later ones are not.

        No connection does that. A queue that is full, or a frame that is passed over, would be it.
        """
        if len(self.up) > 1:
            del self.up[number % (len(self.up) - 1)]

    def repeat(self, number: int, later: int, *, down: bool) -> None:
        """One of the messages on their way comes twice, again after so many that follow it.

        No connection does that either.
        """
        queue = self.down if down else self.up
        if queue:
            number %= len(queue)
            queue.insert(number + 1 + later, list(queue[number]))

    def end(self, arrive: int) -> None:
        """Its owner is killed: no more than so many of its messages still arrive."""
        while len(self.up) > arrive:
            self.up.pop()

    def carry(self, up: int, down: int) -> int:
        """Let so many messages arrive; returns how many did."""
        moved = 0
        inbox = self.network.inboxes.get(self.peer.id)
        while self.connected and self.up and up and inbox is not None:
            up -= 1
            moved += 1
            inbox.append((self.own.encode(), self.up.popleft()))
        while self.connected and self.down and down and not self.closed:
            down -= 1
            moved += 1
            self.came.append(self.down.popleft())
        if self.closed and not self.up and self in self.network.wires:
            self.network.wires.remove(self)
        return moved


class Door:
    """What `server.door.Door` is."""

    def __init__(self, network: Network, me: str) -> None:
        self.network, self.me = network, me
        self._inbox = network.inboxes.setdefault(me, deque())
        self.members: set[str] = set()
        self.allowed = 0
        """How many messages the loop gets."""

    @property
    def workers(self) -> list[str]:
        return sorted(m for m in self.members if m.startswith("worker-"))

    def receive(self) -> tuple[bytes, Message] | None:
        if not self.allowed or not self._inbox:
            return None
        self.allowed -= 1
        return self._inbox.popleft()

    def send(self, identity: bytes, header: Header, body: Sequence[Frame]) -> bool:
        for wire in self.network.wires:
            there = wire.connected and not wire.closed
            if there and (wire.own, wire.peer.id) == (identity.decode(), self.me):
                wire.down.append([header.encode(), *map(bytes, body)])
                return True
        return False

    def close(self) -> None:
        pass
