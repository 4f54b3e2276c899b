"""Child processes: their end is known at once, and they cannot outlive their parent."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from daruma_operator.substrate.child import Child

DEADLINE = 60.0


def ended_child(tmp_path: Path, command: list[str], act: signal.Signals | None = None) -> Child:
    async def story() -> Child:
        ended = asyncio.Event()
        child = Child.start(
            command, {"PATH": os.environ["PATH"]}, tmp_path / "log", lambda _: ended.set()
        )
        if act is not None:
            child.send(act)
        async with asyncio.timeout(DEADLINE):
            await ended.wait()
        return child

    return asyncio.run(story())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while alive(pid):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [("exit 0", 0, "Completed"), ("echo why >&2; exit 3", 3, "Error")],
)
def test_exit_code_reason_and_last_words(
    tmp_path: Path, script: str, code: int, reason: str
) -> None:
    child = ended_child(tmp_path, ["sh", "-c", script])
    assert (child.exit_code, child.reason) == (code, reason)
    assert child.message() == ("why" if code else "")


def test_a_signal_reads_as_kubernetes_writes_it(tmp_path: Path) -> None:
    assert ended_child(tmp_path, ["sleep", "60"], signal.SIGKILL).exit_code == 137


def test_the_message_is_bounded(tmp_path: Path) -> None:
    child = ended_child(tmp_path, ["sh", "-c", "seq 100000; exit 1"])
    assert len(child.message().splitlines()) == 20
    assert child.message().endswith("100000")


def test_a_missing_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ended_child(tmp_path, ["no-such-program-here"])


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def story() -> None:
        script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
        command = ["sh", "-c", script]
        child = Child.start(command, dict(os.environ), tmp_path / "log", lambda _: None)
        async with asyncio.timeout(DEADLINE):
            while "ready" not in child.message():
                await asyncio.sleep(0.01)
        child.end(0.2)
        child.end(60.0)
        assert await child.wait(DEADLINE)
        assert child.exit_code == 137

    asyncio.run(story())


def test_what_a_member_started_ends_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        script = "sleep 60 & echo $!; wait"
        command = ["sh", "-c", script]
        child = Child.start(command, dict(os.environ), tmp_path / "log", lambda _: None)
        async with asyncio.timeout(DEADLINE):
            while not child.message():
                await asyncio.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        assert await child.wait(DEADLINE)
        await until_gone(int(child.message()))

    asyncio.run(story())


def test_no_child_survives_a_killed_parent(tmp_path: Path) -> None:
    parent = textwrap.dedent(
        """
        import asyncio, os, pathlib, sys
        from daruma_operator.substrate.child import Child
        async def main():
            log = pathlib.Path(sys.argv[1])
            child = Child.start(["sleep", "60"], dict(os.environ), log, lambda _: None)
            print(child.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    asyncio.run(until_gone(pid))
