"""A cluster for tests: one of our own in namespaces that vanish, or the one KUBECONFIG names."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parts
import yaml

HERE = Path(__file__).resolve().parent
START_SECONDS = 300.0
DEADLINE = 120.0
CGROUPS = Path("/sys/fs/cgroup")


class Cluster:
    """Ways to speak to a cluster, and to hurt what runs on it."""

    def __init__(
        self,
        prefix: list[str],
        kubectl: list[str],
        environment: Mapping[str, str],
        folder: Path | None,
    ) -> None:
        self._prefix = prefix
        self._kubectl = kubectl
        self._environment = dict(environment)
        self.folder = folder
        """Of our own cluster: logs, pids and volumes. None for somebody else's."""

    def run(
        self, *command: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command where the cluster can be reached."""
        done = subprocess.run(
            [*self._prefix, *command], input=stdin, env=self._environment, capture_output=True,
            text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl."""
        return self.run(*self._kubectl, *arguments, stdin=stdin, check=check)

    def helm(self, *arguments: str) -> str:
        """Run Helm."""
        return self.run(str(parts.helm()), *arguments).stdout

    def get(self, *arguments: str) -> Any:
        """Return an object or a list; None if it is not there."""
        done = self.kubectl("get", *arguments, "-o", "json", check=False)
        if done.returncode:
            if "NotFound" in done.stderr:
                return None
            raise AssertionError(done.stderr)
        return json.loads(done.stdout)

    def raw(self, path: str) -> str:
        """GET a path of the API server; pods and services are behind its proxy."""
        return self.kubectl("get", "--raw", path).stdout

    def apply(
        self, *documents: Mapping[str, Any], check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Apply objects."""
        return self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents), check=check)

    def until(self, true: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
        """Wait with a deadline until something is truthy, and return it."""
        end = time.monotonic() + seconds
        while True:
            found = true()
            if found:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.2)

    def pids(self, **labels: str) -> list[int]:
        """Find the processes of a member by its environment: JOB, ROLE, INDEX, INCARNATION, …"""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (
                    (process / "environ").read_bytes().decode(errors="replace").split("\0")
                )
            except OSError:
                continue
            if all(f"DARUMA_{name}={value}" in environment for name, value in labels.items()):
                found.append(int(process.name))
        return sorted(found)

    def kill(self, number: int = signal.SIGKILL, **labels: str) -> int:
        """Signal the main process of a container; returns its pid."""
        pids = self.pids(**labels)
        if not pids:
            raise AssertionError(f"no process of {labels}")
        os.kill(pids[0], number)
        return pids[0]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Give the user's cluster, or one of our own for as long as it is needed."""
    if os.environ.get("KUBECONFIG"):
        yield Cluster([], ["kubectl"], os.environ, None)
        return
    store = parts.store()
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix="daruma-cluster-"))
    (folder / "owner").write_text(str(os.getpid()))
    environment = {
        **os.environ,
        "KUBE": str(parts.kube()),
        "ROOT": str(folder / "root"),
        "STORE": str(store),
    }
    hold = f"touch {folder}/ready; exec sleep infinity"
    with (folder / "up.log").open("wb") as log:
        # Whatever becomes of this process, the cluster goes with it.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork",
             "--kill-child", "--mount-proc", sys.executable, str(HERE / "up.py"), "sh", "-c", hold],
            env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield _reach(process, folder, environment)
    finally:
        inside = _inside(process)
        process.kill()
        process.wait(DEADLINE)
        _gone(inside)
        _forget(folder)


def _inside(process: "subprocess.Popen[bytes]") -> list[str]:
    """Return the pid of the first process in the namespaces; it takes all others with it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return children.read_text().split()[:1] if children.exists() else []


def _gone(pids: list[str]) -> None:
    end = time.monotonic() + DEADLINE
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            raise AssertionError(f"processes of the cluster are left: {pids}")
        time.sleep(0.05)


def _reach(
    process: "subprocess.Popen[bytes]", folder: Path, environment: Mapping[str, str]
) -> Cluster:
    end = time.monotonic() + START_SECONDS
    while not (folder / "ready").exists():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the cluster did not come up: {(folder / 'up.log').read_text()}")
        time.sleep(0.1)
    prefix = ["nsenter", "--target", _inside(process)[0], "--mount", "--net", "--pid", "--"]
    kubectl = [environment["KUBE"], "kubectl", "--kubeconfig", f"{folder}/root/admin.kubeconfig"]
    reach = {**environment, "KUBECONFIG": f"{folder}/root/admin.kubeconfig"}
    made = Cluster(prefix, kubectl, reach, folder)

    def nodes() -> bool:
        ready = [
            condition["status"] == "True"
            for node in made.get("nodes")["items"]
            for condition in node["status"].get("conditions", [])
            if condition["type"] == "Ready"
        ]
        return len(ready) == 2 and all(ready)

    made.until(nodes, "two nodes are Ready")
    return made


def _sweep() -> None:
    """Remove what test runs left that were killed themselves: their clusters died with them."""
    for folder in Path(tempfile.gettempdir()).glob("daruma-cluster-*"):
        owner = folder / "owner"
        if owner.exists() and not Path(f"/proc/{owner.read_text()}").exists():
            _forget(folder)


def _forget(folder: Path) -> None:
    """Remove what lies outside the namespaces: the scratch folder, and the nodes' cgroups."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in (f"{folder.name}-node*", f"*/{folder.name}-node*"):
        for top in CGROUPS.glob(pattern):
            for group in sorted([top, *top.glob("**/")], key=lambda p: -len(p.parts)):
                try:
                    group.rmdir()
                except OSError:
                    continue
