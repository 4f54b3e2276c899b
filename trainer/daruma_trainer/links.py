"""Connections of a member to servers: one DEALER socket each, watched, with requests that expire.

A link belongs to one thread. It names the server's incarnation in each request, counts an answer
only from that incarnation, and knows at once when the connection breaks (a socket monitor), where
a timeout would be paid otherwise. What died with a peer is sent again by its owner, not by zmq.
"""

import logging
import struct
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import zmq

from daruma_trainer.contract import ContractError, Member, Suspect
from daruma_trainer.wire import HEADER, MAX_FRAME, Frame, Header

LOG = logging.getLogger("daruma")
EVENT = struct.Struct("=HI")
"""First frame of a monitor's message: the event and its value (zmq_socket_monitor(3)). pyzmq's own
reader imports asyncio, which a server that is waited for would start with for nothing."""
HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2000
CONNECT_TIMEOUT_MS = 1000
RECONNECT_MS = 20
RECONNECT_MAX_MS = 200
HIGH_WATER = 2048
"""Messages queued for a peer that does not read; a worker never has more than its held pushes."""

Answer = Callable[[Header, Sequence[Frame]], None]


@dataclass(slots=True)
class _Pending:
    sent_at: float
    answer: Answer
    patient: bool


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """Return a socket with the limits and heartbeats that every connection of ours has."""
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = MAX_FRAME + 4096
    socket.sndhwm = socket.rcvhwm = HIGH_WATER
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
    socket.connect_timeout = CONNECT_TIMEOUT_MS
    socket.reconnect_ivl = RECONNECT_MS
    socket.reconnect_ivl_max = RECONNECT_MAX_MS
    socket.handshake_ivl = 5000
    return socket


class Link:
    """To one incarnation of one server. Closed and replaced when the membership names another."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        own_id: str,
        token: str,
        peer: Member,
        poller: zmq.Poller,
        first: int = 0,
    ) -> None:
        """`first`: its requests are numbered from here on, so that no other link to the same
        process, before or after it, takes an answer to one of them for its own."""
        if peer.address is None:
            raise ValueError(f"{peer.id} has no address yet")
        self.peer = peer
        self._poller = poller
        self._socket = open_socket(context, zmq.DEALER)
        self._socket.routing_id = own_id.encode()
        self._socket.plain_username = own_id.encode()
        self._socket.plain_password = token.encode()
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(events)
        self._socket.connect(f"tcp://{peer.address}")
        self._pending: dict[int, _Pending] = {}
        self._request = first
        self.connected = False
        self._broken_at: float | None = None
        self._opened_at = time.monotonic()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)

    def close(self) -> None:
        """Close both sockets; what was pending is forgotten."""
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._pending.clear()

    def request(
        self, header: Header, body: Sequence[Frame], answer: Answer | None, *, patient: bool = False
    ) -> bool:
        """Send a request; False if the peer's queue is full (then it is as good as away).

        The link fills in the request's id and the peer's incarnation. `patient`: the answer may
        well take long (a later step), so that its lack makes nobody a suspect.
        """
        self._request += 1
        whole = replace(header, request=self._request, incarnation=self.peer.incarnation)
        if not self.send(whole, body):
            return False
        if answer is not None:
            self._pending[self._request] = _Pending(time.monotonic(), answer, patient)
        return True

    def send(self, header: Header, body: Sequence[Frame]) -> bool:
        """Send a message that nobody answers."""
        try:
            self._socket.send_multipart([header.encode(), *body], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(
        self,
        ready: Container[object],
        unasked: Callable[["Link", Header, Sequence[Frame]], None],
    ) -> list[str]:
        """Take in all that has come: answers to their requests, the rest to `unasked`.

        `ready`: the sockets where the poller saw something; to ask others costs system calls.
        Returns what the monitor saw: `connected`, `disconnected`.
        """
        while self._socket in ready:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            parts = [frame.buffer for frame in frames]
            if len(parts) < 2 or len(parts[0]) != HEADER.size:
                continue
            try:
                self._take(parts, unasked)
            except ContractError as error:
                # Of another version, perhaps: that is no reason to leave what comes after it.
                LOG.warning("passed over a message of %s: %s", self.peer.id, error)
        return self._events() if self._monitor in ready else []

    def _take(
        self, parts: Sequence[Frame], unasked: Callable[["Link", Header, Sequence[Frame]], None]
    ) -> None:
        header = Header.decode(parts)
        if header.incarnation != self.peer.incarnation:
            return
        pending = self._pending.pop(header.request, None) if header.request else None
        if pending is not None:
            pending.answer(header, parts)
        else:
            unasked(self, header, parts)

    def expire(self, seconds: float, patience: float = 0.0) -> None:
        """Forget requests that were unanswered for so long; their owner has sent them again.

        `patience`: how long a patient one may stay, where that is longer.
        """
        now = time.monotonic()
        limits = {False: now - seconds, True: now - max(seconds, patience)}
        self._pending = {i: p for i, p in self._pending.items() if p.sent_at > limits[p.patient]}

    def forget(self) -> None:
        """Expect no answer any more."""
        self._pending.clear()

    def suspect(self, seconds: float) -> Suspect | None:
        """Say why this peer seems to be away, if it does.

        `seconds`: an unanswered request of this age is a sign too.
        """
        now = time.monotonic()
        if not self.connected:
            since = self._broken_at or self._opened_at
            if self._broken_at is None and now - since < seconds:
                return None
            reason = "Disconnected" if self._broken_at is not None else "Unconnected"
            return Suspect(self.peer.id, now - since, reason)
        oldest = min((p.sent_at for p in self._pending.values() if not p.patient), default=now)
        if now - oldest > seconds:
            return Suspect(self.peer.id, now - oldest, "Unanswered")
        return None

    def _events(self) -> list[str]:
        seen = []
        while self._monitor.poll(0):
            event, _ = EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self._broken_at = True, None
                seen.append("connected")
            elif event == zmq.EVENT_DISCONNECTED:
                if self.connected:
                    self._broken_at = time.monotonic()
                self.connected = False
                seen.append("disconnected")
        return seen
