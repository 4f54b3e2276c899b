"""`daruma run` of what cannot run: exit codes, one clear message, no traceback, nothing left."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from left_behind import left_by

pytestmark = pytest.mark.faults
DEADLINE = 60.0
GOOD = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec:
  program: {image: none, command: [COMMAND], args: [-c, "SCRIPT"]}
  checkpoint: {every: 0}
  runPolicy: {backoffLimit: 1}
"""


def manifest(folder: Path, command: str = "python", script: str = "pass") -> Path:
    path = folder / "job.yaml"
    path.write_text(GOOD.replace("COMMAND", command).replace("SCRIPT", script))
    return path


def daruma(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "daruma_operator.cli.main", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert left_by(folder) == []
    return done


def one_message(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("daruma: ")]
    assert len(messages) == 1, done.stderr
    for part in parts:
        assert re.search(part, messages[0]), messages[0]


def test_a_missing_file(tmp_path: Path) -> None:
    one_message(daruma(tmp_path, "run", "nothing.yaml"), 2, "nothing.yaml", "No such file")


def test_bad_yaml(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("kind: [TrainingJob\nspec: }")
    one_message(daruma(tmp_path, "run", "job.yaml"), 2, "not YAML", "line 2")


def test_an_unknown_field(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    path.write_text(path.read_text() + "  sevrers: {replicas: 2}\n")
    one_message(daruma(tmp_path, "run", str(path)), 2, r"spec\.sevrers", "no such field")


def test_a_program_that_is_not_found(tmp_path: Path) -> None:
    path = manifest(tmp_path, command="no-such-program")
    one_message(daruma(tmp_path, "run", str(path)), 3, "no-such-program", "install it")


def test_a_name_that_would_leave_the_folder(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    path.write_text(path.read_text().replace("name: toy", "name: ../../toy"))
    one_message(daruma(tmp_path, "run", str(path)), 2, r"metadata\.name", "lower-case")


def test_an_unknown_strategy(tmp_path: Path) -> None:
    done = daruma(tmp_path, "run", str(manifest(tmp_path)), "--strategy", "Hope")
    one_message(done, 2, "--strategy Hope", "Freshest")


def test_a_kill_of_nobody(tmp_path: Path) -> None:
    done = daruma(tmp_path, "run", str(manifest(tmp_path)), "--kill", "server-7@step=5")
    one_message(done, 2, "server-7", "has 1 servers")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = daruma(tmp_path, "run", str(manifest(tmp_path)), "--ports", str(port))
    one_message(done, 3, f"port {port}", "--ports")


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    done = daruma(tmp_path, "run", str(manifest(tmp_path)), "--out", "out")
    one_message(done, 3, "--out out", "cannot be written")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_no_space_left(tmp_path: Path, full_disk: Path) -> None:
    done = daruma(tmp_path, "run", str(manifest(tmp_path)), "--out", str(full_disk / "out"))
    one_message(done, 3, "no space is left")


def test_a_program_that_exits_with_3(tmp_path: Path) -> None:
    path = manifest(tmp_path, script="import sys; print('install a library'); sys.exit(3)")
    one_message(daruma(tmp_path, "run", str(path)), 1, "the job failed", "logs")


def test_a_program_that_refuses_its_arguments_fails_the_job_at_once(tmp_path: Path) -> None:
    path = manifest(tmp_path, script="import sys; print('bad --lr'); sys.exit(2)")
    one_message(daruma(tmp_path, "run", str(path)), 1, "bad --lr")
