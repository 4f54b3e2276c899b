"""Servers forked from a process that has imported what they need: they start in milliseconds.

What is asked, and what comes of it, is written at `daruma_trainer.server.forkserver`.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from daruma_operator.substrate.child import be_subreaper, die_with

ANSWER_SECONDS = 10.0
"""A machine may be so busy that importing takes this long; then servers start without it."""
COMMAND = ("-m", "daruma_trainer.server", "--fork")
_ANSWER_BYTES = 4096


class ForkServer:
    """Lives until `close`, or until it does not answer: then servers have to start otherwise.

    To be made in the main thread. OSError: it could not be started.
    """

    def __init__(self, environment: Mapping[str, str], command: Sequence[str] = COMMAND) -> None:
        """`environment`: what all servers have in common; `command`: what forks them."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._turn = asyncio.Lock()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=dict(environment),
                    start_new_session=True,
                    preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - as in Child
                )
        except OSError:
            self._socket.close()
            raise

    async def start(self, variables: Mapping[str, str], log: int) -> int | None:
        """Start a server with these variables besides; returns its process id.

        `log`: descriptor of what it writes to. None: this one is of no use any more.
        """
        async with self._turn:
            # No longer than it takes: a subreaper inherits all orphans, and has to reap them.
            be_subreaper(yes=True)
            pid = None
            try:
                pid = await self._fork(variables, log)
                if pid is not None:
                    await _inherit(pid)
            except asyncio.CancelledError:
                # Nobody would know of it.
                self._end(pid)
                raise
            finally:
                be_subreaper(yes=False)
            return pid

    def close(self) -> None:
        """End it; the servers go on."""
        self._kill()
        self._socket.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    async def _fork(self, variables: Mapping[str, str], log: int) -> int | None:
        try:
            socket.send_fds(self._socket, [json.dumps(dict(variables)).encode()], [log])
            async with asyncio.timeout(ANSWER_SECONDS):
                return _pid_of(await self._answer())
        except (OSError, TimeoutError):
            return await self._last_answer()

    async def _answer(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, _ANSWER_BYTES)

    async def _last_answer(self) -> int | None:
        """End it, then see whether it did what it was asked all the same."""
        if self._process.returncode is not None:
            return None
        self._kill()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                return _pid_of(await self._answer())
        return None

    def _end(self, pid: int | None) -> None:
        """End the fork server, and the server that it made last."""
        self._kill()
        with contextlib.suppress(OSError):
            pid = pid or _pid_of(self._socket.recv(_ANSWER_BYTES))
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pid_of(answer: bytes) -> int | None:
    return json.loads(answer).get("pid") if answer else None


async def _inherit(pid: int) -> None:
    """Wait until a server is a child of this process, and leads a group of its own."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                text = Path(f"/proc/{pid}/stat").read_text()
                state, parent, group = text.rpartition(")")[2].split()[:3]
                if int(parent) == os.getpid() and (int(group) == pid or state == "Z"):
                    return
                await asyncio.sleep(0.0005)
