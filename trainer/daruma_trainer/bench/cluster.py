"""Where a benchmark's job runs: pods of the cluster that KUBECONFIG names.

Its kubelets must run on this machine (kind's do): a container is killed as the kernel would, by a
signal to its process, which asks for root. Pods' addresses must be reachable from here.
"""

import base64
import contextlib
import http.client
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import (
    START_SECONDS,
    BenchError,
    placement_of,
    replicas_of,
    trains,
)
from daruma_trainer.bench.members import Pods, Process, containers
from daruma_trainer.contract import Role, member_id

KUBECTL_SECONDS = 60.0


class ClusterArena:
    """One TrainingJob, given as a manifest whose program does not end by itself."""

    where = "a server's container on Kubernetes"

    def __init__(self, manifest: Path) -> None:
        """Take the job from a file. BenchError: it is no TrainingJob."""
        self._manifest = manifest
        try:
            made = json.loads(self._kubectl("create", "--dry-run=client", "-f", str(manifest),
                                            "-o", "json"))  # fmt: skip
            self._name = str(made["metadata"]["name"])
            self._namespace = str(made["metadata"].get("namespace", "default"))
            self._workers = int(made["spec"]["workers"]["replicas"])
            recovery = made["spec"].get("recovery", {})
            self.placement = placement_of(recovery)
            self.replicas = replicas_of(recovery)
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"{manifest} is not one TrainingJob: {error!r}") from error
        self._records: dict[int, dict[str, Any]] = {}
        """By id: status keeps the newest ten, and a hand-back is one, too."""
        self._token = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See Arena."""
        self._kubectl("create", "-f", str(self._manifest))
        try:
            self._until_trained()
            yield
            self._status()
        finally:
            self._kubectl("delete", "-f", str(self._manifest), "--timeout=60s")

    def members(self) -> list[Process]:
        """See Arena."""
        addresses = {
            member_id(Role(m["role"]), m["index"], m["incarnation"]): m["address"]
            for m in self._status().get("members", [])
            if m.get("address")
        }
        if not addresses:
            return []
        self._token = self._token or self._read_token()
        return containers(self._name, Pods(addresses, self._token))

    def records(self) -> list[dict[str, Any]]:
        """See Arena."""
        return [record for _, record in sorted(self._records.items())]

    def _status(self) -> dict[str, Any]:
        text = self._kubectl("get", "tj", self._name, "-n", self._namespace, "-o", "json")
        found: dict[str, Any] = json.loads(text).get("status", {})
        self._records |= {r["id"]: r for r in found.get("recoveries", [])}
        return found

    def _read_token(self) -> str:
        """Read the job's token from the Secret that its pods mount."""
        of_job = ("-n", self._namespace, "-l", f"daruma.dev/job={self._name}", "-o", "json")
        pod = json.loads(self._kubectl("get", "pods", *of_job))["items"][0]
        (name,) = (
            volume["secret"]["secretName"]
            for volume in pod["spec"]["volumes"]
            if volume["name"] == "token"
        )
        text = self._kubectl("get", "secret", name, "-n", self._namespace, "-o", "json")
        return base64.b64decode(json.loads(text)["data"]["token"]).decode().strip()

    def _until_trained(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if trains(self.members(), self._workers):
                    return
            time.sleep(0.2)
        raise BenchError(
            f"{self._namespace}/{self._name} did not train within {START_SECONDS:.0f} s: see "
            f"`kubectl describe tj {self._name} -n {self._namespace}`"
        )

    def _kubectl(self, *arguments: str) -> str:
        command = [*shlex.split(os.environ.get("KUBECTL", "kubectl")), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=KUBECTL_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"kubectl: {error}") from error
        if done.returncode:
            raise BenchError(f"kubectl {arguments[0]}: {done.stderr.strip()}")
        return done.stdout
