"""What every store does, a directory and a bucket alike."""

import resource
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest

from daruma_trainer.checkpoint.objects import ENV_SECONDS, ObjectStore, Patience, open_objects
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.errors import (
    ConfigurationError,
    MissingError,
    StoreAwayError,
    StoreError,
    StoreFullError,
)
from s3_server import SECRET

LARGE = 9 << 20
"""Sent in parts."""


@pytest.fixture(params=["directory", "bucket", "folder"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind; `folder` is one within a bucket."""
    if request.param == "directory":
        return f"file://{tmp_path}/made/when/needed"
    bucket: str = request.getfixturevalue("s3")
    return bucket if request.param == "bucket" else f"{bucket}/a/folder.of-it/"


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


# Contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_written_is_read(store: Store, kind: Callable[[bytes], bytes]) -> None:
    store.write("a/b/c", kind(b"0123456789"))
    assert store.read("a/b/c") == b"0123456789"
    assert type(store.read("a/b/c")) is bytes
    assert store.read("a/b/c", 3, 4) == b"3456"
    assert store.read("a/b/c", 0, 0) == b""
    store.write("a/b/c", kind(b"new"))
    assert store.read("a/b/c") == b"new"


def test_nothing_is_an_object_too(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.list("empty") == []
    assert store.read_ranges("empty", [(0, 0)]) == [b""]


def test_a_large_object(store: Store) -> None:
    data = bytes(range(256)) * (LARGE // 256)
    store.write("large", data)
    assert store.read("large") == data
    assert store.read_ranges("large", [(LARGE - 3, 3), (8 << 20, 5)]) == [
        data[-3:],
        data[8 << 20 : (8 << 20) + 5],
    ]


def test_ranges_come_in_the_order_asked_for(store: Store) -> None:
    data = bytes(i * 7 % 256 for i in range(1 << 16))
    store.write("x", data)
    ranges = [(60_000, 10), (0, 4), (2, 4), (5, 0), (0, 4), (65_535, 1)]
    assert store.read_ranges("x", ranges) == [data[o : o + n] for o, n in ranges]
    assert store.read_ranges("x", []) == []


def test_ranges_come_into_memory_that_there_is(store: Store) -> None:
    store.write("x", b"0123456789")
    memory = bytearray(b"-" * 6)
    found = store.read_ranges("x", [(7, 2), (4, 0), (0, 3)], memoryview(memory))
    assert [bytes(part) for part in found] == [b"78", b"", b"012"]
    assert bytes(memory) == b"78012-", "one after another"
    with pytest.raises(StoreError, match="ends at 10"):
        store.read_ranges("x", [(0, 2), (8, 3)], memoryview(memory))


@pytest.mark.parametrize("ranges", [[(8, 4)], [(0, 2), (10, 1)], [(100, 5)], [(0, 11)], [(-1, 2)]])
def test_short_ranges_are_errors(store: Store, ranges: list[tuple[int, int]]) -> None:
    store.write("x", b"0123456789")
    with pytest.raises(StoreError, match="x"):
        store.read_ranges("x", ranges)


def test_a_missing_object(store: Store) -> None:
    store.write("there/x", b"1")
    for ask in (
        lambda: store.read("there/y"),
        lambda: store.read("there/y", 0, 1),
        lambda: store.read_ranges("there/y", [(0, 1)]),
        lambda: store.read_ranges("there/y", []),
    ):
        with pytest.raises(StoreError, match=r"cannot read there/y.*[Nn]o such") as caught:
            ask()
        assert type(caught.value) is StoreError, "the store was there, and said so"
    store.delete("there/y")
    assert store.read("there/x") == b"1"


def test_a_list_is_of_what_is_right_below(store: Store) -> None:
    for name in ("f/b", "f/a/1", "f/a/2", "f/c/d/e", "fa/no", "g"):
        store.write(name, b"1")
    assert store.list("f") == ["a", "b", "c"]
    assert store.list("f/c") == ["d"]
    assert store.list("nothing") == []
    store.delete("f/b")
    assert "b" not in store.list("f")
    with pytest.raises(StoreError):
        store.read("f/b")


def test_a_name_is_created_once(store: Store) -> None:
    assert store.create("cuts/1", b"first") is True
    assert store.create("cuts/1", b"second") is False
    assert store.read("cuts/1") == b"first"
    assert store.list("cuts") == ["1"]
    store.delete("cuts/1")
    assert store.create("cuts/1", b"third") is True


def test_of_several_who_create_at_once_one_is_left(store: Store) -> None:
    begin = threading.Barrier(6)

    def create(i: int) -> bool:
        begin.wait(30)
        return store.create("cuts/1", str(i).encode())

    for _ in range(5):
        with ThreadPoolExecutor(6) as pool:
            won = [i for i, first in enumerate(pool.map(create, range(6))) if first]
        # One, of a directory and of S3; moto looks first and writes then, so it may let two.
        assert won
        assert int(store.read("cuts/1")) in won
        if not isinstance(store, ObjectStore):
            assert len(won) == 1
        store.delete("cuts/1")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b"])
def test_names_stay_within_the_store(store: Store, name: str) -> None:
    for ask in (
        lambda: store.read(name),
        lambda: store.read_ranges(name, []),
        lambda: store.write(name, b""),
        lambda: store.create(name, b""),
        lambda: store.list(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(StoreError, match="not a name within the store"):
            ask()


def test_a_folder_of_a_bucket_is_a_store_of_its_own(s3: str) -> None:
    open_store(f"{s3}/one").write("x", b"1")
    assert open_store(f"{s3}/two").list("x") == []
    assert open_store(s3).read("one/x") == b"1"


# A full disk ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StoreFullError, match="a/x"):
            store.write("a/x", bytes(8192))
        with pytest.raises(StoreFullError, match="a/y"):
            store.create("a/y", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# A volume that goes -----------------------------------------------------------------------------

JOB = "ns/job/uid"
VERBS: dict[str, Callable[[Store], object]] = {
    "read": lambda s: s.read(f"{JOB}/shard/there"),
    "read_ranges": lambda s: s.read_ranges(f"{JOB}/shard/there", [(0, 1)]),
    "list": lambda s: s.list(f"{JOB}/shard"),
    "write": lambda s: s.write(f"{JOB}/shard/new", b"1"),
    "create": lambda s: s.create(f"{JOB}/cuts/new", b"1"),
    "delete": lambda s: s.delete(f"{JOB}/shard/there"),
}


class Volume:
    """A store below a mount point, with one object."""

    def __init__(self, folder: Path) -> None:
        self.point, self._aside = folder / "volume", folder / "aside"
        self.uri = f"file://{self.point}/store"
        self.store = open_store(self.uri, JOB)
        self.store.write(f"{JOB}/shard/there", b"1")

    def unmount(self) -> None:
        """An empty folder stays."""
        self.point.rename(self._aside)
        self.point.mkdir()

    def mount(self) -> None:
        """Fails unless it is empty still."""
        self._aside.rename(self.point)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("seen", ["by this process", "by others"])
def test_a_store_whose_volume_is_not_mounted_is_away(volume: Volume, verb: str, seen: str) -> None:
    store = volume.store
    if seen == "by others":
        store = open_store(volume.uri, JOB, there=True)
    volume.unmount()
    with pytest.raises(StoreAwayError, match="is not there any more: mount its volume again"):
        VERBS[verb](store)
    volume.mount()
    VERBS[verb](store)
    assert [p.name for p in (volume.point / "store" / JOB).rglob("*.partial")] == []


@pytest.mark.parametrize("verb", VERBS)
def test_of_a_mount_point_that_is_gone_the_same_is_said(volume: Volume, verb: str) -> None:
    volume.unmount()
    volume.point.rmdir()
    with pytest.raises(StoreAwayError, match="mount its volume again"):
        VERBS[verb](volume.store)
    volume.mount()
    VERBS[verb](volume.store)


def test_a_jobs_folder_is_made_once(volume: Volume) -> None:
    """Not again in another volume, though other jobs' folders lie there."""
    volume.unmount()
    (volume.point / "store" / JOB).parent.mkdir(parents=True)
    for verb in ("write", "create"):
        with pytest.raises(StoreAwayError, match="where it was removed, make it again"):
            VERBS[verb](volume.store)
    (volume.point / "store" / JOB).mkdir()
    VERBS["write"](volume.store)
    assert volume.store.list(f"{JOB}/shard") == ["new"]


def test_a_store_that_nobody_wrote_to_is_empty(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/volume/store", JOB)
    for verb in ("read", "read_ranges"):
        with pytest.raises(StoreError, match="No such file") as caught:
            VERBS[verb](store)
        assert type(caught.value) is StoreError
    assert VERBS["list"](store) == []
    VERBS["delete"](store)
    VERBS["write"](store)
    assert VERBS["list"](store) == ["new"]


# Opening ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://x/y", "write file:///absolute/path, s3://"),
        ("file://host/y", "write file:///absolute/path"),
        ("/a/path", "write file:///absolute/path"),
        ("s3://", "s3://bucket/folder"),
        ("s3://UPPER/x", "s3://bucket/folder"),
        ("gs://b", "gs://bucket/folder"),
        ("az://con/../x", "az://bucket/folder"),
        ("s3://bucket/a b", "s3://bucket/folder"),
    ],
)
def test_uris_that_name_no_store(uri: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_store(uri)


@pytest.mark.parametrize("uri", [f"s3://id:{SECRET}@bucket/x", f"az://con/x?sig={SECRET}"])
def test_credentials_are_not_taken_from_a_uri_nor_shown(uri: str) -> None:
    with pytest.raises(ConfigurationError, match="come from the environment") as caught:
        open_store(uri)
    assert SECRET not in str(caught.value)


def test_other_clouds_are_opened_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", SECRET)
    assert isinstance(open_store("az://container/folder"), ObjectStore)
    assert isinstance(open_store("gs://bucket/folder"), ObjectStore)


def test_wrong_settings_are_said_without_what_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", f'"{SECRET}"')
    with pytest.raises(ConfigurationError, match="gs://bucket: the environment's") as caught:
        open_store("gs://bucket")
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigurationError, match="Account must be specified"):
        open_store("az://container")


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingError, match=r"pip install 'daruma-operator\[objects\]'"):
        open_store("s3://bucket")


