"""Real servers and workers as processes, and a tiny operator to tell them who is who.

For tests of the trainer alone: memberships are put by hand, so that a test can lose, freeze and
replace members at any moment it likes.
"""

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from daruma_operator.substrate import forkserver
from daruma_operator.substrate.ports import Ports
from daruma_trainer.checkpoint.manifest import newest_cut, read_manifest
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import open_store
from daruma_trainer.contract import (
    Member,
    Membership,
    Report,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    View,
    agent_address,
    place,
    slots_from_hex,
    slots_to_hex,
)

DEADLINE = 60.0
FORKED = str(Path(__file__).with_name("forked_members.py"))
TOKEN = "a-token-of-this-test"
T = TypeVar("T")
# Tests have nothing else to start members with, however long it takes.
forkserver.ANSWER_SECONDS = DEADLINE


def free_ports() -> int:
    """Find a port with a free one after it.

    Not among those that the kernel gives to outgoing connections: one to a port there that nobody
    listens on may be connected to itself.
    """
    return _ports().take()


@cache
def _ports() -> Ports:
    return Ports("127.0.0.1")


class Process:
    """A member that was forked; as far as it goes, like Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float) -> int:
        """Return its exit code once it ended; TimeoutError: it did not."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Signal it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class LocalCluster:
    """Members of one job as processes."""

    def __init__(
        self,
        folder: Path,
        servers: int,
        workers: int,
        settings: Settings,
        program: Sequence[str] = ("-m", "daruma_trainer.programs.mlr"),
    ) -> None:
        self.folder = folder
        self.program = list(program)
        self.processes: dict[str, Process] = {}
        (folder / "token").write_text(TOKEN)
        shared = {
            "DARUMA_NAMESPACE": "test",
            "DARUMA_JOB": "job",
            "DARUMA_TOKEN_FILE": str(folder / "token"),
            "OMP_NUM_THREADS": "1",
        }
        self._forks = forkserver.ForkServer(os.environ | shared, [FORKED])
        self.membership = Membership(
            "uid-of-the-test", "test", "job", 1, servers, workers, (), settings
        )
        self._counts = (Role.SERVER, servers), (Role.WORKER, workers)

    def open(self) -> None:
        """Start all members, and tell them of each other."""
        for role, count in self._counts:
            for i in range(count):
                self.start(role, i, 1)
        self.tell()

    def start(self, role: Role, index: int, incarnation: int) -> Member:
        """Start a process and enter it into the membership, in place of an older incarnation."""
        port = free_ports()
        pod = f"job-{role.value.lower()}-{index}-{incarnation}"
        member = Member(role, index, incarnation, pod, f"127.0.0.1:{port}")
        command = ["-m", "daruma_trainer.server"] if role is Role.SERVER else self.program
        own = {
            "DARUMA_ROLE": role.value,
            "DARUMA_INDEX": str(index),
            "DARUMA_INCARNATION": str(incarnation),
            "DARUMA_LISTEN": f"127.0.0.1:{port}",
            "DARUMA_TEST_COMMAND": json.dumps(command),
        }
        with (self.folder / f"{pod}.log").open("wb") as log:
            pid = asyncio.run(self._forks.start(own, log.fileno()))
        if pid is None:
            raise AssertionError("members cannot be forked")
        self.processes[member.id] = Process(pid)
        others = tuple(m for m in self.membership.members if (m.role, m.index) != (role, index))
        self.membership = replace(self.membership, members=(*others, member))
        return member

    def tell(self, *, raise_epoch: bool = False, **changes: Any) -> None:
        """Put the membership to every member that has an address and answers."""
        epoch = self.membership.epoch + raise_epoch
        self.membership = replace(self.membership, epoch=epoch, **changes)
        body = json.dumps(self.membership.to_json()).encode()
        addressed = [m for m in self.membership.replicas if m.address is not None]
        for member in (*self.membership.members, *addressed):
            if self.alive(member.id):
                self.until(
                    lambda m=member: self.call(m, "PUT", "/v1/membership", body) == 204,  # type: ignore[misc]
                    f"{member.id} takes the membership",
                )

    def alive(self, member_id: str) -> bool:
        """Return whether its process runs; a guest's is not ours to ask."""
        process = self.processes.get(member_id)
        return process is None or process.poll() is None

    def call(
        self, member: Member, method: str, path: str, body: bytes | None = None, token: str = TOKEN
    ) -> int:
        """Send a request to an agent; returns the status, 0 if it cannot be reached."""
        request = urllib.request.Request(
            f"http://{agent_address(member.address or '')}{path}",
            data=body,
            method=method,
            headers={"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def view(self, member: Member) -> View | None:
        """Return what a member knows, or None if it does not answer."""
        request = urllib.request.Request(
            f"http://{agent_address(member.address or '')}/v1/view?after=0&wait=0",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return View.from_json(json.loads(answer.read()))
        except OSError:
            return None

    def report(self, role: Role, index: int) -> Report:
        """Return a live member's own report."""
        member = self.membership.member(role, index)
        view = None if member is None else self.view(member)
        return Report("", 0, "Away") if view is None else view.own

    def until(self, true: Callable[[], T | None], what: str, seconds: float = DEADLINE) -> T:
        """Wait with a deadline until something is truthy, and return it."""
        end = time.monotonic() + seconds
        while True:
            found = true()
            if found:
                return found
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {seconds} s\n{self.logs()}")
            time.sleep(0.02)

    def kill(self, member_id: str, number: int = signal.SIGKILL) -> None:
        """Send a signal; SIGKILL also waits for the end."""
        self.processes[member_id].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[member_id].wait(DEADLINE)

    def replace_server(
        self, index: int, sources: Sequence[Source], *, initialised: bool = True
    ) -> Member:
        """Fence a server, start its successor, and tell it where to take its slots from."""
        epoch = self.membership.epoch + 1
        gone = self.membership.member(Role.SERVER, index)
        members = tuple(m for m in self.membership.members if m is not gone)
        self.tell(raise_epoch=True, members=members, initialised=initialised, recovery=epoch)
        member = self.start(Role.SERVER, index, epoch)
        self.tell(raise_epoch=True)
        plan = Restore(epoch, self.membership.epoch, member.id, tuple(sources))
        body = json.dumps(plan.to_json()).encode()
        status = self.call(member, "POST", "/v1/restore", body)
        if status != 204:
            raise AssertionError(f"the restore was answered with {status}\n{self.logs()}")
        return member

    def slots(self, server: int) -> str:
        """Return a server's slots as a bitmap."""
        owners = place(self.membership.job_uid, self.membership.servers)
        return slots_to_hex([s for s, owner in enumerate(owners) if owner == server])

    def finish(self) -> None:
        """When all workers left: take the final cut, and wait until all of them ended with 0."""
        workers = self.membership.of(Role.WORKER)
        self.until(
            lambda: all(self.report(Role.WORKER, w.index).state == "Left" for w in workers),
            "all workers leave",
        )
        self.order_result()
        self.released()

    def released(self) -> None:
        """Wait until all workers ended with 0: the result is there."""
        for worker in self.membership.of(Role.WORKER):
            assert self.processes[worker.id].wait(DEADLINE) == 0, self.logs()

    def order_result(self) -> None:
        """Tell all servers to take the final cut; again changes nothing."""
        body = json.dumps({"kind": "final", "number": "00000099-final"}).encode()
        for server in self.membership.of(Role.SERVER):
            assert self.call(server, "POST", "/v1/checkpoint", body) == 204

    def result(self, store: Path) -> dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]:
        """Read the tables of the final cut, by name, from what lies in the store."""
        opened = open_store(f"file://{store}")
        found = newest_cut(opened, self.membership.prefix)
        if found is None:
            raise AssertionError(f"no cut in {store}")
        tables: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for name in found[1].shards:
            manifest = read_manifest(opened, name)
            specs = {t.id: t for t in manifest.tables}
            blocks, damaged = read_blocks(opened, manifest, manifest.blocks)
            assert not damaged
            for block in blocks:
                spec = specs[block.table]
                rows = tables.setdefault(spec.name, np.zeros((spec.rows, spec.cols), np.float32))
                start = block.block * spec.block_rows
                part = block.data.reshape(-1, spec.cols)
                rows[start : start + len(part)] = part
        return tables

    def logs(self) -> str:
        """Return the end of every member's output."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """Kill and reap everything."""
        for process in self.processes.values():
            process.send_signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait(DEADLINE)
        self._forks.close()


@contextmanager
def local_cluster(
    folder: Path,
    *,
    servers: int = 2,
    workers: int = 2,
    settings: Settings,
    program: Sequence[str] = ("-m", "daruma_trainer.programs.mlr"),
) -> Iterator[LocalCluster]:
    """Run a job's members; nothing of it is left afterwards."""
    cluster = LocalCluster(folder, servers, workers, settings, program)
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


def freshest(cluster: LocalCluster, index: int) -> list[Source]:
    """Plan as the operator does: each slot from the worker that has the newest version of it."""
    best: dict[int, tuple[tuple[int, int], str]] = {}
    lost = set(slots_from_hex(cluster.slots(index)))
    for worker in cluster.membership.of(Role.WORKER):
        for copy in cluster.report(Role.WORKER, worker.index).copies:
            for slot in lost & set(slots_from_hex(copy.slots)):
                offer = ((copy.lineage, copy.position), worker.id)
                best[slot] = max(best.get(slot, ((0, 0), "")), offer)
    return [
        Source(
            SourceKind.PEER, slots_to_hex([s for s, (_, w) in best.items() if w == member]), member
        )
        for member in sorted({w for _, w in best.values()})
    ]


def fence(cluster: LocalCluster, index: int) -> None:
    """Kill a server, and tell everybody; nothing replaces it yet."""
    gone = cluster.membership.member(Role.SERVER, index)
    assert gone is not None
    cluster.kill(gone.id)
    members = tuple(m for m in cluster.membership.members if m is not gone)
    epoch = cluster.membership.epoch + 1
    cluster.tell(raise_epoch=True, members=members, initialised=True, recovery=epoch)


def lose(cluster: LocalCluster, index: int) -> None:
    """Kill a server, fence it, and wait for the workers to offer their copies."""
    fence(cluster, index)
    workers = cluster.membership.of(Role.WORKER)
    cluster.until(
        lambda: all(cluster.report(Role.WORKER, w.index).copies for w in workers), "copies"
    )


def lose_and_replace(cluster: LocalCluster, index: int) -> Member:
    """Kill a server, fence it, wait for the copies, and restore its successor from the freshest."""
    lose(cluster, index)
    return cluster.replace_server(index, freshest(cluster, index))


def replace_worker(cluster: LocalCluster, index: int) -> None:
    """Kill a worker and start its successor."""
    gone = cluster.membership.member(Role.WORKER, index)
    assert gone is not None
    cluster.kill(gone.id)
    members = tuple(m for m in cluster.membership.members if m is not gone)
    epoch = cluster.membership.epoch + 1
    cluster.tell(raise_epoch=True, members=members, initialised=True)
    cluster.start(Role.WORKER, index, epoch)
    cluster.tell(raise_epoch=True)


def stepped(cluster: LocalCluster, epoch: int) -> bool:
    """Whether worker 0 made a step in this epoch, or has none left to make."""
    report = cluster.report(Role.WORKER, 0)
    return report.acked_epoch >= epoch or report.state == "Left"
