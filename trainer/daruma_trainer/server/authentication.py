"""Who may connect: PLAIN through ZAP, once a connection, so nothing unauthenticated is parsed.

The user is the member's id and the password the job's token. ZAP is answered by the serve loop
itself; libzmq asks before it hands on a single message of the new connection.
"""

import hmac
import re

import zmq

ZAP = "inproc://zeromq.zap.01"
DOMAIN = "daruma"
USER = re.compile(rb"(server|worker)-[0-9]{1,9}-[0-9]{1,18}")


class Gate:
    """Answers libzmq's question whether a peer may connect."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], token: str) -> None:
        self._token = token.encode()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket ask; before it is bound."""
        socket.plain_server = True
        socket.zap_domain = DOMAIN.encode()

    def answer(self) -> None:
        """Answer one question."""
        frames = self.socket.recv_multipart(zmq.NOBLOCK)
        good = len(frames) == 8 and frames[5] == b"PLAIN" and self._good(frames[6], frames[7])
        user = frames[6] if good else b""
        status = (b"200", b"OK") if good else (b"400", b"the job's token is needed")
        self.socket.send_multipart(
            [b"1.0", frames[1] if len(frames) > 1 else b"", *status, user, b""]
        )

    def user_of(self, frame: zmq.Frame) -> bytes:
        """Return the id that the sender of a message authenticated with."""
        try:
            user = frame.get("User-Id")
        except zmq.ZMQError:
            return b""
        return user.encode() if isinstance(user, str) else b""

    def close(self) -> None:
        """Stop answering."""
        self.socket.close()

    def _good(self, user: bytes, password: bytes) -> bool:
        return hmac.compare_digest(password, self._token) and bool(USER.fullmatch(user))
