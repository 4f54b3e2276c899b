"""Members of a job as processes of this machine, found by their environment.

Pods of a cluster whose kubelets run on this machine are such processes too (their environment
is readable for root), so a benchmark can kill them as the kernel would: from outside.
"""

import http.client
import json
import os
import signal
import time
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


def processes(job: str, parent: int) -> list[Process]:
    """Return the running members of a job that are children of process `parent`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            process = _process(folder, job, parent)
            if process is not None:
                found.append(process)
    return sorted(found, key=lambda p: (p.role, p.index))


def _process(folder: Path, job: str, parent: int) -> Process | None:
    try:
        state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        if state == "Z" or int(ppid) != parent:
            return None
        pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        environment = dict(pair.partition("=")[::2] for pair in pairs)
        if environment.get(ENV_JOB) != job:
            return None
        return Process(
            int(folder.name),
            Role(environment[ENV_ROLE]),
            int(environment[ENV_INDEX]),
            int(environment[ENV_INCARNATION]),
            environment[ENV_LISTEN],
            Path(environment[ENV_TOKEN_FILE]).read_text(),
        )
    except (OSError, KeyError, ValueError):
        # It ended while it was looked at, or is between fork and exec.
        return None
