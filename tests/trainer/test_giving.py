"""How a worker gives its copy of slots to a restoring server: beside its training."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS, Member, Membership, Role, Settings
from daruma_trainer.identity import Identity
from daruma_trainer.layout import TableSpec
from daruma_trainer.links import Link
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.wire import Frame, Header, Kind, State, bitmap, decode_state, mask_of
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.copies import HostCopy
from local_cluster import free_ports

DEADLINE = 30.0


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def test_a_copy_is_given_message_by_message_and_without_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Client(Identity("n", "j", Role.WORKER, 0, 1, "token", ("127.0.0.1", free_ports())))
    sent: list[tuple[Header, State]] = []
    free: list[bool] = []
    turns: list[int] = []
    give, turn = HostCopy.give, Client._turn

    def watched(copy: HostCopy, mask: Any) -> list[State]:
        def enter() -> None:
            free.append(client.lock.acquire(timeout=DEADLINE))
            client.lock.release()

        trainer = threading.Thread(target=enter)
        trainer.start()
        trainer.join(2 * DEADLINE)
        turns.append(made[0])
        return give(copy, mask)

    made = [0]

    def counted(self: Client, ready: Any) -> None:
        made[0] += 1
        turn(self, ready)

    def send(_link: Link, header: Header, body: Sequence[Frame]) -> bool:
        if header.kind is Kind.COPY:
            sent.append((header, decode_state([header.encode(), *body])))
        return True

    monkeypatch.setattr(HostCopy, "give", watched)
    monkeypatch.setattr(Client, "_turn", counted)
    monkeypatch.setattr(Link, "send", send)
    try:
        members = (
            Member(Role.SERVER, 0, 1, "s", f"127.0.0.1:{free_ports()}"),
            Member(Role.WORKER, 0, 1, "w"),
        )
        with client.lock:
            client._adopt(Membership("uid", "n", "j", 1, 1, 1, members, Settings()))
            copy = client._live.copy
            copy.add(TableSpec(0, "t", (2048, 2), 1, rule_to_json(SGD())))
            copy.arrange()
            copy.tables[:] = 1
            copy.data[0][:] = np.arange(4096).reshape(2048, 2)
            copy.lineage[:] = 1
        until(lambda: bool(client._live.links), "it connects")
        link = client._live.links[0]
        halves = [mask_of(np.arange(0, SLOTS // 2)), mask_of(np.arange(SLOTS // 2, SLOTS))]
        with client.lock:
            client._live.giver.asked += [(link, 3, bitmap(half)) for half in halves]
        client.wake()
        until(lambda: len(sent) == 2, "both are given")
        assert free == [True, True], "training waited for it"
        assert turns[0] < turns[1], "what came meanwhile had to wait"
        assert [header.request for header, _ in sent] == [3, 3]
        assert sum(state.values[0].size for _, state in sent) == 4096
        for (_, state), half in zip(sent, halves, strict=True):
            np.testing.assert_array_equal(state.slots, half)
        # A server that is gone gets nothing, and nobody falls over it.
        with client.lock:
            client._live.by_server.clear()
            client._live.giver.asked.append((link, 4, bitmap(halves[0])))
        client.wake()
        until(lambda: not client._live.giver.asked, "it is passed over")
        assert len(sent) == 2
        assert client.failure is None
    finally:
        client.close()
