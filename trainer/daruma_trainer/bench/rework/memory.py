"""A store in memory that counts what is written to it."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from daruma_trainer.errors import StoreError


class MemoryStore:
    """See checkpoint.store.Store. What is written is there until this process ends."""

    readers: ClassVar[int] = 1

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self.data = 0
        """Bytes written of blocks with their headers."""
        self.manifests = 0
        """Bytes written of what names them."""

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """See Store.read."""
        data = self._objects.get(name)
        if data is None:
            raise StoreError(f"there is no {name}")
        found = data[offset:] if length < 0 else data[offset : offset + length]
        if 0 <= length != len(found):
            raise StoreError(f"{name} ends at {len(data)}, {offset + length} was expected")
        return found

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> list[bytes]:
        """See Store.read_ranges."""
        found = [self.read(name, offset, length) for offset, length in ranges]
        if into is not None:
            into[: sum(len(data) for data in found)] = b"".join(found)
        return found

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """See Store.write."""
        self._objects[name] = bytes(data)
        if name.endswith(".json"):
            self.manifests += len(data)
        else:
            self.data += len(data)

    def create(self, name: str, data: bytes) -> bool:
        """See Store.create."""
        if name in self._objects:
            return False
        self.write(name, data)
        return True

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        below = f"{prefix}/"
        names = (n.removeprefix(below) for n in self._objects if n.startswith(below))
        return sorted({n.partition("/")[0] for n in names})

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self._objects.pop(name, None)

    def sweep(self, prefix: str, dead: Callable[[str], bool]) -> None:
        """See Store.sweep: nothing is ever half written."""
