"""The data plane's messages: a header frame, a small meta frame, raw array bytes.

`encode_*` return frames for `send_multipart(copy=False)`; `decode_*` take what arrived and check
every size before they touch a byte of it. Whatever is not as it should be raises MalformedError.
Nothing is pickled; JSON is used for control messages alone, never for arrays.

A header names the epoch that its sender has seen, and in requests the incarnation it is meant for
(in replies: the one that answers), and the rollback generation.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.contract import SLOTS, ContractError
from daruma_trainer.layout import Floats, Ints, ShardLayout

MAGIC = b"DRM1"
HEADER = struct.Struct("<4sBBHIQQQ")
BITMAP = SLOTS // 8
MAX_FRAME = 4 << 20
MAX_META = 2 << 20
"""A membership of as many members as a job may have fits, and a report with a version a slot."""
MAX_FRAMES = 18
"""Header, meta, and a message's data of at most 16 frames."""
MAX_SLOT_BYTES = 16 * MAX_FRAME
MAX_WORKERS = 4096

Frame = bytes | memoryview
Slots = NDArray[np.bool_]


class MalformedError(ContractError):
    """A message that no version of ours sends: it changed nothing."""


class Kind(IntEnum):
    """What a message is. Requests have a reply of kind OK, STATE, ACK or REFUSED."""

    HELLO = 1
    CREATE = 2
    INIT = 3
    PUSH = 4
    PULL = 5
    RESYNC = 6
    REPORT = 7
    BEFORE = 8
    """What were these slots when this worker's batch so-and-so was the last in them? As a pull; a
    live worker answers, through the server."""
    EPOCH = 9
    """What is your newest membership? The answer is a MEMBERSHIP."""
    CUT = 10
    REBUILD = 11
    """A worker's whole part of a sum, for slots that were cleared; a push without a number."""
    HAVE = 12
    """A worker took in what a server's state of some slots had. Nobody answers."""
    FOLLOW = 13
    """A server to its next replica: a stream begins; the answer says what the replica has."""
    UPDATE = 14
    """An update that the next replica is to make as well."""
    WHOLE = 15
    """Whole slots for the next replica, with the optimizer's state."""
    OK = 16
    ACK = 17
    STATE = 18
    REFUSED = 19
    MEMBERSHIP = 20
    FETCH = 21
    COPY = 22
    READY = 23
    """A server to its workers: more of my slots are Ready than before."""
    RELEASED = 24
    STOP = 25
    """A worker's program asked that all end after their step."""
    FINISHED = 26
    """All workers reached the end of their batches: no rollback brings anybody back any more."""
    COVERED = 28
    """A server to a worker: up to which batch its pushes are on as many nodes as asked for."""


_KINDS = frozenset(Kind)


class Refusal(IntEnum):
    """Why a request was refused; in the header's `flags`."""

    MALFORMED = 1
    STALE_INCARNATION = 2
    NOT_OWNER = 3
    RESTORING = 4
    WRONG_GENERATION = 5
    TABLE_MISMATCH = 6
    UNSURE = 7
    OVERLAP = 8
    TOO_LARGE = 9
    NOT_KEPT = 10
    """Nobody has values of so long ago."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first frame of every message."""

    kind: Kind
    request: int
    epoch: int
    incarnation: int
    generation: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        """Return the frame."""
        return HEADER.pack(
            MAGIC, self.kind, self.flags, 0, self.generation, self.request, self.epoch,
            self.incarnation,
        )  # fmt: skip

    @classmethod
    def decode(cls, frames: Sequence[Frame]) -> "Header":
        """Check the form of a message and read its header."""
        if not 2 <= len(frames) <= MAX_FRAMES or len(frames[0]) != HEADER.size:
            raise MalformedError(f"a message of {len(frames)} frames, the first not a header")
        if len(frames[1]) > MAX_META:
            raise MalformedError(f"a meta frame of {len(frames[1])} bytes; at most {MAX_META}")
        magic, kind, flags, _, generation, request, epoch, incarnation = HEADER.unpack(frames[0])
        if magic != MAGIC:
            raise MalformedError("not a message of this protocol's version")
        if kind not in _KINDS:
            raise MalformedError(f"no message kind {kind}")
        return cls(Kind(kind), request, epoch, incarnation, generation, flags)


def encode_json(value: Any) -> bytes:
    """Write a control message's meta frame."""
    return json.dumps(value, separators=(",", ":")).encode()


def decode_json(frame: Frame) -> dict[str, Any]:
    """Read a control message's meta frame: always an object."""
    try:
        value = json.loads(bytes(frame))
    except (ValueError, RecursionError) as error:
        raise MalformedError("the meta frame is not JSON") from error
    if not isinstance(value, dict):
        raise MalformedError("the meta frame is not an object")
    return value


