"""A cluster for tests: one of our own in namespaces that vanish, or the one KUBECONFIG names."""

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import parts
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SYSTEM = "daruma-system"
TEST = "daruma.dev/test"
"""Label of the namespaces that tests make."""
START_SECONDS = 300.0
DEADLINE = 120.0
SHARED_SECONDS = 1500.0
API_ADDRESS = "10.245.0.254"
"""Of the control plane of a cluster of our own; pods reach it."""
CGROUPS = Path("/sys/fs/cgroup")


KINDS = {
    "deploy": ("apis/apps/v1", "deployments"),
    "events": ("api/v1", "events"),
    "namespaces": ("api/v1", "namespaces"),
    "nodes": ("api/v1", "nodes"),
    "pods": ("api/v1", "pods"),
    "tj": ("apis/daruma.dev/v1alpha1", "trainingjobs"),
}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(self._path)


class Cluster:
    """Ways to speak to a cluster, and to hurt what runs on it."""

    def __init__(
        self,
        prefix: list[str],
        kubectl: list[str],
        environment: Mapping[str, str],
        folder: Path | None,
        proxy: str = "",
        init: int = 0,
    ) -> None:
        self.prefix = prefix
        """What runs a command where the cluster can be reached."""
        self._kubectl = kubectl
        self._environment = dict(environment)
        self._proxy = proxy
        self.folder = folder
        """Of our own cluster: logs, pids and volumes. None for somebody else's."""
        self._init = init
        """Pid of the first process of our own cluster: all others end with it."""

    def run(
        self,
        *command: str,
        stdin: str | None = None,
        check: bool = True,
        seconds: float = DEADLINE,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command where the cluster can be reached."""
        done = subprocess.run(
            [*self.prefix, *command], input=stdin, env=self._environment, capture_output=True,
            text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to reach it."""
        return {
            "prefix": self.prefix, "kubectl": self._kubectl, "environment": self._environment,
            "folder": None if self.folder is None else str(self.folder), "proxy": self._proxy,
            "init": self._init,
        }  # fmt: skip

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl."""
        return self.run(*self._kubectl, *arguments, stdin=stdin, check=check)

    def helm(self, *arguments: str) -> str:
        """Run Helm."""
        return self.run(str(parts.helm()), *arguments).stdout

    def get(self, kind: str, name: str = "", namespace: str = "", selector: str = "") -> Any:
        """Return an object or a list; None if it is not there."""
        group, plural = KINDS[kind]
        parts = [group, f"namespaces/{namespace}" if namespace else "", plural, name]
        query = f"?labelSelector={quote(selector)}" if selector else ""
        status, text = self._ask("/" + "/".join(filter(None, parts)) + query)
        if status == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise AssertionError(f"GET {kind} {name}: {status} {text}")
        return json.loads(text)

    def raw(self, path: str) -> str:
        """GET a path of the API server; pods and services are behind its proxy."""
        status, text = self._ask(path)
        if status != HTTPStatus.OK:
            raise AssertionError(f"GET {path}: {status} {text}")
        return text

    def _ask(self, path: str) -> tuple[int, str]:
        connection = _UnixConnection(self._proxy)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    @contextmanager
    def proxied(self) -> Iterator["Cluster"]:
        """Run `kubectl proxy`: a kubectl for each question would cost more than all jobs."""
        with tempfile.TemporaryDirectory(prefix="daruma-proxy-") as folder:
            self._proxy = f"{folder}/socket"
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.prefix, *self._kubectl, "proxy",
                 f"--unix-socket={self._proxy}"],
                env=self._environment, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                self.until(Path(self._proxy).exists, "kubectl proxy listens")
                yield self
            finally:
                process.kill()
                process.wait(DEADLINE)

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
            time.sleep(0.5)

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

    def end(self) -> None:
        """Stop all of a cluster of our own; who started it removes what is left."""
        with contextlib.suppress(OSError):  # its owner was killed, and it with it
            environment = Path(f"/proc/{self._init}/environ").read_bytes()
            if f"ROOT={self.folder}/".encode() in environment:
                os.kill(self._init, signal.SIGKILL)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Give the user's cluster, or one of our own for as long as it is needed."""
    if os.environ.get("KUBECONFIG"):
        with Cluster([], ["kubectl"], os.environ, None).proxied() as made:
            yield made
    else:
        with parts.used_store() as store, _own_cluster(store) as made:
            yield made


@contextmanager
def _own_cluster(store: Path) -> Iterator[Cluster]:
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix="daruma-cluster-"))
    (folder / "owner").write_text(str(os.getpid()))
    environment = {
        **os.environ,
        "KUBE": str(parts.kube()),
        "ROOT": str(folder / "root"),
        "STORE": str(store),
        "ADDRESS": API_ADDRESS,
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
        with _reach(process, folder, environment) as made:
            yield made
    finally:
        inside = _inside(process)
        process.kill()
        process.wait(DEADLINE)
        _gone(inside)
        _forget(folder)
        if left := left_by(folder):
            raise AssertionError(f"the cluster left behind: {left}")


@contextmanager
def shared(folder: Path, until_the_end: contextlib.ExitStack) -> Iterator[Cluster]:
    """Give the one cluster of all processes that name this folder.

    The first to come starts it, the last to leave ends it, whoever that is. The first must stay
    for as long (`until_the_end`): what it started ends with it.
    """
    me = folder / "users" / str(os.getpid())
    me.parent.mkdir(exist_ok=True)
    me.touch()
    made = None
    try:
        with locked(folder):
            made = _joined(folder, until_the_end)
        yield made
    finally:
        with locked(folder):
            try:
                if made is not None and _users(folder) == [me.name]:
                    _end(made, folder)
            finally:
                me.unlink()


def _joined(folder: Path, until_the_end: contextlib.ExitStack) -> Cluster:
    note = folder / "cluster.json"
    if note.exists():
        raw = json.loads(note.read_text())
        raw["folder"] = raw["folder"] and Path(raw["folder"])
        return Cluster(**raw)
    made = until_the_end.enter_context(cluster())
    until_the_end.callback(
        made.until, lambda: not _users(folder), "the others are done", SHARED_SECONDS
    )
    note.write_text(json.dumps(made.to_json()))
    return made


def _end(made: Cluster, folder: Path) -> None:
    installed = (folder / "installed").exists()
    for file in ("cluster.json", "installed"):
        (folder / file).unlink(missing_ok=True)
    try:
        made.until(lambda: not made.get("namespaces", selector=TEST)["items"],
                   "the tests' namespaces are gone")  # fmt: skip
        if installed:
            uninstall(made)
    finally:
        made.end()


def installed(made: Cluster, folder: Path) -> Cluster:
    """Install the operator, unless another process that shares the cluster has."""
    with locked(folder):
        if not (folder / "installed").exists():
            install(made)
            (folder / "installed").touch()
    return made


def install(made: Cluster) -> None:
    """Install the operator by the real Helm from the chart."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": labels}}
    )
    try:
        made.helm(
            "upgrade", "--install", "daruma", str(ROOT / "charts/daruma"), "--namespace", SYSTEM,
            "--wait", "--timeout", "110s",
        )  # fmt: skip
    except AssertionError as error:
        select = ("-n", SYSTEM, "-l", "app.kubernetes.io/name=daruma-operator")
        for command in (("get", "pods", *select), ("logs", "--tail", "30", *select)):
            said = made.kubectl(*command, check=False)
            error.add_note(said.stdout + said.stderr)
        raise


def uninstall(made: Cluster) -> None:
    """Remove it; nothing of it may hang."""
    made.helm("uninstall", "daruma", "--namespace", SYSTEM, "--wait", "--timeout", "110s")


@contextmanager
def locked(folder: Path, name: str = "lock", *, shared: bool = False) -> Iterator[None]:
    """Keep the other processes of this test run out; `shared`: only those that are not."""
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def operator_away(folder: Path) -> Iterator[None]:
    """Do to the operator what `operator_stays` of other processes must not see."""
    with locked(folder, "operator.lock"):
        yield


@contextmanager
def operator_stays(folder: Path) -> Iterator[None]:
    """What a job learns while a server is away is not measured while the operator is, too."""
    with locked(folder, "operator.lock", shared=True):
        yield


def _users(folder: Path) -> list[str]:
    """Return processes that use a shared cluster; one that was killed does not any more."""
    pids = [user.name for user in (folder / "users").iterdir()]
    return [pid for pid in pids if _runs(pid)]


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def left_by(folder: Path) -> list[str]:
    """Return what is left of a cluster on this machine: processes, mounts, cgroups."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"ROOT={folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [mount for mount in mounts if folder.name in mount]
    found += [str(group) for group in CGROUPS.glob(f"**/{folder.name}*")]
    return found + [str(f) for f in [folder] if f.exists()]


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


@contextmanager
def _reach(
    process: "subprocess.Popen[bytes]", folder: Path, environment: Mapping[str, str]
) -> Iterator[Cluster]:
    end = time.monotonic() + START_SECONDS
    while not (folder / "ready").exists():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the cluster did not come up: {(folder / 'up.log').read_text()}")
        time.sleep(0.1)
    init = _inside(process)[0]
    prefix = ["nsenter", "--target", init, "--mount", "--net", "--pid", "--"]
    kubectl = [environment["KUBE"], "kubectl", "--kubeconfig", f"{folder}/root/admin.kubeconfig"]
    reach = {**environment, "KUBECONFIG": f"{folder}/root/admin.kubeconfig"}
    reach["KUBECTL"] = " ".join(kubectl)
    with Cluster(prefix, kubectl, reach, folder, init=int(init)).proxied() as made:
        made.until(lambda: _ready_nodes(made) == 2, "two nodes are Ready")
        yield made


def _ready_nodes(made: Cluster) -> int:
    """Count nodes that are Ready."""
    conditions = [n["status"].get("conditions", []) for n in made.get("nodes")["items"]]
    return sum(any((c["type"], c["status"]) == ("Ready", "True") for c in n) for n in conditions)


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
