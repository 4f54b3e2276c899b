"""A member that speaks the wire by hand, to say what no well-behaved worker would."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq

from daruma_trainer.contract import Member, Membership
from daruma_trainer.layout import TableSpec
from daruma_trainer.wire import (
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    Slots,
    State,
    TablePush,
    bitmap,
    decode_state,
    encode_json,
    encode_push,
    encode_state,
)
from local_cluster import TOKEN

SECONDS = 10.0


class RawMember:
    """One connection to one server."""

    def __init__(
        self,
        own_id: str,
        server: Member,
        membership: Membership | None = None,
        *,
        token: str = TOKEN,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.routing_id = own_id.encode()
        self._socket.plain_username = own_id.encode()
        self._socket.plain_password = token.encode()
        self._socket.connect(f"tcp://{server.address}")
        self._incarnation = server.incarnation
        self._membership = membership
        """What it tells a server that is not sure; None: nothing."""
        self._epoch = 1 if membership is None else membership.epoch
        self._request = 0

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> "RawMember":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, kind: Kind, body: Sequence[Frame], **changes: int) -> int:
        """Send a request and return its id."""
        self._request += 1
        header = Header(
            kind, self._request, changes.get("epoch", self._epoch),
            changes.get("incarnation", self._incarnation), changes.get("generation", 0),
        )  # fmt: skip
        self._socket.send_multipart([header.encode(), *body])
        return self._request

    def send_raw(self, frames: Sequence[bytes]) -> None:
        """Send frames as they are."""
        self._socket.send_multipart(frames)

    def receive(self, seconds: float = SECONDS) -> tuple[Header, list[bytes]] | None:
        """Return the next message that is not about membership, or None."""
        end = time.monotonic() + seconds
        while self._socket.poll(max(0, int(1000 * (end - time.monotonic())))):
            frames = self._socket.recv_multipart()
            header = Header.decode(frames)
            if header.kind is not Kind.EPOCH or self._membership is None:
                return header, frames
            told = Header(Kind.MEMBERSHIP, 0, self._epoch, self._incarnation)
            self._socket.send_multipart([told.encode(), encode_json(self._membership.to_json())])
        return None

    def answer(self, request: int) -> tuple[Header, list[bytes]]:
        """Wait for the answer to a request."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self.receive(0.5)
            if found is not None and found[0].request == request:
                return found
        raise TimeoutError(f"no answer to request {request}")

    def ask(self, kind: Kind, body: Sequence[Frame], **changes: int) -> tuple[Header, list[bytes]]:
        """Send a request, again while the server is not sure of itself, and wait for its answer."""
        end = time.monotonic() + SECONDS
        while True:
            header, frames = self.answer(self.send(kind, body, **changes))
            unsure = (header.kind, header.flags) == (Kind.REFUSED, Refusal.UNSURE)
            if not unsure or "epoch" in changes or time.monotonic() > end:
                return header, frames

    def create(self, spec: TableSpec) -> Header:
        """Make a table."""
        return self.ask(Kind.CREATE, [encode_json(spec.to_json())])[0]

    def push_body(
        self, worker: int, batch: int, slots: Slots, values: np.ndarray[Any, Any]
    ) -> list[Frame]:
        """Return a push of table 0."""
        part = TablePush(0, 1.0, values.astype(np.float32))
        return encode_push(Push(worker, batch, batch, 1, 0, slots, (part,)))

    def pull(self, slots: Slots, min_step: int = 0) -> State:
        """Pull table 0."""
        header, frames = self.ask(Kind.PULL, [PULL.pack(min_step, 1, 0) + bitmap(slots)])
        if header.kind is not Kind.STATE:
            raise AssertionError(f"{header}: {frames[1]!r}")
        return decode_state(frames)

    def give_copy(self, state: State) -> None:
        """Wait for a Fetch and answer it."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self.receive(0.5)
            if found is not None and found[0].kind is Kind.FETCH:
                header = Header(Kind.COPY, found[0].request, self._epoch, self._incarnation)
                self._socket.send_multipart([header.encode(), *encode_state(state)])
                return
        raise TimeoutError("nobody fetched")
