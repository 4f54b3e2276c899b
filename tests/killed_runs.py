"""`daruma run` of a program that waits for a gate, and members killed at a step.

Real processes and the real operator. A killed server's guests, so other servers' replicas, go
with it.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import copies_program
from copies_program import TABLE, WORKERS
from daruma_trainer.bench.members import processes
from daruma_trainer.contract import Role
from left_behind import left_by

DEADLINE = 150.0
STEPS = 60
_MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: copied}}
spec:
  program:
    image: none
    command: [{command}, gate]
  servers: {{replicas: {servers}}}
  workers: {{replicas: 2, minReplicas: {least}}}
  consistency: {{mode: {mode}}}
  recovery: {recovery}
"""
Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True, slots=True)
class Killed:
    """A job, of which every server has so many replicas when the first is killed."""

    recovery: str
    mode: str
    program: Sequence[str]
    servers: int
    replicas: int
    """Of each server, itself counted."""

    def run(self, folder: Path, kills: Sequence[str]) -> tuple[Any, Arrays]:
        """Return the report and the tables of a run whose members are killed so (`--kill`)."""
        folder.mkdir()
        command = ", ".join(json.dumps(word) for word in ["python", *self.program])
        text = _MANIFEST.format(
            command=command, mode=self.mode, servers=self.servers, recovery=self.recovery,
            least=WORKERS if self.mode == "Sync" else 1,
        )  # fmt: skip
        (folder / "job.yaml").write_text(text)
        daruma = [sys.executable, "-m", "daruma_operator.cli.main"]
        orders = [word for kill in kills for word in ("--kill", kill)]
        with (folder / "output").open("w") as output:
            process = subprocess.Popen(
                [*daruma, "run", "job.yaml", "--out", str(folder / "out"), *orders],
                stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            )  # fmt: skip
        try:
            self._until_replicated(folder / "out", process)
            (folder / "gate").touch()
            assert process.wait(DEADLINE) == 0, (folder / "output").read_text()[-6000:]
        finally:
            process.kill()
            process.wait()
        assert left_by(folder) == []
        report = json.loads((folder / "out" / "report.json").read_text())
        result = [*daruma, "export", report["result"]["uri"], "-o", str(folder / "result")]
        subprocess.run(result, check=True, timeout=DEADLINE, capture_output=True)
        return report, load_file(folder / "result")

    def _until_replicated(self, out: Path, process: "subprocess.Popen[bytes]") -> None:
        """Wait until each process counts on the next: what is lost before was promised less."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                servers = [p for p in processes(out) if p.role is Role.SERVER]
                views = [p.view()[1] for p in servers]
                followed = {told.follows for view in views for _, told in view.others.values()}
                heads = {view.own.id for view in views}
                if (
                    len(servers) == self.servers
                    and len(followed - {None}) == self.servers * (self.replicas - 1)
                    and followed >= heads
                ):
                    return
            time.sleep(0.05)
        raise AssertionError("the replicas are not up to date")


def missing(marks: "np.ndarray[Any, Any]", rows: int) -> int:
    """How many batches some row lacks; none may be there twice, or where it does not belong."""
    marks = marks.reshape(TABLE, WORKERS, STEPS)
    assert ((marks == 0) | (marks == 1)).all(), "applied twice"
    found = 0
    for worker in range(WORKERS):
        for batch in range(1, STEPS + 1):
            mine = copies_program.rows_of(worker, batch, rows)
            found += not (marks[mine, worker, batch - 1] == 1).all()
            assert not np.delete(marks[:, worker, batch - 1], mine).any()
    return found
