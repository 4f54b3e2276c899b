"""A host whose guest cannot be started."""

import subprocess

import pytest

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.identity import Identity
from daruma_trainer.server.guests import NOT_STARTED, Guests
from local_cluster import free_ports


def test_a_host_without_room_for_a_process_says_so_and_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    me = Identity("n", "j", Role.SERVER, 0, 1, "", ("127.0.0.1", free_ports()))
    own = Member(Role.SERVER, 0, 1, "pod-0", "10.0.0.1:7070")
    guest = Member(Role.SERVER, 1, 5, "pod-0")
    membership = Membership("u", "n", "j", 5, 2, 1, (own, guest), Settings())
    guests = Guests(me, {})
    guests.follow(membership, own)
    guests.tick()
    assert [(g.id, g.exit_code) for g in guests.report] == [("server-1-5", NOT_STARTED)]
    guests.close()
    assert guests.report == ()
