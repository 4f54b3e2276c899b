"""Where a benchmark's job runs: members as processes under `daruma run`."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import START_SECONDS, STEPS, BenchError, replicas_of, trains
from daruma_trainer.bench.members import Process, processes

WORKERS = 2
JOB = "bench-recovery"
MANIFEST = f"""\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: {JOB}}}
spec:
  program:
    image: none
    command: [python, -m, daruma_trainer.programs.mlr]
    args: [--steps, "1000000", --think-ms, "5"]
  servers: {{replicas: 4}}
  workers: {{replicas: {WORKERS}}}
  checkpoint: {{store: "file:///bench", every: 96, fraction: 0.125}}
  recovery: %s
  runPolicy: {{backoffLimit: 100}}
"""


RECOVERY: Mapping[str, Mapping[str, Any]] = {
    "Replace": {"strategy": "Freshest"},
    "Adopt": {"strategy": "Freshest", "placement": "Adopt"},
    "Copies": {"strategy": "Freshest", "copies": 2},
    "Chain": {"strategy": "Chain", "chain": {"replicas": 3, "ack": "Next"}},
}
"""By the name of a way to recover, spec.recovery."""
DARUMA_RUN = ("daruma_operator.cli.main", "run")
HELD_RUN = ("daruma_trainer.bench.holding",)
"""`daruma run` whose members can be held away."""


class LocalRun:
    """`daruma run`, from its start to SIGINT."""

    def __init__(
        self, manifest: str, workers: int, steps: int, command: Sequence[str] = DARUMA_RUN
    ) -> None:
        """`steps`: so many are made by each worker before it counts as running."""
        self._manifest, self._workers, self._steps = manifest, workers, steps
        self._command = command
        self.out = Path()
        self._records: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See Arena."""
        with tempfile.TemporaryDirectory(prefix="daruma-bench-") as folder:
            self.out = out = Path(folder) / "run"
            with self._started(Path(folder), out) as run:
                self._until_trained(run)
                yield
            self._records = json.loads((out / "report.json").read_text())["recoveries"]

    def members(self) -> list[Process]:
        """See Arena."""
        return processes(self.out)

    def records(self) -> list[dict[str, Any]]:
        """See Arena."""
        return self._records

    @contextlib.contextmanager
    def _started(self, folder: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
        manifest = folder / "job.yaml"
        manifest.write_text(self._manifest)
        command = [sys.executable, "-m", *self._command, str(manifest)]
        with (folder / "output").open("wb") as output:
            run = subprocess.Popen(
                [*command, "--out", str(out)],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
            )
        try:
            yield run
            run.send_signal(signal.SIGINT)
            run.wait(60.0)
        except subprocess.TimeoutExpired as error:
            raise BenchError("`daruma run` did not end after SIGINT") from error
        except BenchError as error:
            raise BenchError(f"{error}\n{(folder / 'output').read_text()[-2000:]}") from error
        finally:
            run.kill()
            run.wait()

    def _until_trained(self, run: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if run.poll() is not None:
                raise BenchError(f"`daruma run` ended with {run.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if trains(self.members(), self._workers, self._steps):
                    return
            time.sleep(0.1)
        raise BenchError(f"the job did not train within {START_SECONDS:.0f} s")


class LocalArena(LocalRun):
    """The job whose servers are killed."""

    where = "a server's process under `daruma run`"

    def __init__(self, placement: str) -> None:
        super().__init__(MANIFEST % json.dumps(RECOVERY[placement]), WORKERS, STEPS)
        self.placement = placement
        self.replicas = replicas_of(RECOVERY[placement])