def bitmap(slots: Slots) -> bytes:
    """Pack a (1024,) mask into 128 bytes."""
    return np.packbits(slots, bitorder="little").tobytes()


def from_bitmap(frame: Frame) -> Slots:
    """Unpack 128 bytes into a (1024,) mask."""
    if len(frame) != BITMAP:
        raise MalformedError(f"a slot bitmap of {len(frame)} bytes, not {BITMAP}")
    return np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little").astype(np.bool_)


def mask_of(slots: Ints | Sequence[int]) -> Slots:
    """Return the (1024,) mask of a list of slots."""
    mask = np.zeros(SLOTS, np.bool_)
    mask[slots] = True
    return mask


# Pushes -----------------------------------------------------------------------------------------

PUSH = struct.Struct("<IIIIqqq")
PUSH_TABLE = struct.Struct("<IIdq")


@dataclass(frozen=True, slots=True)
class TablePush:
    """One table's part of a push.

    `rows` None: dense, values of all rows of the push's slots in wire order. Otherwise global row
    numbers (ascending, each once, all in the push's slots): no others of the table change.
    """

    table: int
    lr: float
    values: Floats
    """Shape (n, cols) on the way out; flat on arrival, until the table is known."""
    rows: Ints | None = None


@dataclass(frozen=True, slots=True)
class Push:
    """A worker's update: batches `first` to `last` (one, unless it is a replay of `count`).

    `acked` is the worker's last batch acknowledged by all slots. Slots of `slots` that no table
    touches mark it applied all the same.
    """

    worker: int
    first: int
    last: int
    count: int
    acked: int
    slots: Slots
    tables: tuple[TablePush, ...]


def encode_push(push: Push) -> list[Frame]:
    """Return meta and data frames; the data of all tables is one run of bytes."""
    meta = [
        PUSH.pack(push.worker, push.count, len(push.tables), 0, push.first, push.last, push.acked),
        bitmap(push.slots),
    ]
    data: list[NDArray[Any]] = []
    for part in push.tables:
        rows = -1 if part.rows is None else len(part.rows)
        meta.append(PUSH_TABLE.pack(part.table, part.values.size, part.lr, rows))
        if part.rows is not None:
            data.append(part.rows)
        data.append(part.values)
    return [b"".join(meta), *_data_frames(data)]


def decode_push(frames: Sequence[Frame]) -> Push:
    """Read a push; its arrays are views of the frames where these are few enough."""
    meta = memoryview(frames[1])
    if len(meta) < PUSH.size + BITMAP:
        raise MalformedError("a push without its meta")
    worker, count, tables, _, first, last, acked = PUSH.unpack_from(meta)
    if len(meta) != PUSH.size + BITMAP + tables * PUSH_TABLE.size:
        raise MalformedError(f"a push's meta of {len(meta)} bytes does not fit {tables} tables")
    if not (worker < MAX_WORKERS and 0 < first <= last < 1 << 62 and 0 < count <= last - first + 1):
        raise MalformedError(f"a push of batches {first} to {last}, count {count}")
    slots = from_bitmap(meta[PUSH.size : PUSH.size + BITMAP])
    data = _Data(frames[2:])
    parts = []
    for i in range(tables):
        table, size, lr, rows = PUSH_TABLE.unpack_from(
            meta, PUSH.size + BITMAP + i * PUSH_TABLE.size
        )
        if not np.isfinite(lr) or lr < 0:
            raise MalformedError(f"a learning rate of {lr}")
        index = None if rows < 0 else data.take(np.int64, rows)
        parts.append(TablePush(table, lr, data.take(np.float32, size), index))
    data.end()
    return Push(worker, first, last, count, acked, slots, tuple(parts))


PULL = struct.Struct("<qII")
"""A pull's meta: min_step, tables (how many the worker knows), flags; then the slots' bitmap."""
ALL_WORKERS = 1
"""A pull's flag: `min_step` is a batch that every worker that goes on must have reached."""
ENTER = 2
"""A pull's flag: the worker has no position yet; from now on steps wait for it again."""
OWN = 4
"""A pull's flag: `min_step` is the worker's own batch that all of the slots have to have."""
WAS_VACANT = 1
"""In the header's `flags` of the answer to such a pull: steps were made without it."""
UNHEARD = 2
"""The same: the server was restored, and no life of this worker has told it since what it can give
again."""
PARTIAL = 4
"""In the answer to any pull: there are values of more tables than the worker knows."""


ORIGIN = struct.Struct("<Iq")
"""After a FETCH's bitmap: only slots in which this batch of this worker was the last."""


# State: the answer to a pull, and a worker's copy for a restoring server ------------------------

STATE = struct.Struct("<IIIIq")
"""A state's meta: applied vectors, workers, arrays of values, of counters; the update's number."""


