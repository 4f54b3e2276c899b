"""A server whose loop hangs while its process lives: its agent answers, its connections stand."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import softmax

pytestmark = pytest.mark.faults
DEADLINE = 120.0
MANIFEST = f"""\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: toy}}
spec:
  program:
    image: none
    command: [python, {softmax.__file__}, "400", digits, "0.5", "10"]
  servers: {{replicas: SERVERS}}
  workers: {{replicas: 2}}
  recovery: {{timeouts: {{hungSeconds: 3}}}}
"""
SITE = """\
import os, signal, time

def hang(*_):
    if os.environ.get("DARUMA_INDEX") == "0":
        time.sleep(1000)

signal.signal(signal.SIGUSR1, hang)
"""
"""Signals are handled on the main thread, which is the serve loop's."""


def servers_of(host: int) -> list[int]:
    """Processes of servers that `daruma run` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, name, rest = re.split(r" \(|\) ", stat.read_text(), maxsplit=2)
        except OSError:
            continue  # gone meanwhile
        if name == "daruma-server" and int(rest.split()[1]) == host:
            found.append(int(pid))
    return found


@pytest.mark.parametrize("servers", [1, 2])
def test_a_server_that_hangs_is_replaced(tmp_path: Path, servers: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "toy.yaml").write_text(MANIFEST.replace("SERVERS", str(servers)))
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", "toy.yaml", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment
        )
    try:
        end = time.monotonic() + DEADLINE
        while "Running" not in (said := (tmp_path / "output").read_text()):
            assert time.monotonic() < end, said
            time.sleep(0.05)
        pids = servers_of(process.pid)
        assert len(pids) == servers
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(DEADLINE) == 0, (tmp_path / "output").read_text()
    finally:
        process.kill()
        process.wait()
    assert "was lost (Hung)" in (tmp_path / "output").read_text()
    (record,) = json.loads((tmp_path / "out" / "report.json").read_text())["recoveries"]
    assert (record["outcome"], record["indexes"]) == ("Succeeded", [0])
