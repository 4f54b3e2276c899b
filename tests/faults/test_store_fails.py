"""What a bucket does whose server fails, between the two of them a proxy that does it on order."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from daruma_trainer.checkpoint.objects import Patience, open_objects
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.errors import StoreAwayError, StoreError, StoreFullError
from faulty_proxy import Fault, FaultyProxy, faulty_proxy
from s3_server import SECRET, environment, uploads

BRIEF = Patience(seconds=3.0, silence=0.5, retrying=2.0)
"""For what never heals."""
LATE = 30.0
"""Where no deadline held, nothing would end before the proxy's own, which is twice as long."""
HEALING = Patience(silence=3.0)
"""For what heals, on however busy a machine."""
LARGE = 9 << 20
"""Sent in parts."""

Verb = Callable[[Store], object]
READS: dict[str, Verb] = {
    "read": lambda s: s.read("there"),
    "read_ranges": lambda s: s.read_ranges("there", [(0, 500), (900, 100)]),
    "list": lambda s: s.list("folder"),
}
WRITES: dict[str, Verb] = {
    "write": lambda s: s.write("new", b"1" * 1000),
    "write-large": lambda s: s.write("new", b"1" * LARGE),
    "create": lambda s: s.create("new", b"1" * 1000),
    "delete": lambda s: s.delete("gone"),
}
VERBS = READS | WRITES


class Broken:
    """A store behind a proxy that fails on order, and the same store seen without it."""

    def __init__(self, proxy: FaultyProxy, uri: str, port: int) -> None:
        self.proxy = proxy
        self.direct = open_store(uri)
        self.port, self.bucket = port, uri.removeprefix("s3://")
        self.direct.write("there", b"x" * 1000)
        self.direct.write("folder/one", b"1")
        os.environ.update(environment(proxy.port))
        self.uri = uri
        self.brief = open_objects(uri, BRIEF)
        self.store = open_objects(uri, HEALING)

    def fails(self, verb: Verb, store: Store | None = None) -> str:
        """Run what must end in StoreAwayError, in time; returns its message."""
        began = time.monotonic()
        with pytest.raises(StoreAwayError) as caught:
            verb(store or self.brief)
        assert time.monotonic() - began < LATE
        message = str(caught.value)
        assert f"s3://{self.bucket}" in message
        assert SECRET not in message
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__, "the library's text may hold a signature"
        return message


@pytest.fixture
def broken(s3: str, s3_port: int) -> Iterator[Broken]:
    # `s3` puts the environment back.
    with faulty_proxy(s3_port) as proxy:
        yield Broken(proxy, s3, s3_port)


@pytest.mark.parametrize(
    "fault", [Fault.UNAVAILABLE, Fault.THROTTLED, Fault.SILENT, Fault.REFUSED, Fault.CUT_REQUEST]
)
def test_a_store_that_stays_broken_is_given_up(broken: Broken, fault: Fault) -> None:
    broken.proxy.fail(fault)
    with ThreadPoolExecutor(len(VERBS)) as pool:
        for message in pool.map(broken.fails, VERBS.values()):
            assert "check the network and the endpoint" in message
    assert broken.proxy.done[fault] >= len(VERBS)
    with pytest.raises(StoreError, match="no such object"):
        broken.direct.read("new")


def test_a_list_of_many_pages_is_whole(broken: Broken) -> None:
    names = [f"{i:02d}" for i in range(25)]
    for name in names:
        broken.direct.write(f"many/{name}", b"1")
    broken.direct.write("many/a/b", b"1")
    broken.proxy.page = 10
    assert broken.store.list("many") == [*names, "a"]
    assert len([path for _, path, _ in broken.proxy.seen if "many" in path]) == 3


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.THROTTLED])
def test_what_passes_is_repeated(broken: Broken, fault: Fault, verb: str) -> None:
    broken.proxy.fail(fault, times=2)
    VERBS[verb](broken.store)
    assert broken.proxy.done[fault] == 2


