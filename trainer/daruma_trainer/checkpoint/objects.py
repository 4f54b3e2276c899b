"""Stores in a cloud: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

Their library, obstore, is loaded when one is opened and not before: a server whose store is a
directory need not have it. Credentials and endpoints come from the environment, as the clouds'
own tools take them.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast
from urllib.parse import SplitResult, urlsplit

import numpy as np

from daruma_trainer.checkpoint.store import check_name, check_ranges, check_whole
from daruma_trainer.errors import (
    ConfigurationError,
    MissingError,
    StoreAwayError,
    StoreError,
    StoreFullError,
)

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta
    from obstore.store import AzureStore, GCSStore, RetryConfig, S3Store

    Inner = S3Store | GCSStore | AzureStore

T = TypeVar("T")

ENV_SECONDS = "DARUMA_STORE_SECONDS"
"""Optional: `Patience.seconds`, where 30 is not what suits a store."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_FOLDER = re.compile(r"(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*/?")
_PART = 8 << 20
"""Bytes of a request of an upload: what is larger is sent in parts of this size."""
_PARTS_AT_ONCE = 4
_REPETITIONS = 2
"""Of a listing whose answer broke off."""
_GAP = 1 << 20
"""Ranges nearer than this are read by one request: a request takes longer than such a gap."""

_FULL = {"QuotaExceeded", "XMinioStorageFull", "AccountStorageQuotaExceeded", "InsufficientStorage"}
_GONE = {"NoSuchBucket", "ContainerNotFound"}
_IDENTITY = ("169.254.169.254", "token request", "metadata.google", "Credential provider")
"""What stands in errors of asking a machine for its identity, which is done without credentials."""
_CREDENTIALS = (
    "check the Secret that spec.checkpoint.secretRef names (in `daruma run`: the environment), or "
    "the identity of the servers' service account; it must be allowed to read, write, list, delete"
)
_ENDPOINT = "check the network and the endpoint that the environment names"
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an operation may take, in seconds."""

    seconds: float = 30.0
    """All of it, with every repetition, where nothing large is moved."""
    silence: float = 8.0
    """A connection that says nothing for so long is given up, and the request repeated."""
    retrying: float = 20.0
    """After this long nothing is repeated any more."""
    bytes_per_second: float = 4 * 2**20
    """What is large may take longer by the time it needs at this rate, but no more."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Patience":
        """Take `seconds` from the environment, and the other limits in proportion."""
        usual = cls()
        text = environment.get(ENV_SECONDS)
        if text is None:
            return usual
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds <= 3600:
            raise ConfigurationError(
                f"{ENV_SECONDS}={text!r}: write how many seconds an operation on a store may "
                "take, from 0.1 to 3600"
            )
        scale = seconds / usual.seconds
        return cls(seconds, usual.silence * scale, usual.retrying * scale)

    def for_bytes(self, size: int) -> float:
        """Return the deadline of an operation that moves so much."""
        return self.seconds + size / self.bytes_per_second


def open_objects(uri: str, patience: Patience | None = None) -> "ObjectStore":
    """Open the bucket or container that a URI names; nothing is asked of it yet.

    `patience`: else as the environment has it.
    ConfigurationError: it names none, or the environment's settings for it are wrong.
    MissingError: obstore is not installed.
    """
    parts = _split(uri)
    patience = patience or Patience.from_environment(os.environ)
    try:
        from obstore import store as clouds
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise MissingError(
            f"a store of {parts.scheme}:// needs obstore: pip install 'daruma-operator[objects]'"
        ) from error
    kind = {"s3": clouds.S3Store, "gs": clouds.GCSStore, "az": clouds.AzureStore}[parts.scheme]
    # As settings of the store, not as client options: those would replace the environment's, such
    # as AWS_ALLOW_HTTP or a proxy.
    limits = {
        "connect_timeout": _duration(min(5.0, patience.silence)),
        "read_timeout": _duration(patience.silence),
        # A large body may take longer than any one number: `_ask` sets the deadline by its size.
        "timeout": _duration(3600.0),
    }
    retry: RetryConfig = {
        "max_retries": 100,  # by time, not by count
        "retry_timeout": timedelta(seconds=patience.retrying),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=3),
            "base": 2,
        },
    }
    try:
        inner = kind(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config=cast("Any", limits),
            retry_config=retry,
        )
    except (BaseError, ValueError) as error:
        raise ConfigurationError(
            f"store {uri}: the environment's settings for it are wrong: {_reason(str(error))}"
        ) from None
    return ObjectStore(uri, inner, patience)


