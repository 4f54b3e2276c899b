"""A store that can be away: S3 as moto plays it, whose process is stopped and goes on."""

import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.request import Request, urlopen

from daruma_trainer.bench.arena import START_SECONDS, BenchError
from daruma_trainer.checkpoint.objects import ENV_SECONDS
from daruma_trainer.errors import MissingError

BUCKET = "bench-availability"
PATIENCE = 1.0
"""Seconds after which a server takes an operation on the store for failed (default: 30)."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket, with what a client's environment must hold to reach it."""

    process: subprocess.Popen[bytes]
    port: int
    uri: str = f"s3://{BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever uses it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "us-east-1",
            ENV_SECONDS: str(PATIENCE),
        }

    def away(self, away: bool) -> None:
        """Let every request hang, or have it answer again; nothing of what it holds is lost."""
        self.process.send_signal(signal.SIGSTOP if away else signal.SIGCONT)


@contextmanager
def bucket() -> Iterator[Bucket]:
    """Run an S3 server. MissingError: what it needs is not installed."""
    missing = [name for name in ("moto", "flask", "obstore") if not importlib.util.find_spec(name)]
    if missing:
        raise MissingError(
            f"failures of the store need {', '.join(missing)}: pip install 'daruma-operator[bench]'"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(port)
        yield Bucket(process, port)
    finally:
        process.kill()
        process.wait()


def _make_bucket(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    request = Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urlopen(request, timeout=10.0):  # noqa: S310 - ours
            return
        time.sleep(0.05)
    raise BenchError("moto's S3 server did not start")
