"""Where workers and siblings come in: the bound socket, and the gate before it. For the loop."""

from collections.abc import Sequence

import zmq

from daruma_trainer.identity import Identity
from daruma_trainer.links import open_socket
from daruma_trainer.server.authentication import Gate
from daruma_trainer.wire import Frame, Header

LINGER_MS = 200
"""How long what was sent may still take to go out when this closes."""


class Door:
    """Takes messages of members that have the job's token, and answers them."""

    def __init__(
        self, me: Identity, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller
    ) -> None:
        self.members: set[str] = set()
        """Who has said something; one that went away since stays in it."""
        self._gate = Gate(context, me.token)
        self._router = open_socket(context, zmq.ROUTER)
        self._router.router_handover = True
        self._router.router_mandatory = True
        self._gate.guard(self._router)
        host, port = me.listen
        self._router.bind(f"tcp://{host}:{port}")
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._gate.socket, zmq.POLLIN)

    @property
    def workers(self) -> list[str]:
        """Workers that have said something."""
        return [member for member in self.members if member.startswith("worker-")]

    def let_in(self, ready: dict[object, int]) -> bool:
        """Answer who asks to connect; True if a message is there."""
        if self._gate.socket in ready:
            self._gate.answer()
        return self._router in ready

    def receive(self) -> tuple[bytes, list[Frame]] | None:
        """Return the next message and who sent it; None: there is none.

        One of a peer that took another's name is empty: nothing of it is to be read.
        """
        try:
            frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        parts: list[Frame] = [frame.buffer for frame in frames]
        identity = bytes(parts[0])
        if len(frames) < 2 or self._gate.user_of(frames[1]) != identity:
            return identity, []
        return identity, parts[1:]

    def send(self, identity: bytes, header: Header, body: Sequence[Frame]) -> bool:
        """Send to somebody who has said something; False if that cannot be done now."""
        try:
            self._router.send_multipart([identity, header.encode(), *body], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            return False  # gone, or it does not read: it will ask again
        return True

    def close(self) -> None:
        """Let nobody in any more."""
        self._router.close(linger=LINGER_MS)
        self._gate.close()
