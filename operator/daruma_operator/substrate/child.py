"""One child process that cannot outlive its parent, and whose end is known at once."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MESSAGE_BYTES = 2048
_MESSAGE_LINES = 20
_UNKNOWN = 255
"""Exit code of a process whose end the kernel told nobody: SIGCHLD is ignored here."""


class Child:
    """A process in a session of its own, so that Ctrl-C in the terminal does not reach it.

    The kernel kills it when the thread that made it ends (PR_SET_PDEATHSIG), however that comes;
    so make it from the main thread. `ended` is called from the event loop as soon as it exits.
    """

    def __init__(
        self, pid: int, wait: Callable[[], int], log: Path, ended: Callable[["Child"], None]
    ) -> None:
        """Take care of a child that was started; `wait` reaps it, and returns as Popen does."""
        self.pid = pid
        """Its process id, which is also that of its group."""
        self.log = log
        self.exit_code: int | None = None
        """As Kubernetes writes it: 128 + n for signal n; None while it runs."""
        self._wait = wait
        self._ended = ended
        self._exit: asyncio.Event = asyncio.Event()
        self._kill: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        ended: Callable[["Child"], None],
        nice: int = 0,
    ) -> "Child":
        """Start a command, so much nicer than this process.

        OSError: it could not be started, or its log could not be opened.
        """
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
                # Only a system call between fork and exec: nothing there takes a lock.
                preexec_fn=die_with(os.getpid()),  # noqa: PLW1509
            )
        if nice:
            _yield_to_others(process.pid, nice)
        return cls(process.pid, process.wait, log, ended)

    @classmethod
    def forked(cls, pid: int, log: Path, ended: Callable[["Child"], None]) -> "Child":
        """Take care of a child that another process made for this one."""
        return cls(pid, lambda: _exit_of(pid), log, ended)

    @property
    def reason(self) -> str | None:
        """One word for why it ended, as Kubernetes writes it; None while it runs."""
        if self.exit_code is None:
            return None
        return "Completed" if self.exit_code == 0 else "Error"

    def message(self) -> str:
        """Return the last lines that it wrote, for people."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _MESSAGE_BYTES))
                text = log.read(_MESSAGE_BYTES).decode(errors="replace")
        except OSError as error:
            return f"its log cannot be read: {error}"
        return "\n".join(text.strip().splitlines()[-_MESSAGE_LINES:])

    def send(self, number: signal.Signals) -> None:
        """Signal its whole group; nothing happens if it is gone."""
        if self.exit_code is None:
            self._send_group(number)

    def end(self, grace_seconds: float) -> None:
        """SIGTERM now, SIGKILL after the grace; an earlier deadline stands."""
        if self.exit_code is not None:
            return
        if grace_seconds <= 0:
            self.send(signal.SIGKILL)
            return
        self.send(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        when = loop.time() + grace_seconds
        if self._kill is None or self._kill.when() > when:
            if self._kill is not None:
                self._kill.cancel()
            self._kill = loop.call_at(when, self.send, signal.SIGKILL)

    async def wait(self, seconds: float) -> bool:
        """Return whether it ended within this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exit.wait()
        return self._exit.is_set()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._wait()
        self.exit_code = code if code >= 0 else 128 - code
        if self._kill is not None:
            self._kill.cancel()
        # What it started itself must not go on without it.
        self._send_group(signal.SIGKILL)
        self._exit.set()
        self._ended(self)

    def _send_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _yield_to_others(pid: int, nice: int) -> None:
    """Lower the priority of a process that leads a session."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        # Where the kernel groups tasks by session, niceness counts within one only; this is the
        # session's own (sched(7), "The autogroup feature").
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def _exit_of(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return _UNKNOWN


def be_subreaper(*, yes: bool) -> None:
    """Be the parent of all descendants that lose theirs, or be so no longer."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def die_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process calls first, so that the kernel ends it with its parent."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork, so that the child loads nothing.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the call above, which then never fires.
        if os.getppid() != parent:
            os._exit(1)

    return set_death_signal