@dataclass(frozen=True, slots=True)
class State:
    """Whole slots with all that belongs to them, but the optimizer's state.

    Arrays with one entry a slot stand in ascending order of the slots in `slots`.
    """

    slots: Slots
    lineage: Ints
    position: Ints
    vector: Ints
    """Which of the applied vectors each slot has."""
    last: Ints
    """Shape (vectors, workers): the last applied batch of each worker."""
    window: NDArray[np.uint64]
    """Shape (vectors, workers): bit i set: batch last − 1 − i is applied too."""
    values: tuple[Floats, ...]
    """For each table, the rows of these slots in wire order; flat on arrival. To a replica: of each
    table its parameters, then its optimizer's arrays."""
    steps: tuple[Ints, ...] = ()
    """To a replica: of each table the step counters of these slots' blocks."""
    update: int = 0
    """How many updates the server has made to its shard."""


def encode_state(state: State) -> list[Frame]:
    """Return meta and data frames."""
    vectors, workers = state.last.shape
    arrays: list[NDArray[Any]] = [*state.values, *state.steps]
    sizes = np.array([a.size for a in arrays], np.int64)
    meta = b"".join(
        [
            STATE.pack(vectors, workers, len(state.values), len(state.steps), state.update),
            bitmap(state.slots),
            state.lineage.astype(np.int64).tobytes(),
            state.position.astype(np.int64).tobytes(),
            state.vector.astype(np.int64).tobytes(),
            sizes.tobytes(),
        ]
    )
    return [meta, *_data_frames([state.last, state.window, *state.steps, *state.values])]


def decode_state(frames: Sequence[Frame]) -> State:
    """Read slots; ContractError if sizes do not agree."""
    meta = memoryview(frames[1])
    if len(meta) < STATE.size + BITMAP:
        raise MalformedError("a state without its meta")
    vectors, workers, tables, counters, update = STATE.unpack_from(meta)
    slots = from_bitmap(meta[STATE.size : STATE.size + BITMAP])
    n = int(slots.sum())
    arrays = tables + counters
    if len(meta) != STATE.size + BITMAP + 8 * (3 * n + arrays) or workers > MAX_WORKERS:
        raise MalformedError("a state's meta does not fit its slots")
    numbers = np.frombuffer(meta, np.int64, offset=STATE.size + BITMAP)
    lineage, position, vector = numbers[:n], numbers[n : 2 * n], numbers[2 * n : 3 * n]
    if n and not (vector.min() >= 0 and vector.max() < vectors <= SLOTS):
        raise MalformedError("a state names an applied vector that it does not have")
    data = _Data(frames[2:])
    last = data.take(np.int64, vectors * workers).reshape(vectors, workers)
    window = data.take(np.uint64, vectors * workers).reshape(vectors, workers)
    sizes = numbers[3 * n :].tolist()
    steps = tuple(data.take(np.int64, size) for size in sizes[tables:])
    values = tuple(data.take(np.float32, size) for size in sizes[:tables])
    data.end()
    return State(slots, lineage, position, vector, last, window, values, steps, update)


def split_slots(layout: ShardLayout) -> list[Ints]:
    """Cut a layout's slots into lists whose parameters fit one data frame each, where one can."""
    lists: list[Ints] = []
    begin, size = 0, 0
    room = MAX_FRAME - (64 << 10)
    for k, b in enumerate(layout.slot_bytes):
        if size and size + b > room:
            lists.append(layout.slots[begin:k])
            begin, size = k, 0
        size += int(b)
    lists.append(layout.slots[begin:])
    return lists


def _data_frames(arrays: Sequence[NDArray[Any]]) -> list[Frame]:
    views = [np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for a in arrays if a.size]
    total = sum(len(v) for v in views)
    if total > MAX_SLOT_BYTES:
        raise MalformedError(f"a message of {total} bytes of data; at most {MAX_SLOT_BYTES}")
    # One frame costs one copy here; many small frames cost more in libzmq.
    joined = memoryview(b"".join(views)) if len(views) != 1 else memoryview(views[0])
    return [joined[a : a + MAX_FRAME] for a in range(0, total, MAX_FRAME)]


class _Data:
    """Hands out arrays over a message's data frames, and knows when they end."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        if any(len(f) > MAX_FRAME for f in frames):
            raise MalformedError(f"a data frame larger than {MAX_FRAME} bytes")
        self._bytes = memoryview(frames[0] if len(frames) == 1 else b"".join(frames))
        self._at = 0

    def take(self, kind: type[Any], count: int) -> NDArray[Any]:
        size = count * np.dtype(kind).itemsize
        if count < 0 or self._at + size > len(self._bytes):
            raise MalformedError(f"the data ends {self._at + size - len(self._bytes)} bytes early")
        array = np.frombuffer(self._bytes, kind, count, self._at) if count else np.empty(0, kind)
        self._at += size
        return array

    def end(self) -> None:
        if self._at != len(self._bytes):
            raise MalformedError(f"{len(self._bytes) - self._at} bytes of data too many")
