"""The connections that a server opened to the other servers of its job. For the loop's thread."""

from collections.abc import Callable, Container, Sequence
from functools import partial

import zmq

from daruma_trainer.contract import Membership, Role, Suspect
from daruma_trainer.identity import Identity
from daruma_trainer.links import Link
from daruma_trainer.wire import Frame, Header

REPORT_SECONDS = 5.0
"""An unanswered report of this age is forgotten: newer ones were sent long before."""


class Siblings:
    """Links to all servers of the newest membership that have an address, but this one."""

    def __init__(
        self, me: Identity, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller
    ) -> None:
        self._me = me
        self._context, self._poller = context, poller
        self._links: dict[str, Link] = {}
        self._newest: Membership | None = None

    def follow(self, membership: Membership) -> None:
        """Open and close links at the next `turn`: one of them may be being read now."""
        self._newest = membership

    def turn(
        self,
        ready: Container[object],
        unasked: Callable[[Link, Header, Sequence[Frame]], None],
    ) -> None:
        """Take in what has come (`ready`: Link.receive), then do what `follow` asked for."""
        for link in self._links.values():
            link.receive(ready, unasked)
        if self._newest is not None:
            self._relink(self._newest)
            self._newest = None

    def ask(
        self,
        count: int,
        header: Header,
        body: Sequence[Frame],
        answer: Callable[[str, Header, Sequence[Frame]], None],
    ) -> list[str]:
        """Ask some that are connected; returns whom. `answer` is called with their ids."""
        chosen = [i for i, link in self._links.items() if link.connected][:count]
        for peer in chosen:
            self._links[peer].request(header, body, partial(answer, peer))
        return chosen

    def report(self, header: Header, body: Sequence[Frame]) -> None:
        """Send a report to all."""
        for link in self._links.values():
            link.expire(REPORT_SECONDS)
            link.request(header, body, None)

    def tell(self, index: int, header: Header, body: Sequence[Frame]) -> None:
        """Send something to the server of an index."""
        for link in self._links.values():
            if link.peer.index == index:
                link.request(header, body, None)

    def suspects(self, seconds: float) -> tuple[Suspect, ...]:
        """Return those that cannot be reached, or leave a request unanswered for so long."""
        found = (link.suspect(seconds) for link in self._links.values())
        return tuple(s for s in found if s is not None)

    def close(self) -> None:
        """Close all links."""
        for link in self._links.values():
            link.close()

    def _relink(self, membership: Membership) -> None:
        wanted = {
            m.id: m
            for m in membership.of(Role.SERVER)
            if m.id != self._me.id and m.address is not None
        }
        for gone in [i for i in self._links if i not in wanted]:
            self._links.pop(gone).close()
        for peer, member in wanted.items():
            if peer not in self._links:
                me = self._me
                self._links[peer] = Link(self._context, me.id, me.token, member, self._poller)
