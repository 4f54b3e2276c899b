"""The serve loop's end."""

import pytest

from daruma_trainer.contract import ExitCode, Role
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
