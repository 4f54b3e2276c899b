"""A real S3 server (moto) in a process of its own; it ends when the process that made it does.

    python tests/s3_server.py BUCKET COMMAND...

runs a command in whose environment it is; it has one bucket, empty.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.request import Request, urlopen

_SERVER = """\
import sys
from urllib.request import Request, urlopen
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(sys.argv[1], 0, verbose=False)
server.start()
port = server.get_host_and_port()[1]
for bucket in sys.argv[2:]:
    urlopen(Request(f"http://{sys.argv[1]}:{port}/{bucket}", method="PUT"), timeout=30).close()
print(port, flush=True)
sys.stdin.read()
"""
SECRET = "not-to-be-seen-anywhere"


@contextmanager
def s3_server(*buckets: str, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[int]:
    """Run it (`prefix`: somewhere else), and give its port on `host`."""
    with subprocess.Popen(
        [*prefix, sys.executable, "-W", "ignore", "-c", _SERVER, host, *buckets],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "moto did not start: is moto[server] installed?"
        try:
            yield int(line)
        finally:
            process.kill()


def make_bucket(port: int, name: str) -> None:
    """Make a bucket."""
    with urlopen(Request(f"http://127.0.0.1:{port}/{name}", method="PUT"), timeout=30) as answer:
        assert answer.status == 200


def uploads(port: int, bucket: str) -> int:
    """Count the uploads in parts that were begun, and neither ended nor given up."""
    with urlopen(f"http://127.0.0.1:{port}/{bucket}?uploads", timeout=30) as answer:
        return int(answer.read().count(b"<UploadId>"))


def environment(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """Return what a client's environment must hold."""
    return {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


if __name__ == "__main__":
    with s3_server(sys.argv[1]) as at:
        done = subprocess.run(sys.argv[2:], env={**os.environ, **environment(at)}, check=False)
    sys.exit(done.returncode)
