"""What the test cluster is made of, built once and cached: programs, base images, our images.

Each thing has a folder in the cache named by the hash of what it is made from, so a change builds
anew and nothing else does. The cache is `$DARUMA_CACHE`, or `~/.cache/daruma`.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
HELM = "helm.sh/helm/v3/cmd/helm@v3.19.0"
KUBERNETES = "v1.34.4"
VERSION = "0.1.0"
IMAGES = ("operator", "server", "worker")
COPIED = re.compile(r"trainer/daruma_trainer/\w+\.py")
"""The few files of the trainer that the operator's Dockerfile names."""
_BUILD_SECONDS = 2400
_TELL_SECONDS = 60.0
_AGAIN = 5
_BUILDAH = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}


def missing() -> str | None:
    """Say what this machine lacks for a cluster, or None."""
    if os.geteuid() != 0:
        return "a cluster of our own needs root"
    for program in (
        "unshare",
        "nsenter",
        "containerd",
        "runc",
        "iptables",
        "buildah",
        "mmdebstrap",
    ):
        if shutil.which(program) is None:
            return f"no {program}: run `make machine` as root"
    if shutil.which("go") is None:
        return "no Go to build Kubernetes with: install Go 1.24 or newer"
    return None


def cache() -> Path:
    """Return the cache's folder."""
    return Path(os.environ.get("DARUMA_CACHE", str(Path.home() / ".cache" / "daruma")))


