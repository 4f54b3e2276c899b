"""Members of a job as processes of this machine: those of `daruma run`, which lists them, and pods
of a cluster whose kubelets run here, found by their environment (readable for root). So a
benchmark can kill them as the kernel would: from outside.
"""

import http.client
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from daruma_trainer.contract import (
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_JOB,
    ENV_ROLE,
    Role,
    View,
    agent_address,
    member_id,
)


@dataclass(frozen=True, slots=True)
class Process:
    """One member that runs."""

    pid: int
    role: Role
    index: int
    incarnation: int
    address: str
    token: str

    @property
    def id(self) -> str:
        """Name as in views."""
        return member_id(self.role, self.index, self.incarnation)

    def kill(self) -> float:
        """SIGKILL it; returns the monotonic time just before."""
        now = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        return now

    def view(self, after: int = 0, wait: float = 0.0) -> tuple[float, View]:
        """Ask its agent; returns the monotonic time of the answer's arrival, and the answer.

        Raises OSError or http.client.HTTPException if it cannot be asked.
        """
        host, _, port = agent_address(self.address).rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=wait + 5.0)
        try:
            connection.request(
                "GET",
                f"/v1/view?after={after}&wait={wait}",
                headers={"Authorization": f"Bearer {self.token}"},
            )
            body = connection.getresponse().read()
            return time.monotonic(), View.from_json(json.loads(body))
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Pods:
    """What Kubernetes knows of members."""

    addresses: Mapping[str, str]
    """`host:port` of the data port by member id, of those that count."""
    token: str


def processes(out: Path) -> list[Process]:
    """Return the running members of the `daruma run` with this `--out`."""
    try:
        token = (out / "token").read_text().strip()
        found = [
            Process(m["pid"], Role(m["role"]), m["index"], m["incarnation"], m["address"], token)
            for m in json.loads((out / "members.json").read_text())
        ]
    except FileNotFoundError:
        return []  # it has not begun, or has ended
    return sorted(found, key=lambda p: (p.role, p.index))


def containers(job: str, pods: Pods) -> list[Process]:
    """Return the members of a job in containers of this machine.

    Of several processes of one member only the first is taken.
    """
    found: dict[str, Process] = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda f: int(f.name)):
        process = _process(folder, job, pods)
        if process is not None:
            found.setdefault(process.id, process)
    return sorted(found.values(), key=lambda p: (p.role, p.index))


def _process(folder: Path, job: str, pods: Pods) -> Process | None:
    try:
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        environment = dict(pair.partition("=")[::2] for pair in pairs)
        if state == "Z" or environment.get(ENV_JOB) != job:
            return None
        role, index = Role(environment[ENV_ROLE]), int(environment[ENV_INDEX])
        incarnation = int(environment[ENV_INCARNATION])
        address = pods.addresses[member_id(role, index, incarnation)]
        return Process(int(folder.name), role, index, incarnation, address, pods.token)
    except (OSError, KeyError, ValueError):
        # It ended while it was looked at, is between fork and exec, or is no member that counts.
        return None