def test_a_bucket_that_is_not_there(s3: str) -> None:
    store = open_store("s3://no-such-bucket")
    for ask in (
        lambda: store.read("x"),
        lambda: store.read_ranges("x", [(0, 1)]),
        lambda: store.write("x", b"1"),
        lambda: store.create("x", b"1"),
        lambda: store.list("x"),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StoreError, match="no such bucket: make it, or correct the URI"):
            ask()


def test_an_endpoint_without_tls_must_be_allowed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="needs AWS_ALLOW_HTTP=true"):
        open_objects(s3, Patience(seconds=3.0)).write("x", b"1")


def test_what_killed_writes_left_is_swept(store: Store, uri: str) -> None:
    store.write("top/old/x", b"1")
    left = []
    if uri.startswith("file://"):
        root = Path(uri.removeprefix("file://"))
        left = [root / f"top/{name}.7-140.partial" for name in ("old/y.seg", "new/y.seg")]
        for path in left:
            path.parent.mkdir(exist_ok=True)
            path.touch()
    asked: list[str] = []

    def dead(name: str) -> bool:
        asked.append(name)
        return name.startswith("old/")

    store.sweep("top", dead)
    store.sweep("nothing/here", dead)
    assert sorted(asked) == (["new/y.seg", "old/y.seg"] if left else [])
    assert [path.exists() for path in left] == ([False, True] if left else [])
    assert store.read("top/old/x") == b"1"


def test_a_stores_patience_comes_from_the_environment() -> None:
    assert Patience.from_environment({}) == Patience()
    assert Patience.from_environment({ENV_SECONDS: "3"}) == Patience(3.0, 0.8, 2.0)
    for text in ("", "long", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigurationError, match="DARUMA_STORE_SECONDS"):
            Patience.from_environment({ENV_SECONDS: text})


def test_the_server_of_these_tests_is_one(s3_port: int) -> None:
    with urlopen(f"http://127.0.0.1:{s3_port}/", timeout=30) as answer:
        assert b"ListAllMyBucketsResult" in answer.read()