def kube() -> Path:
    """Return the binary with every Kubernetes component; ten minutes and more the first time."""

    def build(folder: Path) -> None:
        for name in ("go.mod", "go.sum", "main.go"):
            shutil.copy(HERE / name, folder)
        flags = f"-X k8s.io/component-base/version.gitVersion={KUBERNETES}"
        flags += " -X k8s.io/component-base/version.gitMajor=1"
        flags += " -X k8s.io/component-base/version.gitMinor=34"
        _run(
            ["go", "build", "-trimpath", "-ldflags", f"-s -w {flags}", "-o", "kube", "."],
            cwd=folder,
            env={**os.environ, "GOFLAGS": "-mod=mod"},
        )

    inputs = [(HERE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go")]
    return _made("kube", inputs, build) / "kube"


def helm() -> Path:
    """Return the real Helm; about 2 minutes the first time."""

    def build(folder: Path) -> None:
        # With -trimpath as above: what both have in common is compiled once.
        _run(
            ["go", "install", "-trimpath", HELM],
            cwd=folder,
            env={**os.environ, "GOBIN": str(folder)},
        )

    return _made("helm", [HELM.encode()], build) / "helm"


def pause() -> Path:
    """Return the pause image's archive."""

    def build(folder: Path) -> None:
        _run(["gcc", "-Os", "-static", "-o", "pause", str(HERE / "pause.c")], cwd=folder)
        (folder / "Dockerfile").write_text(
            'FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause"]\n'
        )
        _image(folder / "Dockerfile", "daruma.dev/pause:1", folder, folder / "image.tar", {})

    return _made("pause", [(HERE / "pause.c").read_bytes()], build) / "image.tar"


def base(*packages: str) -> str:
    """Return the name of a Debian image with these packages; about a minute the first time."""
    include = ",".join(("ca-certificates", "python3", "python3-pip", *packages))

    def build(folder: Path) -> None:
        tree = folder / "base.tar"
        _run(
            [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={include}",
                "bookworm",
                str(tree),
            ]
        )

    folder = _made("base", [include.encode()], build)
    name = f"localhost/daruma-base:{folder.name}"
    found = subprocess.run(
        ["buildah", "inspect", "--type", "image", name],
        env=_BUILDAH,
        capture_output=True,
        check=False,
    )
    if found.returncode:
        (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        _run(["buildah", "bud", "--quiet", "-t", name, str(folder)], env=_BUILDAH)
    return name


def images() -> list[Path]:
    """Return the archives of our images, in the order of IMAGES."""
    return [_our_image(name) for name in IMAGES]


def store() -> Path:
    """Return a root folder of containerd with our images, unpacked once for all nodes."""
    archives = [pause(), *images()]

    def build(folder: Path) -> None:
        # From the one before: layers that did not change need not be unpacked again.
        whole = [p for p in (cache() / "store").glob("*/root") if not p.parent.suffix]
        before = max(whole, key=_changed, default=None)
        if before is not None:
            _link(before, folder / "root")
        script = 'containerd --root "$1" --state "$2/state" --address "$2/sock" 2> "$2/log" & '
        script += 'until ctr -a "$2/sock" version > /dev/null 2>&1; do sleep 0.1; done; '
        script += 'for tar in "${@:3}"; do '
        # Again: what an image of before leaves is collected meanwhile, and at times a layer that is
        # being unpacked with it ("parent snapshot … does not exist").
        script += "for n in 1 2 3; do "
        script += 'ctr -a "$2/sock" -n k8s.io images import "$tar" && continue 2; done; exit 1; '
        script += "done; "
        script += "kill %1; wait %1 || true"
        with tempfile.TemporaryDirectory(prefix="daruma-store-") as scratch:
            # In namespaces of its own, so that no mount and no process can be left behind.
            _run(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-m", "-c", script, "bash", str(folder / "root"), scratch,
                 *map(str, archives)]
            )  # fmt: skip

    return _made("store", [str(archive).encode() for archive in archives], build) / "root"


@contextmanager
def used_store() -> Iterator[Path]:
    """Give the store to nodes that link its layers; it is not removed before the block ends."""
    for _ in range(_AGAIN):
        found = store()
        held = _lock(found.parent, fcntl.LOCK_SH)
        if held is not None:
            break
    else:
        raise RuntimeError(f"{found}: others removed it {_AGAIN} times")
    try:
        yield found
    finally:
        os.close(held)


def _lock(folder: Path, how: int) -> int | None:
    """Lock a folder until what is returned is closed; None: it is gone, or in use (LOCK_NB)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, how)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def _changed(path: Path) -> float:
    return path.parent.stat().st_mtime


def _link(store: Path, target: Path) -> None:
    """Copy a store by links; its databases alone are written in place and really copied."""
    _run(["cp", "-al", str(store), str(target)])
    for database in [*target.glob("*/*.db"), *target.glob("*.db")]:
        database.unlink()
        shutil.copy2(store / database.relative_to(target), database)


def tag(name: str) -> str:
    """Name one of our images as the charts and examples do."""
    return f"daruma.dev/{name}:{VERSION}"


def _our_image(name: str) -> Path:
    half = "operator" if name == "operator" else "trainer"
    extra = {"operator": "operator", "server": "server", "worker": "wire"}[name]
    dockerfile = ROOT / half / "Dockerfile"
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", dockerfile]
    sources += sorted((ROOT / "scripts").glob("*.py"))
    if half == "operator":
        sources += sorted((ROOT / "operator/daruma_operator").rglob("*.py"))
        sources += [ROOT / n for n in COPIED.findall(dockerfile.read_text())]
    else:
        sources += sorted((ROOT / "trainer/daruma_trainer").rglob("*.py"))
    wheels = _wheels(extra)

    def build(folder: Path) -> None:
        context = folder / "context"
        context.mkdir()
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "operator", "trainer", "scripts"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        for file in [*listed, "pyproject.toml", "constraints.txt"]:
            if (ROOT / file).exists():
                (context / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, context / file)
        arguments = {
            "BASE_IMAGE": base("python3-torch") if name == "worker" else base(),
            "PIP_OPTIONS": "--no-index --find-links=/wheels",
            "EXTRA": extra,
        }
        _image(
            context / half / "Dockerfile",
            tag(name),
            context,
            folder / "image.tar",
            arguments,
            f"{wheels}:/wheels:ro",
        )
        shutil.rmtree(context)

    inputs = [str(p.relative_to(ROOT)).encode() + p.read_bytes() for p in sources]
    return _made(name, inputs, build) / "image.tar"


def _wheels(extra: str) -> Path:
    """Download the wheels of an extra once: images are built without a network."""
    needed = subprocess.run(
        [sys.executable, str(ROOT / "scripts/requirements.py"), extra],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    def build(folder: Path) -> None:
        (folder / "requirements.txt").write_text(needed)
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:",
             "--python-version", "3.11", "--dest", str(folder / "wheels"),
             "--constraint", str(ROOT / "constraints.txt"), "--requirement", "requirements.txt"],
            cwd=folder,
        )  # fmt: skip

    inputs = [needed.encode(), (ROOT / "constraints.txt").read_bytes()]
    return _made("wheels", inputs, build) / "wheels"


def _image(
    dockerfile: Path,
    name: str,
    context: Path,
    archive: Path,
    arguments: dict[str, str],
    *volumes: str,
) -> None:
    options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    options += [f"--volume={volume}" for volume in volumes]
    _run(
        [
            "buildah",
            "bud",
            "--quiet",
            "--layers",
            *options,
            "-t",
            name,
            "-f",
            str(dockerfile),
            str(context),
        ],
        env=_BUILDAH,
    )
    _run(["buildah", "push", "--quiet", name, f"docker-archive:{archive}:{name}"], env=_BUILDAH)


def _made(name: str, inputs: Iterable[bytes], build: Callable[[Path], None]) -> Path:
    """Return the folder of something, building it unless it is there whole."""
    digest = hashlib.sha256()
    for part in inputs:
        digest.update(hashlib.sha256(part).digest())
    folder = cache() / name / digest.hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        sys.stderr.write(f"daruma: building {name} (cached in {folder})\n")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with _patience(name):
            build(partial)
        # Older ones of the same name will not be asked for again, but for bases and wheels.
        if name in (*IMAGES, "store"):
            for old in folder.parent.glob("[0-9a-f]*"):
                if old not in (partial, folder):
                    _remove_unused(old)
        partial.rename(folder)
    return folder


def _remove_unused(folder: Path) -> None:
    held = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if held is not None:
        # What could be removed in part alone shall not be taken for something whole.
        removed = folder.with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        if folder.exists():
            folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
        os.close(held)


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """Say every minute that something is still being built."""
    built, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not built.wait(_TELL_SECONDS):
            minutes = (time.monotonic() - started) / 60
            sys.stderr.write(f"daruma: still building {name}, after {minutes:.0f} min\n")

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        built.set()


def _run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-8000:])
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {done.returncode}")


def main() -> int:
    """Build everything; with `images`, only these, and print their archives."""
    if sys.argv[1:] == ["images"]:
        for archive in (pause(), *images()):
            sys.stdout.write(f"{archive}\n")
    elif not os.environ.get("KUBECONFIG") and missing() is None:
        # The compiler takes all cores; images wait for the network most of the time.
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(lambda build: build(), (_programs, store)):
                pass
    return 0


def _programs() -> Path:
    kube()
    return helm()


if __name__ == "__main__":
    sys.exit(main())