@pytest.mark.parametrize("verb", ["read", "read_ranges", "list", "write", "write-large"])
@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.REFUSED])
def test_a_connection_that_breaks_once_is_no_failure(
    broken: Broken, fault: Fault, verb: str
) -> None:
    broken.proxy.fail(fault, times=1)
    VERBS[verb](broken.store)
    assert broken.proxy.done[fault] == 1


@pytest.mark.parametrize("verb", READS)
def test_an_answer_that_is_cut_is_asked_for_again(broken: Broken, verb: str) -> None:
    broken.proxy.fail(Fault.CUT_RESPONSE, times=1)
    assert READS[verb](broken.store) == READS[verb](broken.direct)
    assert broken.proxy.done[Fault.CUT_RESPONSE] == 1
    broken.proxy.fail(Fault.CUT_RESPONSE)
    broken.fails(READS[verb])


def test_an_answer_that_never_ends_is_given_up(broken: Broken) -> None:
    store = open_objects(broken.uri, Patience(seconds=3.0, silence=30.0))
    broken.proxy.fail(Fault.TRICKLE)
    assert "not done within 3 s" in broken.fails(READS["read_ranges"], store)
    assert "not done in time" in broken.fails(READS["read"], store)


@pytest.mark.parametrize("verb", ["write", "write-large", "create"])
def test_a_request_that_is_cut_leaves_nothing_to_be_read(broken: Broken, verb: str) -> None:
    broken.proxy.fail(Fault.CUT_REQUEST, method="PUT")
    broken.fails(WRITES[verb])
    broken.proxy.heal()
    with pytest.raises(StoreError, match="no such object"):
        broken.direct.read("new")
    assert WRITES[verb](broken.store) is not False
    assert set(broken.direct.read("new")) == set(b"1")
    # The parts of what was given up are given up as well: they would be kept, and paid for.
    assert uploads(broken.port, broken.bucket) == 0


def test_a_write_whose_answer_is_lost_is_done(broken: Broken) -> None:
    broken.proxy.fail(Fault.LOST_ANSWER, times=1)
    broken.store.write("new", b"data")
    assert broken.direct.read("new") == b"data"


def test_a_create_whose_answer_is_lost_is_never_done_twice(broken: Broken) -> None:
    broken.proxy.fail(Fault.LOST_ANSWER, times=1, method="PUT")
    # Not True by mistake: whether it was done nobody can know, so that is what is said.
    with contextlib.suppress(StoreError):
        assert broken.store.create("new", b"mine") is False
    assert broken.store.create("new", b"another's") is False
    assert broken.direct.read("new") == b"mine"
    conditional = [h for m, p, h in broken.proxy.seen if m == "PUT" and p.endswith("/new")]
    assert conditional
    assert all({k.lower(): v for k, v in h.items()}["if-none-match"] == "*" for h in conditional)


@pytest.mark.parametrize("verb", VERBS)
def test_who_is_refused_is_told_what_to_check(broken: Broken, verb: str) -> None:
    broken.proxy.fail(Fault.DENIED)
    message = broken.fails(VERBS[verb], broken.store)
    assert "403 Forbidden (SignatureDoesNotMatch)" in message
    assert "spec.checkpoint.secretRef" in message
    assert "Credential=" not in message
    assert broken.proxy.done[Fault.DENIED] == 1, "what is refused is not asked again"


def test_a_store_without_space_says_so(broken: Broken) -> None:
    broken.proxy.fail(Fault.FULL, method="PUT")
    store = open_objects(broken.uri, Patience(retrying=1.0))
    with pytest.raises(StoreFullError, match="no space left, or a quota"):
        store.write("new", b"1")


def test_nobody_listens(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(1) as proxy:
        port = proxy.port
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match="check the network and the endpoint"):
        open_objects(s3, BRIEF).write("x", b"1")
