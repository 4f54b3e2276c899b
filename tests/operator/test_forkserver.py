"""Servers that are forked: children of who asked, whatever becomes of the fork server."""

import asyncio
import os
import select
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from daruma_operator.substrate import forkserver
from daruma_operator.substrate.child import Child
from daruma_operator.substrate.forkserver import ForkServer
from daruma_operator.substrate.ports import Ports
from daruma_trainer.contract import (
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_JOB,
    ENV_LISTEN,
    ENV_NAMESPACE,
    ENV_ROLE,
    ENV_TOKEN_FILE,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
DEADLINE = 60.0


class Story:
    """A fork server, and the servers that it made."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        (tmp_path / "token").write_text("t" * 64)
        shared = {ENV_NAMESPACE: "n", ENV_JOB: "j", ENV_TOKEN_FILE: str(tmp_path / "token")}
        self.forks = ForkServer(dict(os.environ) | shared)
        self.ports = Ports("127.0.0.1")
        self.children: list[Child] = []

    @property
    def process(self) -> int:
        """Process id of the fork server."""
        return self.forks._process.pid

    async def start(self, **more: str) -> Child | None:
        log = self.folder / f"{len(self.children)}.log"
        listen = f"127.0.0.1:{self.ports.take()}"
        own = {ENV_ROLE: "Server", ENV_INDEX: "0", ENV_INCARNATION: "1", ENV_LISTEN: listen}
        with log.open("wb") as out:
            pid = await self.forks.start(own | more, out.fileno())
        if pid is None:
            return None
        child = Child.forked(pid, log, lambda _: None)
        self.children.append(child)
        return child

    async def serving(self) -> Child:
        child = await self.start()
        assert child is not None
        async with asyncio.timeout(DEADLINE):
            while "listens on" not in child.message():
                await asyncio.sleep(0.01)
        return child

    async def close(self) -> None:
        for child in self.children:
            child.end(0.0)
            assert await child.wait(DEADLINE)
        self.forks.close()
        self.ports.close()


def tell(tmp_path: Path, story: Callable[[Story], Awaitable[None]]) -> None:
    async def told() -> None:
        it = Story(tmp_path)
        try:
            await story(it)
        finally:
            await it.close()

    asyncio.run(told())


def stat(pid: int) -> list[str]:
    """Return /proc/PID/stat after the name: state, parent, group, session, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_a_server_is_a_child_in_a_session_of_its_own(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        first, second = await it.serving(), await it.serving()
        for child in (first, second):
            _, parent, group, session = stat(child.pid)[:4]
            assert (int(parent), int(group), int(session)) == (os.getpid(), child.pid, child.pid)
        first.send(signal.SIGKILL)
        assert await first.wait(DEADLINE)
        assert (first.exit_code, first.reason) == (137, "Error")
        assert second.exit_code is None

    tell(tmp_path, story)


def test_its_exit_code_and_last_words_are_known(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        child = await it.start(**{ENV_TOKEN_FILE: "/no/such/file"})
        assert child is not None
        assert await child.wait(DEADLINE)
        assert child.exit_code == 2
        assert "/no/such/file" in child.message()

    tell(tmp_path, story)


def test_servers_go_on_without_it_and_others_start_otherwise(tmp_path: Path) -> None:
    async def story(it: Story) -> None:
        child = await it.serving()
        os.kill(it.process, signal.SIGKILL)
        assert await it.start() is None
        assert await it.start() is None
        assert child.exit_code is None

    tell(tmp_path, story)


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(it: Story) -> None:
        await it.serving()
        monkeypatch.setattr(forkserver, "ANSWER_SECONDS", 0.1)
        os.kill(it.process, signal.SIGSTOP)
        assert await it.start() is None
        assert not Path(f"/proc/{it.process}").exists()

    tell(tmp_path, story)


def test_what_it_did_before_it_was_ended_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that came too late is read all the same: no server may be left unknown."""

    async def late(forks: ForkServer) -> bytes:
        async with asyncio.timeout(DEADLINE):
            while not select.select([forks._socket], [], [], 0)[0]:
                await asyncio.sleep(0.01)
        raise TimeoutError

    async def story(it: Story) -> None:
        await it.serving()
        answers = [late, ForkServer._answer]

        async def answer(forks: ForkServer) -> bytes:
            return await answers.pop(0)(forks)

        monkeypatch.setattr(ForkServer, "_answer", answer)
        assert await it.start() is not None

    tell(tmp_path, story)


def test_orphans_of_others_are_not_kept(tmp_path: Path) -> None:
    """Who inherits them and does not wait for them has zombies for ever."""

    async def story(it: Story) -> None:
        await it.serving()
        made = await asyncio.create_subprocess_shell(
            "sleep 60 >/dev/null 2>&1 & echo $!", stdout=asyncio.subprocess.PIPE
        )
        said, _ = await made.communicate()
        orphan = int(said)
        parent = int(stat(orphan)[1])
        os.kill(orphan, signal.SIGKILL)
        assert parent != os.getpid()

    tell(tmp_path, story)


def test_a_server_whose_start_was_cancelled_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    async def cancelled(pid: int) -> None:
        started.append(pid)
        raise asyncio.CancelledError

    async def story(it: Story) -> None:
        monkeypatch.setattr(forkserver, "_inherit", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await it.start()
        async with asyncio.timeout(DEADLINE):
            with suppress(FileNotFoundError, ProcessLookupError):
                while stat(started[0])[0] != "Z":
                    await asyncio.sleep(0.01)

    tell(tmp_path, story)
