"""An HTTP proxy before a store that fails on order, and counts what it did."""

import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fault(StrEnum):
    """What may happen to a request."""

    UNAVAILABLE = "503"
    THROTTLED = "429"
    DENIED = "403, and the body repeats what was sent"
    FULL = "507"
    GONE = "404, as of an object that is not there"
    SILENT = "taken and never answered"
    REFUSED = "closed at once"
    CUT_REQUEST = "the server gets half of the body"
    CUT_RESPONSE = "the client gets half of the body"
    LOST_ANSWER = "done, but the client hears nothing of it"
    TRICKLE = "a byte of the answer now and then, so that no connection is ever silent"


_ANSWERS = {
    Fault.UNAVAILABLE: (503, "ServiceUnavailable"),
    Fault.THROTTLED: (429, "SlowDown"),
    Fault.DENIED: (403, "SignatureDoesNotMatch"),
    Fault.FULL: (507, "InsufficientStorage"),
    Fault.GONE: (404, "NoSuchKey"),
}


@dataclass
class FaultyProxy:
    """Requests of `method` (any: "") whose path holds `path` meet the fault, `times` of them; all
    others pass."""

    port: int = 0
    method: str = ""
    path: str = ""
    fault: Fault | None = None
    times: int = 0
    page: int | None = None
    """Lists come in pages of so many."""
    done: Counter[Fault] = field(default_factory=Counter)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def fail(self, fault: Fault, times: int = 1_000_000, method: str = "", path: str = "") -> None:
        """Let the next requests fail."""
        with self.lock:
            self.fault, self.times = fault, times
            self.method, self.path = method, path

    def heal(self) -> None:
        """Let every request pass."""
        with self.lock:
            self.fault = None

    def paged(self, path: str) -> str:
        """Return the path that the server is asked for."""
        return path + f"&max-keys={self.page}" if self.page and "list-type" in path else path

    def take(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        """Say what happens to a request."""
        with self.lock:
            self.seen.append((method, path, headers))
            hit = self.method in ("", method) and self.path in path
            if self.fault is None or not self.times or not hit:
                return None
            self.times -= 1
            self.done[self.fault] += 1
            return self.fault


class _Server(ThreadingHTTPServer):
    def __init__(self, proxy: FaultyProxy, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy, self.upstream = proxy, upstream
        proxy.port = self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        # What the client broke off is its own matter.
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        pass

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = dict(self.headers.items())
        fault = self.server.proxy.take(self.command, self.path, headers)
        self.close_connection = fault is not None
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>{headers}</Message></Error>".encode()
            self.answer(status, {"Content-Type": "application/xml"}, text, len(text))
        elif fault is Fault.SILENT:
            self.server.proxy.closing.wait(60)
        elif fault is Fault.CUT_REQUEST:
            self.half(headers, body)
        elif fault is not Fault.REFUSED:
            self.forward(fault, headers, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815 - http.server's names

    def forward(self, fault: Fault | None, headers: dict[str, str], body: bytes) -> None:
        server = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            server.request(self.command, self.server.proxy.paged(self.path), body, headers)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if fault is Fault.LOST_ANSWER:
            return
        kept = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("connection", "content-length", "transfer-encoding")
        }
        length = int(answer.getheader("Content-Length") or len(data))
        if fault is None:
            self.answer(answer.status, kept, data, length)
        elif fault is Fault.CUT_RESPONSE:
            self.answer(answer.status, kept, data[: len(data) // 2], length)
        else:
            self.answer(answer.status, kept, b"", length)
            for i in range(len(data)):
                if self.server.proxy.closing.wait(0.1):
                    return
                self.wfile.write(data[i : i + 1])

    def answer(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def half(self, headers: dict[str, str], body: bytes) -> None:
        """Send what a broken connection would have let through, and let the server see it."""
        with socket.create_connection(("127.0.0.1", self.server.upstream), timeout=60) as server:
            head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
            text = f"{self.command} {self.path} HTTP/1.1\r\n{head}\r\n".encode()
            server.sendall(text + body[: len(body) // 2])
            server.shutdown(socket.SHUT_WR)
            # Until it has made up its mind: then nothing of this comes later.
            deadline = time.monotonic() + 10
            with contextlib.suppress(OSError):
                while server.recv(65536) and time.monotonic() < deadline:
                    pass


@contextmanager
def faulty_proxy(upstream: int) -> Iterator[FaultyProxy]:
    """Run one on 127.0.0.1 before a server there."""
    proxy = FaultyProxy()
    server = _Server(proxy, upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
