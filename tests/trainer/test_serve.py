"""The serve loop's end, and that it hangs."""

import json
import threading
import time
from http.client import HTTPConnection

import pytest

from daruma_trainer.contract import ExitCode, Role, View
from daruma_trainer.identity import Identity
from daruma_trainer.server.lifecycle import Lifecycle
from daruma_trainer.server.serve import SAVE_SECONDS, Server
from local_cluster import free_ports


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long saves that are under way were waited for."""
    found: list[float] = []
    monkeypatch.setattr(Lifecycle, "close", lambda _self, seconds: found.append(seconds))
    return found


def made() -> Server:
    return Server(Identity("n", "j", Role.SERVER, 0, 1, "token", ("127.0.0.1", free_ports())))


def test_one_that_broke_is_gone_at_once(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_self: Lifecycle, *, idle: bool) -> None:
        raise RuntimeError("an error in the loop")

    monkeypatch.setattr(Lifecycle, "work", breaks)
    with pytest.raises(RuntimeError, match="in the loop"):
        made().run()
    assert waits == [0.0], "its agent would answer, and nobody would replace it"


def test_one_that_is_told_to_end_finishes_its_saves(waits: list[float]) -> None:
    server = made()
    server.stop()
    assert server.run() == ExitCode.OK
    assert waits == [SAVE_SECONDS]


def test_the_agent_tells_of_a_loop_that_hangs() -> None:
    server = made()
    loop = threading.Thread(target=server.run)
    loop.start()
    agent, token = server.me.agent_listen, server.me.token

    def view() -> View:
        connection = HTTPConnection(*agent, timeout=20)
        connection.request("GET", "/v1/view", headers={"Authorization": f"Bearer {token}"})
        try:
            return View.from_json(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    go_on, end = threading.Event(), time.monotonic() + 20
    try:
        assert view().still < 1.0
        server.post(lambda: (go_on.wait(20), None)[1])
        while view().still < 1.5:
            assert time.monotonic() < end
        go_on.set()
        while view().still > 1.0:
            assert time.monotonic() < end
    finally:
        go_on.set()
        server.stop()
        loop.join()
