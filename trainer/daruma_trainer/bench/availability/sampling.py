"""What is looked at while a job runs: memory of its processes, and what servers count."""

import contextlib
import http.client
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from daruma_trainer.bench.members import Process, processes
from daruma_trainer.contract import ContractError, Role, agent_address

_BYTES = re.compile(r"^daruma_(\w+)_bytes_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_RESIDENT = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)
SCRAPE_SECONDS = 1.0


@dataclass(slots=True)
class Sampler:
    """Keeps what it saw. Call `look` every now and then, and `scrape` before a member is killed."""

    out: Path
    memory: list[tuple[float, str, int]] = field(default_factory=list)
    """(monotonic seconds, member, resident bytes): with what lives in its pod, as replicas do."""
    bytes: dict[str, float] = field(default_factory=dict)
    """Every counter of bytes that servers have, all incarnations and replicas together."""
    _last: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """What each said last, by id."""
    _next: float = 0.0

    def look(self) -> None:
        """Take the memory of all members, and now and then the counters."""
        now = time.monotonic()
        members = processes(self.out)
        self.memory += [(now, m.id, size) for m in members if (size := resident(m.pid))]
        if now >= self._next:
            self._next = now + SCRAPE_SECONDS
            self.scrape(members)

    def scrape(self, members: list[Process] | None = None) -> None:
        """Ask the servers for their counters; who cannot be asked is left out."""
        for member in processes(self.out) if members is None else members:
            if member.role is Role.SERVER:
                for id_, address in _servers_of(member):
                    url = f"http://{agent_address(address)}/metrics"
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        self.count(id_, byte_counters(_get(url)))

    def count(self, id_: str, counters: Mapping[str, float]) -> None:
        """Add what came to one's counters since it was last asked; one may begin again at 0."""
        before = self._last.get(id_, {})
        for name, value in counters.items():
            last = before.get(name, 0.0)
            self.bytes[name] = self.bytes.get(name, 0.0) + value - (last if value >= last else 0.0)
        self._last[id_] = counters


def _servers_of(member: Process) -> Iterator[tuple[str, str]]:
    """Name a server and those in its pod (replicas, adopted ones), with their addresses."""
    yield member.id, member.address
    with contextlib.suppress(OSError, http.client.HTTPException, ContractError, ValueError):
        for guest in member.view()[1].own.guests:
            yield guest.id, guest.address


def _get(url: str) -> str:
    with urlopen(url, timeout=1.0) as answer:  # noqa: S310 - our own server
        return str(answer.read().decode())


def byte_counters(text: str) -> dict[str, float]:
    """Read `daruma_X_bytes_total` of an exposition, by X."""
    total: dict[str, float] = {}
    for name, value in _BYTES.findall(text):
        total[name] = total.get(name, 0.0) + float(value)
    return total


def resident(pid: int) -> int:
    """Return the resident bytes of a process and of those that it started; 0: it has ended."""
    try:
        found = _RESIDENT.search(Path(f"/proc/{pid}/status").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = int(found[1]) * 1024 if found else 0
    return own + sum(resident(int(child)) for child in children)
