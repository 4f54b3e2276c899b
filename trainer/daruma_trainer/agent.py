"""The agent: a small HTTP server in every member, through which the operator sees and commands it.

GET /v1/view?after=V&wait=S    what this process knows; answers at once when newer than V
PUT /v1/membership             a newer membership: 204, or 409 if it is not newer
POST /v1/restore               where to take lost slots from: 204, 409
POST /v1/checkpoint            save the final cut: 204, 409
GET /v1/shard                  the whole shard of a server that hands it over: 200, 409
GET /healthz, GET /metrics     without the token

Commands go to the thread that owns the member's state; the agent only waits for its answer.
"""

import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from daruma_trainer.contract import (
    MAX_CONTROL_BYTES,
    ContractError,
    Membership,
    Report,
    Restore,
    View,
)

MAX_WAIT = 30.0
"""Longest long poll, in seconds."""
COMMAND_SECONDS = 10.0
"""How long a command may take before the agent answers 503."""
STILL_SECONDS = 1.0
"""A member shows what it knows several times a second. One that did not for so long stands still,
or did until now, when all of its process was stopped:"""
TURN_SECONDS = 0.2
"""then it shows something within this time."""
MAX_THREADS = 64
"""Requests handled at once; more are refused with 503."""
SOCKET_SECONDS = 60.0
"""A silent connection is closed after this long, so that idle clients hold no thread for ever."""
STRANGER_SECONDS = 5.0
"""The same, before the first request that had the token."""
MAX_CONNECTIONS = 128
"""Each holds a thread; more are closed unread."""


