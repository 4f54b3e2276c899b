"""Tests of daruma_trainer.contract: what the operator and the trainer must agree on."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daruma_trainer.contract import (
    SLOTS,
    ContractError,
    Copies,
    Member,
    Membership,
    Outage,
    Report,
    Restore,
    RestoreReport,
    Role,
    SavedState,
    Settings,
    Source,
    SourceKind,
    Suspect,
    View,
    agent_address,
    place,
    slots_from_hex,
    slots_to_hex,
    token_for,
)


@given(st.text(min_size=1, max_size=40), st.integers(1, 64))
def test_no_server_gets_more_than_its_bounded_share(uid: str, servers: int) -> None:
    owners = place(uid, servers)
    assert len(owners) == SLOTS
    load = Counter(owners)
    assert set(load) <= set(range(servers))
    assert max(load.values()) <= 1.05 * SLOTS / servers + 1


def test_placement_differs_by_job_and_moves_little_when_a_server_is_added() -> None:
    assert place("a", 4) != place("b", 4)
    moved = sum(x != y for x, y in zip(place("a", 4), place("a", 5), strict=True))
    # A fifth of the slots must move; the bound on load moves some more. A modulo moves four fifths.
    assert SLOTS / 5 * 0.8 < moved < SLOTS * 0.45


def test_placement_refuses_no_servers() -> None:
    with pytest.raises(ContractError, match="at least one server"):
        place("a", 0)


@given(st.sets(st.integers(0, SLOTS - 1)))
def test_slot_bitmaps_read_back(slots: set[int]) -> None:
    assert slots_from_hex(slots_to_hex(sorted(slots))) == sorted(slots)


@pytest.mark.parametrize("text", ["", "00", "g" * 256, "0" * 257])
def test_slot_bitmaps_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ContractError, match="slot bitmap"):
        slots_from_hex(text)


def a_membership() -> Membership:
    members = (
        Member(Role.SERVER, 0, 1, "j-server-0-1", "10.0.0.1:7070"),
        Member(Role.WORKER, 1, 2, "j-worker-1-2"),
    )
    return Membership("uid", "ns", "j", 3, 1, 2, members, Settings(store="file:///s", every=8))


def a_view() -> View:
    saved = SavedState("ns/j/uid/0/1/manifest-2.json", 8, 100, 0.5, 0.25)
    restore = RestoreReport(1, {"peer": 3}, 12, 0.1, 0, {"reset": 3}, ("t/4",), done=True)
    own = Report("server-0-1", 3, "Ready", running=saved, cut=saved, restore=restore)
    other = Report(
        "worker-1-2",
        3,
        "Training",
        suspects=(Suspect("server-0-1", 0.1, "Disconnected"),),
        copies=(Copies(1, 2, slots_to_hex([1, 2])),),
        metrics={"accuracy": 0.9},
        gap=0.5,
        outage=Outage(20.0, 0.1, 0.7, 3, over=True),
    )
    return View(7, 3, own, {"worker-1-2": (0.2, other)})


def test_messages_read_back_from_json() -> None:
    membership = a_membership()
    assert Membership.from_json(json.loads(json.dumps(membership.to_json()))) == membership
    view = a_view()
    assert View.from_json(json.loads(json.dumps(view.to_json()))) == view
    source = Source(SourceKind.PEER, slots_to_hex([3]), member="worker-0-1")
    restore = Restore(1, 4, "server-1-3", (source,))
    assert Restore.from_json(json.loads(json.dumps(restore.to_json()))) == restore


@pytest.mark.parametrize(
    "raw", [None, 3, [], {}, {"epoch": 1}, {"members": 4}, {"own": [], "others": 3}]
)
@pytest.mark.parametrize("kind", [Membership, Restore, Report, View])
def test_anything_else_is_refused_by_name(kind: Any, raw: Any) -> None:
    with pytest.raises(ContractError):
        kind.from_json(raw)


def test_a_restore_with_a_damaged_bitmap_is_refused() -> None:
    raw = Restore(1, 4, "server-1-3", (Source(SourceKind.PEER, "00"),)).to_json()
    with pytest.raises(ContractError, match="bitmap"):
        Restore.from_json(raw)


def test_the_agent_is_beside_the_data_port() -> None:
    assert agent_address("10.0.0.1:7070") == "10.0.0.1:7071"
    assert a_membership().of(Role.SERVER)[0].agent == "10.0.0.1:7071"
    assert a_membership().of(Role.WORKER)[0].agent is None


def test_tokens_differ_by_job_and_by_key() -> None:
    assert len({token_for(b"k", "a"), token_for(b"k", "b"), token_for(b"l", "a")}) == 3


def test_the_contract_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; import daruma_trainer.contract; "
        "sys.exit(bool({'numpy', 'zmq', 'torch', 'xxhash'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
