"""Where saves lie. A directory for now; the Protocol is what an object store will have to do."""

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from daruma_trainer.errors import ConfigurationError, StoreError, StoreFullError


class Store(Protocol):
    """Named objects below a root. Names are relative paths with `/`."""

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """Return bytes of an object; StoreError if it is not there or shorter."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each (offset, length) of an object; StoreError as for `read`."""

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Make an object durable: afterwards it is there whole, before it is not there at all."""

    def create(self, name: str, data: bytes) -> bool:
        """Like `write`, but only if there is none of that name; False if there was."""

    def list(self, prefix: str) -> list[str]:
        """Return the names right below a folder, sorted; none if it is not there."""

    def delete(self, name: str) -> None:
        """Remove an object; none of that name is no error."""


def open_store(uri: str) -> Store:
    """Open the store that a URI names; ConfigurationError for a kind that is not supported."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise ConfigurationError(f"store {uri!r}: only file:///absolute/path is supported yet")
    return DirectoryStore(Path(unquote(parts.path)))


class DirectoryStore:
    """A directory. Objects are written beside their place, fsynced, then renamed into it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """See Store.read."""
        try:
            with self._path(name).open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        if 0 <= length != len(data):
            raise StoreError(f"{name} ends at {offset + len(data)}, {length} bytes were expected")
        return data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See Store.read_ranges."""
        found: list[bytes] = []
        try:
            with self._path(name).open("rb", buffering=0) as file:
                for offset, length in ranges:
                    data = os.pread(file.fileno(), length, offset)
                    while 0 < len(data) < length and (
                        more := os.pread(file.fileno(), length - len(data), offset + len(data))
                    ):
                        data += more
                    if len(data) != length:
                        raise StoreError(
                            f"{name} ends at {offset + len(data)}, {length} bytes were expected"
                        )
                    found.append(data)
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        return found

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """See Store.write."""
        path = self._path(name)
        temporary = self._write_beside(path, data)
        try:
            temporary.rename(path)
            self._sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"cannot write {name}: {error.strerror}") from error

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
            raise StoreError(f"cannot write {name}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        try:
            names = [p.name for p in self._path(prefix).iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot list {prefix}: {error.strerror}") from error
        return sorted(n for n in names if not n.endswith(".partial"))

    def delete(self, name: str) -> None:
        """See Store.delete."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot delete {name}: {error.strerror}") from error

    def _path(self, name: str) -> Path:
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"{name!r} is not a name within the store")
        return self._root / name

    def _write_beside(self, path: Path, data: bytes | bytearray | memoryview) -> Path:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            kind = StoreFullError if full else StoreError
            raise kind(f"cannot write {path}: {error.strerror}") from error
        return temporary

    def _sync_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
