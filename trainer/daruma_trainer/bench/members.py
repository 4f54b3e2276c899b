"""Members of a job as processes of this machine, found by their environment.

Pods of a cluster whose kubelets run on this machine are such processes too (their environment
is readable for root), so a benchmark can kill them as the kernel would: from outside.
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
    ENV_LISTEN,
    ENV_ROLE,
    ENV_TOKEN_FILE,
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


def processes(job: str, parent: int | None = None, pods: Pods | None = None) -> list[Process]:
    """Return the running members of a job.

    `parent`: only children of this process. `pods`: what processes in containers cannot tell; of
    several processes of one member only the first is taken.
    """
    found: dict[str, Process] = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda f: int(f.name)):
        process = _process(folder, job, parent, pods)
        if process is not None:
            found.setdefault(process.id, process)
    return sorted(found.values(), key=lambda p: (p.role, p.index))


def _process(folder: Path, job: str, parent: int | None, pods: Pods | None) -> Process | None:
    try:
        state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        if state == "Z" or parent not in (None, int(ppid)):
            return None
        pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        environment = dict(pair.partition("=")[::2] for pair in pairs)
        if environment.get(ENV_JOB) != job:
            return None
        role, index = Role(environment[ENV_ROLE]), int(environment[ENV_INDEX])
        incarnation = int(environment[ENV_INCARNATION])
        if pods is not None:
            address, token = pods.addresses[member_id(role, index, incarnation)], pods.token
        else:
            address = environment[ENV_LISTEN]
            token = Path(environment[ENV_TOKEN_FILE]).read_text().strip()
        return Process(int(folder.name), role, index, incarnation, address, token)
    except (OSError, KeyError, ValueError):
        # It ended while it was looked at, is between fork and exec, or is no member that counts.
        return None
