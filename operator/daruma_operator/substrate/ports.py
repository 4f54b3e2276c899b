"""Ports of this machine for members: a data port, and the agent's port after it."""

import random
import socket
import sys
from collections import deque

from daruma_operator.errors import EnvironmentLacksError
from daruma_trainer.contract import port_claim

_FIRST, _LAST = 20_000, 32_000
"""Below the range that the kernel takes ports of outgoing connections from."""
_HELD = 64
"""Pairs that are kept from other processes at once: members bind theirs within seconds."""


class Ports:
    """Gives out pairs of neighbouring free ports, each once.

    `first`: count up from there, so that a firewall or a test knows them; None: anywhere.
    """

    def __init__(self, host: str, first: int | None = None) -> None:
        self._host = host
        self._next = first if first is not None else random.randrange(_FIRST, _LAST, 2)  # noqa: S311
        self._last = 65_534 if first is not None else _LAST
        self._wraps = first is None
        self._held: deque[socket.socket] = deque()

    def check(self, pairs: int) -> None:
        """Raise EnvironmentLacksError if one of the next `pairs` pairs is taken."""
        for port in range(self._next, self._next + 2 * pairs):
            if port > self._last + 1 or not self._free(port):
                raise EnvironmentLacksError(
                    f"port {port} of {self._host} is taken: choose another --ports FIRST "
                    f"({2 * pairs} ports from there on are needed), or leave it out"
                )

    def take(self) -> int:
        """Return the lower port of a free pair. EnvironmentLacksError: there is none."""
        for _ in range((_LAST - _FIRST) // 2):
            port = self._next
            self._next += 2
            if self._next > self._last:
                if not self._wraps:
                    break
                self._next = _FIRST
            if self._free(port) and self._free(port + 1) and self._reserve(port):
                return port
        raise EnvironmentLacksError(f"no two neighbouring free ports are left on {self._host}")

    def close(self) -> None:
        """Let other processes have what was given out and is not in use."""
        while self._held:
            self._held.popleft().close()

    def _reserve(self, port: int) -> bool:
        """Keep a pair from other processes like this one until its member has bound it.

        An abstract socket's name is taken by one process alone, and free when that ends.
        """
        if sys.platform != "linux":
            return True
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(port_claim(port))
        except OSError:
            holder.close()
            return False
        self._held.append(holder)
        if len(self._held) > _HELD:
            self._held.popleft().close()
        return True

    def _free(self, port: int) -> bool:
        with socket.socket() as probe:
            # As the members do, so that a connection that only waits out its end is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError:
                return False
            return True