@dataclass(frozen=True, slots=True)
class Command:
    """What the operator asks for."""

    kind: str
    """membership | restore | checkpoint"""
    body: Membership | Restore | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a command."""

    status: int = HTTPStatus.NO_CONTENT
    message: str = ""


class ViewCell:
    """The newest view, handed from the thread that owns the state to those that ask for it."""

    def __init__(self, own: Report) -> None:
        self._condition = threading.Condition()
        self._version = 1
        self._own = own
        self._others: dict[str, tuple[float, Report]] = {}
        self._epoch = 0
        self._shown_at = time.monotonic()

    def publish(self, epoch: int, own: Report, others: dict[str, tuple[float, Report]]) -> None:
        """Replace what is known. `others` holds the monotonic time at which each was heard."""
        with self._condition:
            self._epoch, self._own, self._others = epoch, own, others
            self._version += 1
            self._shown_at = time.monotonic()
            self._condition.notify_all()

    def wait(self, after: int, seconds: float) -> View:
        """Return the newest view, once it is newer than `after` or the time is up."""
        with self._condition:
            self._condition.wait_for(lambda: self._version > after, timeout=seconds)
            if time.monotonic() - self._shown_at > STILL_SECONDS:
                self._condition.wait(TURN_SECONDS)
            now = time.monotonic()
            others = {i: (now - heard, report) for i, (heard, report) in self._others.items()}
            return View(self._version, self._epoch, self._own, others, now - self._shown_at)


class Agent:
    """Serves one member's control API from threads of its own until `close`."""

    def __init__(
        self,
        listen: tuple[str, int],
        token: str,
        view: ViewCell,
        command: Callable[[Command], Outcome],
        metrics: Callable[[], bytes],
        shard: Callable[[], Iterator[bytes | bytearray] | None] = lambda: None,
    ) -> None:
        slots = threading.BoundedSemaphore(MAX_THREADS)

        class Handler(_Handler):
            pass

        Handler.token, Handler.view, Handler.slots = token, view, slots
        Handler.obey = staticmethod(command)
        Handler.scrape = staticmethod(metrics)
        Handler.shard = staticmethod(shard)
        self._http = _Server(listen, Handler)
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.1,), name="agent", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._http.server_address[1])

    def close(self) -> None:
        """Stop listening; requests in progress end with their connections."""
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there is one left."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is the client's business: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = STRANGER_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1
    token: ClassVar[str]
    view: ClassVar[ViewCell]
    slots: ClassVar[threading.BoundedSemaphore]
    obey: ClassVar[Callable[[Command], Outcome]]
    scrape: ClassVar[Callable[[], bytes]]
    shard: ClassVar[Callable[[], Iterator[bytes | bytearray] | None]]

    def do_GET(self) -> None:
        """Serve the view, health and metrics."""
        url = urlsplit(self.path)
        if url.path == "/healthz":
            self._answer(HTTPStatus.OK, b"ok\n", "text/plain")
        elif url.path == "/metrics":
            self._answer(HTTPStatus.OK, type(self).scrape(), "text/plain; version=0.0.4")
        elif url.path not in ("/v1/view", "/v1/shard"):
            self._refuse(HTTPStatus.NOT_FOUND, "NotFound", f"no {url.path[:100]}")
        elif self._authorised():
            if url.path == "/v1/view":
                self._view(parse_qs(url.query[:1000]))
            else:
                self._shard()

    def do_PUT(self) -> None:
        """Take a membership."""
        self._command({"/v1/membership": "membership"})

    def do_POST(self) -> None:
        """Take a restore plan, or the order to save."""
        self._command({"/v1/restore": "restore", "/v1/checkpoint": "checkpoint"})

    def _view(self, query: dict[str, list[str]]) -> None:
        try:
            after = int(query.get("after", ["0"])[0])
            wait = float(query.get("wait", ["0"])[0])
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "BadQuery", "after and wait are numbers")
            return
        wait = wait if 0 <= wait <= MAX_WAIT else MAX_WAIT
        if not self.slots.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Busy", "too many requests at once")
            return
        try:
            view = self.view.wait(after, wait)
        finally:
            self.slots.release()
        self._answer(HTTPStatus.OK, json.dumps(view.to_json()).encode(), "application/json")

    def _shard(self) -> None:
        pieces = type(self).shard()
        if pieces is None:
            self._refuse(HTTPStatus.CONFLICT, "NotFrozen", "this member hands nothing over")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        # Its length stands in its head; the end of the connection is the end of it.
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
        self.wfile.flush()

    def _command(self, paths: dict[str, str]) -> None:
        kind = paths.get(urlsplit(self.path).path)
        if not self._authorised():
            return
        if kind is None:
            self._refuse(HTTPStatus.NOT_FOUND, "NotFound", f"no {self.path[:100]}")
            return
        body = self._body()
        if body is None:
            return
        parse: dict[str, Callable[[Any], Any]] = {
            "membership": Membership.from_json,
            "restore": Restore.from_json,
            "checkpoint": _checkpoint,
        }
        try:
            command = Command(kind, parse[kind](json.loads(body)))
        except (ContractError, ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, "Malformed", str(error)[:500])
            return
        outcome = type(self).obey(command)
        if outcome.status == HTTPStatus.NO_CONTENT:
            self._answer(HTTPStatus.NO_CONTENT, b"", "application/json")
        else:
            self._refuse(HTTPStatus(outcome.status), "Refused", outcome.message)

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        digits = length.isascii() and length.isdigit() and len(length) < 10
        if not digits or int(length) > MAX_CONTROL_BYTES:
            self.close_connection = True
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "TooLarge",
                f"a Content-Length of at most {MAX_CONTROL_BYTES} is needed",
            )
            return None
        return self.rfile.read(int(length))

    def _authorised(self) -> bool:
        given = self.headers.get("Authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            self.connection.settimeout(SOCKET_SECONDS)
            return True
        # The body stays unread, so the connection cannot be used again.
        self.close_connection = True
        self._refuse(HTTPStatus.UNAUTHORIZED, "Unauthorized", "the job's token is needed")
        return False

    def _refuse(self, status: HTTPStatus, error: str, message: str) -> None:
        body = json.dumps({"error": error, "message": message}).encode()
        self._answer(status, body, "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: a long poll a second would drown what matters."""


def _checkpoint(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict) or raw.get("kind") != "final":
        raise ContractError("a checkpoint request is {kind: final, number: N}")
    number = raw.get("number")
    if not isinstance(number, str) or not number or len(number) > 64 or "/" in number:
        raise ContractError("a cut's number is a short text without slashes")
    return {"kind": "final", "number": number}
