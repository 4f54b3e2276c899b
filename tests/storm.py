"""A storm: a job under `daruma run` whose processes are killed one after the other."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daruma_trainer.bench.members import Process, processes
from daruma_trainer.contract import ENV_HOST_PID, ENV_INCARNATION, ENV_INDEX, Role, View, member_id
from left_behind import left_by

DEADLINE = 120.0
MARGIN = 30
"""Batches that every worker makes after the storm: none has more that are not acknowledged."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a process holds."""

    descriptors: int
    kib: int
    """Resident memory."""


@dataclass(slots=True)
class Storm:
    """One job in its storm."""

    folder: Path
    run: "subprocess.Popen[str]"
    servers: int
    workers: int
    replicas: int
    """Of each server."""
    dice: random.Random
    spared: set[tuple[Role, int]] = field(default_factory=set)
    """Seats that nobody kills, so that there is who has seen it all."""
    killed: list[str] = field(default_factory=list)
    """Members by id; with a server go those that live in its pod."""

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    @property
    def report(self) -> dict[str, Any]:
        found = json.loads((self.folder / "out" / "report.json").read_text())
        assert isinstance(found, dict)
        return found

    def members(self) -> list[Process]:
        return processes(self.folder / "out")

    def seats(self, role: Role) -> list[Process]:
        """The newest member of each seat of a role that has a process of its own."""
        newest = {p.index: p for p in sorted(self.members(), key=lambda p: p.incarnation)
                  if p.role is role}  # fmt: skip
        return [newest[index] for index in sorted(newest)]

    def whole(self) -> bool:
        """Whether everybody is at work, each server in its own process, with its replicas."""
        views: list[View] = []
        try:
            views += [p.view()[1] for p in self.members()]
        except (OSError, http.client.HTTPException):
            return False
        states = [v.own.state for v in views]
        guests = [v.others.get(g.id) for v in views for g in v.own.guests if g.exit_code is None]
        return (
            sorted(states) == ["Ready"] * self.servers + ["Training"] * self.workers
            and len(guests) == self.servers * self.replicas
            and all(told is not None and told[1].state == "Replica" for told in guests)
            and all(v.own.acked_epoch == v.own.epoch for v in views if v.own.total_steps)
        )

    def until(self, what: str, true: Callable[[], bool], seconds: float = DEADLINE) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.run.poll() is None, f"{what}: the job ended\n{self.output[-6000:]}"
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.output[-6000:]}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until all are at work, and nothing more is to be done."""
        self.until("all are at work", self.whole)

    def recovered(self) -> int:
        return self.output.count("RecoverySucceeded")

    def kill(self, *victims: Process) -> None:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
            self.killed.append(victim.id)

    def pick(self, role: Role) -> Process:
        return self.dice.choice([p for p in self.seats(role) if (role, p.index) not in self.spared])

    def strike(self, blow: str) -> None:
        """Kill what the blow's name says, and wait until all is well again."""
        before = self.recovered()
        match blow:
            case "server":
                self.kill(self.pick(Role.SERVER))
            case "worker":
                self.kill(self.pick(Role.WORKER))
            case "both":
                self.kill(self.pick(Role.SERVER), self.pick(Role.WORKER))
            case "again":
                self._kill_again(self.pick(Role.SERVER))
            case "replica":
                self._kill_replica()
        if blow != "replica":
            self.until("the recovery ends", lambda: self.recovered() > before)
        self.settle()

    def _kill_again(self, victim: Process) -> None:
        """Kill a server, and what comes in its place as soon as that runs, or soon after."""
        self.kill(victim)

        def successor() -> list[Process]:
            return [
                p
                for p in self.members()
                if (p.role, p.index) == (Role.SERVER, victim.index)
                and p.incarnation > victim.incarnation
            ]

        self.until("a replacement starts", lambda: bool(successor()))
        time.sleep(self.dice.uniform(0.0, 0.3))
        self.kill(*successor()[:1])

    def _kill_replica(self) -> None:
        found = {
            name: pid
            for host in self.seats(Role.SERVER)
            for name, pid in guests_of(host.pid).items()
        }
        name = self.dice.choice(sorted(found))
        os.kill(found[name], signal.SIGKILL)
        self.until("another is made", lambda: self._lets_go(name))

    def _lets_go(self, guest: str) -> bool:
        """Whether the operator told its host to forget it."""
        try:
            views = [p.view()[1] for p in self.seats(Role.SERVER)]
        except (OSError, http.client.HTTPException):
            return False
        return guest not in {g.id for v in views for g in v.own.guests}

    def calm(self, file: Path) -> int:
        """End the storm: all workers go on to the batch that is returned."""
        last = max(p.view()[1].own.step for p in self.seats(Role.WORKER)) + MARGIN
        written = file.with_suffix(".new")
        written.write_text(str(last))
        written.rename(file)
        return last

    def used(self) -> dict[str, Used]:
        """What the processes hold that were never killed: by member id, and `operator`."""
        pids = {p.id: p.pid for p in self.members() if (p.role, p.index) in self.spared}
        pids["operator"] = self.run.pid
        return {name: use_of(pid) for name, pid in pids.items()}


def use_of(pid: int) -> Used:
    """What a process holds, but its claims of ports: `daruma run` keeps the last 64."""
    proc = Path(f"/proc/{pid}")
    claims = {
        f"socket:[{line.split()[6]}]"
        for line in Path("/proc/net/unix").read_text().splitlines()
        if "@daruma-port-" in line
    }
    open_now = []
    for descriptor in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            open_now.append(str(descriptor.readlink()))
    resident = re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())
    assert resident is not None
    return Used(sum(name not in claims for name in open_now), int(resident[1]))


def guests_of(pid: int) -> dict[str, int]:
    """Process ids of those that live in a server's pod, by member id."""
    found = {}
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    for child in children.split():
        with contextlib.suppress(OSError):
            raw = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace")
            own = dict(pair.partition("=")[::2] for pair in raw.split("\0"))
            if own.get(ENV_HOST_PID) == str(pid):
                index, incarnation = int(own[ENV_INDEX]), int(own[ENV_INCARNATION])
                found[member_id(Role.SERVER, index, incarnation)] = int(child)
    return found


@contextmanager
def storm(
    folder: Path, manifest: str, dice: random.Random, counts: tuple[int, int, int]
) -> Iterator[Storm]:
    """Run a job; `counts`: its servers, workers, and replicas of each server."""
    (folder / "job.yaml").write_text(manifest)
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", "job.yaml", "--out", "out"]
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, text=True
        )
    try:
        yield Storm(folder, run, *counts, dice)
    finally:
        run.kill()
        run.wait()
    end = time.monotonic() + DEADLINE
    while left_by(folder):
        assert time.monotonic() < end, left_by(folder)
        time.sleep(0.05)
