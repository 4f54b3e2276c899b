"""Adopted seats: servers that were lost and live on in this one's pod, each a process of its own.

The membership says which (members that name this pod); a guest's life follows from that alone, so
hearing it twice or late does no harm. A guest ends with its host.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from daruma_trainer.contract import (
    ENV_HOST_PID,
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_LISTEN,
    Guest,
    Member,
    Membership,
    port_claim,
)
from daruma_trainer.identity import Identity

LOG = logging.getLogger("daruma.server")
PORTS = 400
"""How far above the host's own port a free pair is looked for."""
END_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


NOT_STARTED = 126
"""Exit code of a guest whose process could not be made, as of a shell's command."""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes] | None
    guest: Guest
    claim: socket.socket
    """Keeps its ports from others on this machine, who may not see them bound yet."""


@dataclass(slots=True)
class Guests:
    """The guests of one server. For the serve loop's thread alone."""

    me: Identity
    environment: Mapping[str, str]
    _children: dict[str, _Child] = field(default_factory=dict)

    def follow(self, membership: Membership, own: Member) -> None:
        """Start those that the membership puts here, and end those that it does not any more."""
        if ENV_HOST_PID in self.environment:
            return  # a guest itself
        wanted = {m.id: m for m in membership.guests(own)}
        for gone in [i for i in self._children if i not in wanted]:
            self._end(self._children.pop(gone))
        for guest_id, member in wanted.items():
            if guest_id not in self._children:
                self._start(member, own)

    def tick(self) -> None:
        """Note who ended."""
        for child in self._children.values():
            process = child.process
            if process and child.guest.exit_code is None and (code := process.poll()) is not None:
                LOG.warning("the guest %s ended with %s", child.guest.id, code)
                child.guest = Guest(child.guest.id, child.guest.address, code)

    @property
    def report(self) -> tuple[Guest, ...]:
        """What the host says of them."""
        return tuple(child.guest for child in self._children.values())

    def close(self) -> None:
        """End all."""
        for child in self._children.values():
            self._end(child)
        self._children.clear()

    def _start(self, member: Member, own: Member) -> None:
        host = self.me.listen[0]
        port, claim = _free_pair(host, self.me.listen[1] + 2)
        environment = {
            **self.environment,
            ENV_INDEX: str(member.index),
            ENV_INCARNATION: str(member.incarnation),
            ENV_LISTEN: f"{host}:{port}",
            ENV_HOST_PID: str(os.getpid()),
        }
        reached = (own.address or f"{host}:0").rpartition(":")[0]
        guest = Guest(member.id, f"{reached}:{port}")
        command = [sys.executable, "-m", "daruma_trainer.server"]
        process = None
        try:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            LOG.info("adopted %s, on port %s", member.id, port)
        except OSError as error:
            # No memory, or no process left to this pod: its own shard is to live on all the same.
            LOG.error("%s cannot be adopted here, no process can be made: %s", member.id, error)
            guest = Guest(guest.id, guest.address, NOT_STARTED)
        self._children[member.id] = _Child(process, guest, claim)

    def _end(self, child: _Child) -> None:
        # What it knew was handed over, or is lost by the operator's decision: nothing to save.
        child.claim.close()
        if child.process is None:
            return
        child.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(END_SECONDS)


def end_with(host_pid: int) -> bool:
    """Have the kernel end this process with its host; False if that is gone already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == host_pid


def _free_pair(host: str, first: int) -> tuple[int, socket.socket]:
    """Return the lower of two neighbouring free ports, and the claim on them.

    0 where there are none: the guest will refuse it and end, and its host say so.
    """
    claim = socket.socket(socket.AF_UNIX)
    for port in range(first, first + PORTS, 2):
        if _free(host, port) and _free(host, port + 1) and _claimed(claim, port):
            return port, claim
    return 0, claim


def _claimed(claim: socket.socket, port: int) -> bool:
    """Claim a pair by the abstract name that `daruma run` uses as well (Linux)."""
    try:
        claim.bind(port_claim(port))
    except OSError:
        return False
    return True


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
