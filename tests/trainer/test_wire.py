"""Tests of daruma_trainer.wire: what is sent is read back, and anything else is refused."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from daruma_operator.api.spec import MAX_REPLICAS
from daruma_trainer.contract import (
    SLOTS,
    ContractError,
    Copies,
    Member,
    Membership,
    Report,
    Role,
    Settings,
    slots_to_hex,
)
from daruma_trainer.layout import ShardLayout, TableSpec
from daruma_trainer.wire import (
    HEADER,
    MAX_FRAME,
    MAX_META,
    Header,
    Kind,
    MalformedError,
    Push,
    State,
    TablePush,
    bitmap,
    decode_json,
    decode_push,
    decode_state,
    encode_json,
    encode_push,
    encode_state,
    from_bitmap,
    mask_of,
    split_slots,
)
from soak import counted

EXAMPLES, COUNTED = counted("malformed messages", 2_000, 100_000)


def a_push() -> Push:
    dense = TablePush(0, 0.1, np.arange(12, dtype=np.float32).reshape(4, 3))
    rows = TablePush(1, 1.0, np.ones((2, 5), np.float32), np.array([3, 9]))
    return Push(1, 7, 7, 1, 5, mask_of([1, 2]), (dense, rows))


def test_a_push_reads_back() -> None:
    frames = [b"", *encode_push(a_push())]
    found = decode_push(frames)
    assert (found.worker, found.first, found.last, found.count, found.acked) == (1, 7, 7, 1, 5)
    assert np.flatnonzero(found.slots).tolist() == [1, 2]
    assert found.tables[0].values.tolist() == list(range(12))
    assert found.tables[1].rows is not None
    assert found.tables[1].rows.tolist() == [3, 9]


def a_state() -> State:
    slots = mask_of([0, 5, 1023])
    number = np.array([1, 2, 3])
    last = np.array([[4, 5], [6, 7]])
    window = np.full((2, 2), (1 << 64) - 1, np.uint64)
    vector = np.array([0, 1, 0])
    return State(slots, number, number, vector, last, window, (np.ones(6, np.float32),))


def test_a_state_reads_back() -> None:
    found = decode_state([b"", *encode_state(a_state())])
    assert found.lineage.tolist() == [1, 2, 3]
    assert found.last.tolist() == [[4, 5], [6, 7]]
    assert found.values[0].tolist() == [1.0] * 6


@given(arrays(np.bool_, SLOTS))
def test_bitmaps_read_back(mask: Any) -> None:
    assert (from_bitmap(bitmap(mask)) == mask).all()


def test_large_data_travels_in_bounded_frames() -> None:
    values = np.zeros((3, MAX_FRAME // 4), np.float32)
    frames = encode_push(Push(0, 1, 1, 1, 0, mask_of([0]), (TablePush(0, 0.1, values),)))
    assert [len(f) for f in frames[1:]] == [MAX_FRAME] * 3
    assert decode_push([b"", *frames]).tables[0].values.size == values.size


def test_slots_are_split_where_a_message_is_full() -> None:
    table = TableSpec(0, "t", (64 * 1024, 64), 256, "{}")
    layout = ShardLayout("uid", [table], np.arange(SLOTS))
    parts = split_slots(layout)
    assert np.concatenate(parts).tolist() == list(range(SLOTS))
    assert len(parts) >= 16 * 1024 * 1024 // MAX_FRAME
    for part in parts:
        assert ShardLayout("uid", [table], part).slot_bytes.sum() <= MAX_FRAME


HEAD = Header(Kind.PUSH, 1, 2, 3).encode()
SMALL = st.binary(max_size=600)


def mutated(frames: list[bytes], data: st.DataObject) -> list[bytes]:
    """Damage a good message somewhere."""
    damaged = [bytearray(f) for f in frames]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.integers(0, len(damaged) - 1))
        if not damaged[frame]:
            continue
        at = data.draw(st.integers(0, len(damaged[frame]) - 1))
        what = data.draw(st.sampled_from(["flip", "cut", "grow", "drop"]))
        if what == "flip":
            damaged[frame][at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del damaged[frame][at:]
        elif what == "grow":
            damaged[frame] += data.draw(SMALL)
        elif len(damaged) > 2:
            del damaged[frame]
    return [bytes(f) for f in damaged]


def read(frames: list[bytes]) -> None:
    Header.decode(frames)
    for decode in (decode_push, decode_state):
        try:
            decode(frames)
        except ContractError:
            continue


@COUNTED
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_malformed_messages_are_refused_by_name_and_allocate_little(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["noise", "push", "state"]))
    if kind == "noise":
        frames = data.draw(st.lists(SMALL, max_size=6))
    else:
        good = encode_push(a_push()) if kind == "push" else encode_state(a_state())
        frames = mutated([HEAD, *(bytes(f) for f in good)], data)
    size = sum(len(f) for f in frames)
    tracemalloc.start()
    try:
        read(frames)
    except MalformedError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 * 1024 + 8 * size + SLOTS * 16


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"x"],
        [HEAD],
        [HEAD[:-1], b""],
        [b"XXXX" + HEAD[4:], b""],
        [HEAD[:4] + b"\xff" + HEAD[5:], b""],
        [HEAD, bytes(MAX_META + 1)],
        [HEAD, *[b""] * 40],
    ],
)
def test_headers_of_another_form_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedError):
        Header.decode(frames)


def test_huge_counts_are_refused_before_anything_is_allocated() -> None:
    meta = bytearray(encode_push(a_push())[0])
    meta[8:12] = (2**32 - 1).to_bytes(4, "little")  # tables
    with pytest.raises(MalformedError, match="does not fit"):
        decode_push([HEAD, bytes(meta), b""])


@pytest.mark.parametrize("frame", [b"", b"[]", b"nul", b"\xff", b"[" * 5000])
def test_control_messages_are_objects(frame: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_json(frame)


def test_the_header_is_of_fixed_size() -> None:
    assert len(HEAD) == HEADER.size
    assert Header.decode([HEAD, b""]) == Header(Kind.PUSH, 1, 2, 3)


def test_the_largest_job_fits_its_messages() -> None:
    # Names as long as they may be: of a job, and of a machine in a cloud.
    def members(role: Role, many: int, first: int = 0) -> tuple[Member, ...]:
        pod, node = f"{'j' * 52}-{role.value.lower()}-255-12345", "n" * 253
        address = "100.100.200.200:7070"
        return tuple(Member(role, i, first + 12345, pod, address, node) for i in range(many))

    servers = 256
    membership = Membership(
        "u" * 36, "n" * 63, "j" * 52, 12345, servers, MAX_REPLICAS,
        (*members(Role.SERVER, servers), *members(Role.WORKER, MAX_REPLICAS)), Settings(),
        replicas=tuple(m for n in range(1, 8) for m in members(Role.SERVER, servers, n)),
    )  # fmt: skip
    # Each slot of another version, as after restores from partial saves.
    copies = tuple(Copies(1 << 40, (1 << 40) + s, slots_to_hex([s])) for s in range(SLOTS))
    report = Report("worker-999-12345", 12345, "Training", copies=copies)
    for message in (membership, report):
        frames = [Header(Kind.REPORT, 1, 1, 1).encode(), encode_json(message.to_json())]
        assert Header.decode(frames).request == 1
