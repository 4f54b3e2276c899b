"""Pulls from replicas: each worker from one of a server's chain (spec.recovery.chain.pulls: Any).

A replica has what its server had a moment ago: a prefix of the same updates, with the same versions
and applied vectors. So a pull names the worker's own last batch, and the replica answers once it
has that; and the worker takes no slot that is older than its copy. Whatever else goes wrong, or
takes too long, is asked of the server: no pull depends on a replica.
"""

import itertools
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from daruma_trainer.contract import Member, Membership
from daruma_trainer.links import Link
from daruma_trainer.wire import Frame, Header, Kind

ANSWER_SECONDS = 1.0
"""Then the server is asked. A replica that hangs costs a step so long, and no more."""
AGAIN_SECONDS = 2.0
"""Before a replica that could not answer is asked again."""
NUMBERS = 1 << 48
"""Requests to replicas that a connection may number. Each begins above the last one's: a process
may be asked on one connection and answer on the next, as a replica or, promoted, as a server."""

Take = Callable[[Header, Sequence[Frame]], bool]


@dataclass(slots=True)
class _Reader:
    """Of one replica."""

    link: Link
    asked: dict[int, tuple[float, Callable[[], None]]] = field(default_factory=dict)
    """When, and what to do where no answer comes."""
    not_before: float = 0.0


class Readers:
    """The replicas that one worker pulls from, by server."""

    def __init__(self, worker: int, connect: Callable[[Member, int], Link]) -> None:
        """`connect`: to a member, with requests numbered from there on."""
        self._worker, self._connect = worker, connect
        self._by_server: dict[int, _Reader] = {}
        self._numbers = itertools.count(1)
        self._connections = itertools.count(NUMBERS, NUMBERS)

    def follow(self, membership: Membership) -> None:
        """Close and open connections as the membership says."""
        servers = range(membership.servers if membership.settings.pulls_from_replicas else 0)
        wanted = {server: self._choice(membership, server) for server in servers}
        for server, reader in list(self._by_server.items()):
            if wanted.get(server) != reader.link.peer:
                del self._by_server[server]
                self._give_up(reader)
                reader.link.close()
        for server, member in wanted.items():
            if member is not None and server not in self._by_server:
                self._by_server[server] = _Reader(self._connect(member, next(self._connections)))

    def _choice(self, membership: Membership, server: int) -> Member | None:
        """Another one of the chain for each worker; None: the server itself."""
        chain = [m for m in membership.chain(server) if m.address is not None]
        chosen = chain[(self._worker + server) % len(chain)] if chain else None
        return chosen if chosen in membership.replicas else None

    def close(self) -> None:
        """Close all connections."""
        for reader in self._by_server.values():
            reader.link.close()
        self._by_server.clear()

    def ask(
        self, server: int, header: Header, body: Sequence[Frame], take: Take,
        instead: Callable[[], None],
    ) -> bool:  # fmt: skip
        """Ask a replica; False: the server is to be asked.

        `take` says whether an answer is of use; `instead` is called where none is or comes.
        """
        reader, now = self._by_server.get(server), time.monotonic()
        if reader is None or not reader.link.connected or now < reader.not_before:
            return False
        number = next(self._numbers)

        def answered(header: Header, frames: Sequence[Frame]) -> None:
            if reader.asked.pop(number, None) is None:
                return  # the server was asked meanwhile
            if header.kind is Kind.REFUSED or not take(header, frames):
                reader.not_before = time.monotonic() + AGAIN_SECONDS
                instead()

        if not reader.link.request(header, body, answered, patient=True):
            return False
        reader.asked[number] = now, instead
        return True

    def turn(
        self,
        ready: Container[object],
        unasked: Callable[[Link, Header, Sequence[Frame]], None],
    ) -> None:
        """Take in what has come, and give up what does not come."""
        late = time.monotonic() - ANSWER_SECONDS
        for reader in list(self._by_server.values()):
            broken = "disconnected" in reader.link.receive(ready, unasked)
            # In the order in which they were asked.
            oldest = next(iter(reader.asked.values()), None)
            if oldest is not None and (broken or oldest[0] < late):
                self._give_up(reader)

    def _give_up(self, reader: _Reader) -> None:
        reader.not_before = time.monotonic() + AGAIN_SECONDS
        reader.link.forget()
        asked, reader.asked = reader.asked, {}
        for _, instead in asked.values():
            instead()
