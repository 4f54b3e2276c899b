"""Where saves lie: what a store can do, and a directory that does it. `objects` has the others."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np

from daruma_trainer.errors import (
    ConfigurationError,
    StoreAwayError,
    StoreError,
    StoreFullError,
)

OBJECT_SCHEMES = ("s3", "gs", "az")
_PARTIAL = ".partial"
_AWAY = frozenset(
    {
        errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
    }
)  # fmt: skip
"""What a file system says whose server cannot be reached. Not EIO: that is a disk's, too."""


class Store(Protocol):
    """Named objects below a root. Names are relative paths with `/`.

    Every method raises StoreAwayError where the store itself cannot be asked, and another
    StoreError where what was asked for is not to be had.
    """

    readers: ClassVar[int]
    """How many may well read at once."""

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """Return bytes of an object; StoreError if it is not there or shorter."""

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> Sequence[bytes | memoryview]:
        """Return the bytes of each (offset, length), in the order asked for.

        What lies close together is read at once. `into`: memory for all of them, in which they then
        lie one after another; fresh memory costs more than the reading. StoreError if the object is
        not there, or ends within any of them.
        """

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Make an object durable: afterwards it is there whole, before it is not there at all."""

    def create(self, name: str, data: bytes) -> bool:
        """Like `write`, but only if there is none of that name; False if there was."""

    def list(self, prefix: str) -> list[str]:
        """Return the names right below a folder, sorted; none if it is not there."""

    def delete(self, name: str) -> None:
        """Remove an object; none of that name is no error."""

    def sweep(self, prefix: str, dead: Callable[[str], bool]) -> None:
        """Remove what is left below a folder of writes that were killed.

        Only of objects that `dead` says nobody writes any more, by their names from there.
        """


def open_store(uri: str, folder: str | None = None, *, there: bool = False) -> Store:
    """Open the store that a URI names.

    `folder`: what lies in it alone is used, as a job's prefix; `there`: others have written to it.
    In a directory it is made by the first write. Where it is missing later the store is away: of a
    volume that is not mounted an empty folder stays, or none.
    ConfigurationError: it is of no kind that there is. MissingError: its library is not installed.
    """
    parts = urlsplit(uri)
    if parts.scheme in OBJECT_SCHEMES:
        # Imported where it is used: a server whose store is a directory need not have its library.
        from daruma_trainer.checkpoint.objects import open_objects

        return open_objects(uri)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise ConfigurationError(
            f"store {uri!r}: write file:///absolute/path, s3://bucket/folder, gs://bucket/folder "
            "or az://container/folder"
        )
    return DirectoryStore(Path(unquote(parts.path)), folder, there=there)


def check_name(name: str) -> None:
    """StoreError unless it is the name of something within a store."""
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise StoreError(f"{name!r} is not a name within the store")


def check_ranges(name: str, ranges: Sequence[tuple[int, int]]) -> None:
    """StoreError unless all of them could be ranges of an object."""
    for offset, length in ranges:
        if offset < 0 or length < 0:
            raise StoreError(f"{name}: {length} bytes at {offset} are no range")


def check_whole(
    name: str, ranges: Sequence[tuple[int, int]], found: Sequence[bytes | memoryview]
) -> None:
    """StoreError unless what was found is as long as what was asked for."""
    for (offset, length), data in zip(ranges, found, strict=True):
        if len(data) != length:
            raise StoreError(
                f"{name} ends at {offset + len(data)}, {length} bytes were expected at {offset}"
            )


class DirectoryStore:
    """A directory. Objects are written beside their place, fsynced, then renamed into it."""

    # More wait for each other's turn at the interpreter longer than for a disk.
    readers: ClassVar[int] = 2

    def __init__(self, root: Path, folder: str | None = None, *, there: bool = False) -> None:
        self._root = root
        self._folder = None if folder is None else self._path(folder)
        self._there = there
        """Whether the folder was made: it goes with its volume, and with nothing else."""

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """See Store.read."""
        try:
            with self._path(name).open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise self._failed(f"read {name}", error) from error
        if 0 <= length != len(data):
            raise StoreError(f"{name} ends at {offset + len(data)}, {length} bytes were expected")
        return data

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> Sequence[bytes | memoryview]:
        """See Store.read_ranges."""
        check_ranges(name, ranges)
        if into is None:
            into = np.empty(sum(length for _, length in ranges), np.uint8).data
        found: list[memoryview] = []
        try:
            with self._path(name).open("rb", buffering=0) as file:
                for offset, length in ranges:
                    found.append(into[: _pread(file.fileno(), offset, into[:length])])
                    into = into[length:]
        except OSError as error:
            raise self._failed(f"read {name}", error) from error
        check_whole(name, ranges, found)
        return found

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """See Store.write."""
        path = self._path(name)
        temporary = self._write_beside(path, data)
        try:
            temporary.rename(path)
            self._sync_folder(path.parent)
        except OSError as error:
            raise self._failed(f"write {name}", error) from error

    def create(self, name: str, data: bytes) -> bool:
        """See Store.create."""
        path = self._path(name)
        temporary = self._write_beside(path, data)
        try:
            # A hard link, unlike a rename, fails where something is already.
            path.hardlink_to(temporary)
            self._sync_folder(path.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._failed(f"write {name}", error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        try:
            names = [p.name for p in self._path(prefix).iterdir()]
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and not self._is_away:
                return []
            raise self._failed(f"list {prefix}", error) from error
        return sorted(n for n in names if not n.endswith(_PARTIAL))

    def delete(self, name: str) -> None:
        """See Store.delete."""
        try:
            self._path(name).unlink()
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or self._is_away:
                raise self._failed(f"delete {name}", error) from error

    def sweep(self, prefix: str, dead: Callable[[str], bool]) -> None:
        """See Store.sweep: the files beside their places."""
        folder = self._path(prefix)
        try:
            for path in folder.rglob(f"*{_PARTIAL}"):
                # <name>.<writer>.partial
                name = path.with_suffix("").with_suffix("").relative_to(folder)
                if dead(str(name)):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(f"clean {prefix}", error) from error

    def _path(self, name: str) -> Path:
        check_name(name)
        return self._root / name

    def _write_beside(self, path: Path, data: bytes | bytearray | memoryview) -> Path:
        writer = f"{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f"{path.name}.{writer}{_PARTIAL}")
        try:
            self._make_folder(path.parent)
            with temporary.open("wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFullError(f"cannot write {path}: {error.strerror}") from error
            raise self._failed(f"write {path}", error) from error
        self._there = True
        return temporary

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it; but not again what goes with the volume alone.

        In its place, below where the volume belongs, saves would be lost when that is back.
        """
        if self._there and folder == self._folder:
            return
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @property
    def _is_away(self) -> bool:
        """Whether the folder that has been there cannot be found."""
        if self._folder is None or not self._there:
            return False
        try:
            self._folder.stat()
        except OSError:
            return True
        return False

    def _failed(self, what: str, error: OSError) -> StoreError:
        """Return what an error of the file system is to those who ask."""
        if self._is_away:
            return StoreAwayError(
                f"cannot {what}: the folder {self._folder} is not there any more: mount its "
                "volume again; where it was removed, make it again"
            )
        kind = StoreAwayError if error.errno in _AWAY else StoreError
        return kind(f"cannot {what}: {error.strerror}")


def _pread(handle: int, offset: int, into: memoryview) -> int:
    """Read at a place; less only where the file ends, as one call reads 2 GB at most."""
    size = 0
    while size < len(into) and (read := os.preadv(handle, [into[size:]], offset + size)):
        size += read
    return size