class ObjectStore:
    """A bucket, or a folder of it. See `store.Store` for what its methods do.

    A write whose answer was lost is repeated; one that raised may be there later all the same,
    whole. `create` may say False of what it wrote itself, where the answer to that was lost.
    """

    readers: ClassVar[int] = 4

    def __init__(self, uri: str, inner: "Inner", patience: Patience) -> None:
        self._uri = uri.rstrip("/")
        self._scheme = uri.partition(":")[0]
        self._inner = inner
        self._patience = patience

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """See Store.read."""
        if offset or length >= 0:
            if length < 0:
                raise StoreError(f"{name}: say how many bytes are wanted from {offset} on")
            return bytes(self.read_ranges(name, [(offset, length)])[0])
        check_name(name)
        patience, inner = self._patience, self._inner

        async def get() -> bytes:
            async with asyncio.timeout(patience.seconds):
                answer = await inner.get_async(name)
            # Only now is it known how much there is.
            async with asyncio.timeout(patience.for_bytes(answer.meta["size"])):
                return bytes(await answer.bytes_async())

        return self._ask("read", name, get, None)

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
    ) -> list[memoryview]:
        """See Store.read_ranges."""
        check_name(name)
        check_ranges(name, ranges)
        # The service refuses a range of no bytes.
        wanted = sorted({(offset, length) for offset, length in ranges if length})
        first, last = (wanted[0][0], max(o + n for o, n in wanted)) if wanted else (0, 0)

        async def get() -> dict[tuple[int, int], memoryview]:
            if not wanted:
                await self._inner.head_async(name)
                return {}
            found = await self._inner.get_ranges_async(
                name, starts=[o for o, _ in wanted], lengths=[n for _, n in wanted], coalesce=_GAP
            )
            return {r: memoryview(data) for r, data in zip(wanted, found, strict=True)}

        parts = self._ask("read", name, get, self._patience.for_bytes(last - first))
        # The library's memory is its own: gone as soon as nothing looks at it.
        found = [parts.get(r, memoryview(b"")) for r in ranges]
        check_whole(name, ranges, found)
        if into is None:
            into = np.empty(sum(length for _, length in ranges), np.uint8).data
        answer: list[memoryview] = []
        for data in found:
            into[: len(data)] = data
            answer.append(into[: len(data)])
            into = into[len(data) :]
        return answer

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """See Store.write: the service makes an object visible once it has all of it, durably."""
        check_name(name)

        async def put() -> None:
            await self._inner.put_async(
                name, data, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE
            )

        self._ask("write", name, put, self._patience.for_bytes(len(memoryview(data).cast("B"))))

    def create(self, name: str, data: bytes) -> bool:
        """See Store.create: one request, on the condition that there is none of that name."""
        check_name(name)
        from obstore.exceptions import AlreadyExistsError

        async def put() -> bool:
            try:
                await self._inner.put_async(name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

        return self._ask("write", name, put, self._patience.for_bytes(len(data)))

    def list(self, prefix: str) -> list[str]:
        """See Store.list: page after page, within one deadline."""
        check_name(prefix)

        from obstore.exceptions import GenericError

        async def pages() -> "ListResult[Sequence[ObjectMeta]]":
            for _ in range(_REPETITIONS):
                try:
                    return await self._inner.list_with_delimiter_async(prefix)
                except GenericError as error:
                    # The library repeats requests, but no listing whose answer broke off.
                    if "body error" not in str(error):
                        raise
            return await self._inner.list_with_delimiter_async(prefix)

        async def ask() -> list[str]:
            found = await pages()
            paths = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
            return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

        return self._ask("list", prefix, ask, self._patience.seconds)

    def delete(self, name: str) -> None:
        """See Store.delete."""
        check_name(name)

        async def remove() -> None:
            try:
                await self._inner.delete_async(name)
            except FileNotFoundError as error:
                # Some services say so of an object, all of them of a bucket.
                if _no_bucket(str(error)):
                    raise

        self._ask("delete", name, remove, self._patience.seconds)

    def sweep(self, prefix: str, dead: Callable[[str], bool]) -> None:
        """See Store.sweep. Uploads that were killed are the bucket's rule's to end."""

    def _ask(
        self, verb: str, name: str, request: Callable[[], Awaitable[T]], seconds: float | None
    ) -> T:
        """Run a request to its end, at the latest its deadline's; its errors become ours.

        The library's own limits are for each of its requests: an operation has several. Its
        texts are not handed on, nor chained: they hold URLs, which may hold a signature.
        """
        from obstore.exceptions import BaseError

        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await request()

        try:
            return asyncio.run(bounded())
        except TimeoutError:
            limit = f" within {seconds:.0f} s" if seconds is not None else " in time"
            raise StoreAwayError(
                f"cannot {verb} {name} in {self._uri}: it was not done{limit}: {_ENDPOINT}"
            ) from None
        except (BaseError, OSError, ValueError, OverflowError) as error:
            raise self._translated(verb, name, error) from None

    def _translated(self, verb: str, name: str, error: Exception) -> StoreError:
        text = str(error)
        what = f"cannot {verb} {name} in {self._uri}"
        status, code = _status(text), _code(text)
        if status == 507 or code in _FULL:
            return StoreFullError(f"{what}: {_reason(text)}: no space left, or a quota is used up")
        if _no_bucket(text):
            return StoreAwayError(f"{what}: there is no such bucket: make it, or correct the URI")
        if isinstance(error, FileNotFoundError) and verb == "read":
            return StoreError(f"{what}: there is no such object")
        if status == 416:
            return StoreError(f"{what}: it ends before what was asked for")
        # Asked first: these are errors of asking for credentials, whatever their status is.
        if any(word in text for word in _IDENTITY):
            return StoreAwayError(f"{what}: no credentials were found: {_CREDENTIALS}")
        if status in (401, 403):
            return StoreAwayError(f"{what}: {_reason(text)}: {_CREDENTIALS}")
        if "builder error" in text:
            return StoreError(f"{what}: an http:// endpoint needs {_ALLOW_HTTP[self._scheme]}=true")
        return StoreAwayError(f"{what}: {_reason(text)}: {_ENDPOINT}")


def _split(uri: str) -> SplitResult:
    """ConfigurationError unless a URI names a bucket, and nothing that does not belong there."""
    parts = urlsplit(uri)
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not repeated in the message: it may be a secret.
        raise ConfigurationError(
            f"a store of {parts.scheme}:// is a bucket and a folder, nothing else: credentials "
            "come from the environment (in a cluster: spec.checkpoint.secretRef)"
        )
    if not _BUCKET.fullmatch(parts.netloc) or not _FOLDER.fullmatch(parts.path):
        raise ConfigurationError(
            f"store {uri!r}: write {parts.scheme}://bucket or {parts.scheme}://bucket/folder, of "
            "letters, digits, dots, dashes and underscores"
        )
    return parts


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found[1]) if found else None


def _code(text: str) -> str | None:
    """Return the service's own word for what is wrong."""
    found = re.search(r"<Code>(\w{1,60})</Code>", text)
    return found[1] if found else None


def _no_bucket(text: str) -> bool:
    return _code(text) in _GONE or "bucket does not exist" in text


def _reason(text: str) -> str:
    """Say what a text of the library says, without what may be secret in it.

    Of an answer its status and code are kept, as its body may repeat what was sent; of another
    sentence what is no URL and no quotation.
    """
    status = re.search(r"status code: (\d{3}[A-Za-z ]*)", text)
    if status:
        code = _code(text)
        return status[1].strip() + (f" ({code})" if code else "")
    first = text.partition("\n")[0].rpartition(" error: ")[2]
    first = re.sub(r"\w+://\S+", "…", first)
    return re.sub(r"([\"'`]).*\1", "…", first).strip()[:200] or "an unknown error"
