"""Settings of all tests, and the S3 server that some of them use."""

import itertools
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from s3_server import environment, make_bucket, s3_server

# Before numpy is loaded: the tests share few cores, and threads of linear algebra that wait for
# each other burn them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Speed is judged by benchmarks, never by a test: a busy machine must not fail one.
settings.register_profile("daruma", deadline=None)
settings.load_profile("daruma")

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server; one for all tests of this process."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, as a store's URI; the environment is such that a store can be opened."""
    bucket = f"bucket-{next(_NUMBERS)}"
    make_bucket(s3_port, bucket)
    for key, value in environment(s3_port).items():
        monkeypatch.setenv(key, value)
    return f"s3://{bucket}"
