"""Servers forked from a process that has imported what they need: they start in milliseconds.

What is asked, and what comes of it, is written at `daruma_trainer.server.forkserver`.
"""

import asyncio
import contextlib
import json
import os
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
        be_subreaper(yes=True)
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
            be_subreaper(yes=False)
            raise

    async def start(self, variables: Mapping[str, str], log: int) -> int | None:
        """Start a server with these variables besides; returns its process id.

        `log`: descriptor of what it writes to. None: this one is of no use any more.
        """
        async with self._turn:
            try:
                socket.send_fds(self._socket, [json.dumps(dict(variables)).encode()], [log])
                answer = await asyncio.wait_for(self._answer(), ANSWER_SECONDS)
            except (OSError, TimeoutError):
                answer = await self._last_answer()
            except asyncio.CancelledError:
                self.close()
                raise
            pid: int | None = json.loads(answer).get("pid") if answer else None
            if pid is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(_inherit(pid), ANSWER_SECONDS)
            return pid

    def close(self) -> None:
        """End it; the servers go on."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        be_subreaper(yes=False)

    async def _answer(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, _ANSWER_BYTES)

    async def _last_answer(self) -> bytes:
        """End it, then see whether it did what it was asked all the same."""
        if self._process.returncode is not None:
            return b""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError, TimeoutError):
            return await asyncio.wait_for(self._answer(), ANSWER_SECONDS)
        return b""


async def _inherit(pid: int) -> None:
    """Wait until the one that answered has ended, which leaves the server to this process."""
    while _parent_of(pid) != os.getpid():
        await asyncio.sleep(0.0005)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
