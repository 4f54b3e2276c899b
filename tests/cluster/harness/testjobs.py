"""A namespace for one test's jobs, and what tests ask of a job in it."""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parts
from testcluster import SYSTEM, TEST, Cluster

SOFTMAX = Path(__file__).parents[2] / "softmax.py"
CLAIM = "checkpoints"
USER = 65532
STEPS = 300
THINK_MS = "100"
"""Outages of seconds are a part of such a job, not most of it."""
DATA = "synthetic:2000,32,5"
RATE = "0.1"
END = {"Succeeded", "Failed"}


def mlr(steps: int) -> dict[str, Any]:
    """Return the program that does the same with torch."""
    options = {"--data": DATA, "--steps": str(steps), "--lr": RATE, "--think-ms": THINK_MS}
    return {
        "image": parts.tag("worker"),
        "command": ["python", "-m", "daruma_trainer.programs.mlr"],
        "args": [word for option in options.items() for word in option],
    }


class JobNamespace:
    """One namespace."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.scratch = Path(tempfile.gettempdir() if cluster.folder is None else cluster.folder)
        """A folder that is the same here and where the cluster can be reached."""

    def manifest(
        self,
        name: str,
        *,
        servers: int = 3,
        workers: int = 2,
        steps: int = STEPS,
        think_ms: str = THINK_MS,
        **spec: Any,
    ) -> dict[str, Any]:
        """Return a job of a regression on synthetic data; `spec` overrides whole parts.

        Silence alone is a loss only after long: other tests leave pods little of the machine.
        """
        recovery: dict[str, Any] = spec.pop("recovery", {})
        return {
            "apiVersion": "daruma.dev/v1alpha1",
            "kind": "TrainingJob",
            "metadata": {"name": name, "namespace": self.name},
            "spec": {
                "program": {
                    "image": parts.tag("worker"),
                    "command": ["python", "-c", SOFTMAX.read_text()],
                    "args": [str(steps), DATA, RATE, think_ms],
                },
                "servers": {"replicas": servers, "image": parts.tag("server")},
                "workers": {"replicas": workers},
                "checkpoint": {
                    "store": "file:///jobs", "claimName": CLAIM, "every": 40, "fraction": 0.25,
                },
                "recovery": {"timeouts": {"detectSeconds": 30}} | recovery,
                **spec,
            },
        }  # fmt: skip

    def job(self, name: str) -> dict[str, Any]:
        """Return the job as it is; empty if it is not there."""
        return self.cluster.get("tj", name, self.name) or {}

    def status(self, name: str) -> dict[str, Any]:
        """Return the job's status; empty before the first."""
        found: dict[str, Any] = self.job(name).get("status", {})
        return found

    def events(self) -> set[str]:
        """Return the reasons of all events here."""
        found = self.cluster.get("events", namespace=self.name)
        return {e["reason"] for e in found["items"]}

    def pods(self, name: str) -> dict[str, str]:
        """Return the uid of each pod of a job that is there, by name."""
        found = self.cluster.get("pods", namespace=self.name, selector=f"daruma.dev/job={name}")
        return {p["metadata"]["name"]: p["metadata"]["uid"] for p in found["items"]}

    def reached(self, name: str, step: int) -> bool:
        """Whether a job runs and its first server is at a step; it must not have ended."""
        status = self.status(name)
        if status.get("phase") in END:
            raise AssertionError(f"{name} ended: {json.dumps(status)[:3000]}")
        return status.get("phase") == "Running" and self.step_of(name) >= step

    def step_of(self, name: str) -> float:
        """Return a live server's own step, from its metrics: fresher than status."""
        member = next(m for m in self.status(name)["members"] if m["role"] == "Server")
        text = self.cluster.raw(
            f"/api/v1/namespaces/{self.name}/pods/{member['pod']}:7071/proxy/metrics"
        )
        found = re.search(r"^daruma_step\{[^}]*\} (\S+)$", text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def at_step(self, name: str, step: int) -> None:
        """Wait until a job runs and its first server is at a step."""
        self.cluster.until(lambda: self.status(name).get("phase") == "Running", f"{name} runs", 180)
        self.cluster.until(lambda: self.step_of(name) >= step, f"{name} is at step {step}", 180)

    def ended(self, name: str, phase: str = "Succeeded", seconds: float = 240) -> dict[str, Any]:
        """Wait for the job's end, which must be `phase`; returns its status.

        Meanwhile its step must never go back.
        """
        furthest = 0

        def over() -> dict[str, Any] | None:
            nonlocal furthest
            status = self.status(name)
            step = (status.get("progress") or {}).get("step", 0)
            if step < furthest:
                raise AssertionError(f"{name} went back from step {furthest} to {step}")
            furthest = step
            return status if status.get("phase") in END else None

        status: dict[str, Any] = self.cluster.until(over, f"{name} ends", seconds)
        if status["phase"] != phase:
            raise AssertionError(
                f"{name} is {status['phase']}: {json.dumps(status, indent=1)[:5000]}"
            )
        return status

    def story(self) -> str:
        """Tell all that is known, for a test that failed."""
        parts = [
            self.cluster.kubectl(
                "get", "tj,pods,events", "-n", self.name, "-o", "wide", check=False
            ).stdout,
            self.cluster.kubectl("get", "tj", "-n", self.name, "-o", "yaml", check=False).stdout,
            self.cluster.kubectl(
                "logs", "-n", SYSTEM, "deploy/daruma-operator", "--tail", "120", check=False
            ).stdout,
        ]
        for pod in self.cluster.get("pods", namespace=self.name)["items"]:
            name = pod["metadata"]["name"]
            log = self.cluster.kubectl(
                "logs", "-n", self.name, name, "--tail", "30", check=False
            ).stdout
            parts.append(f"--- {name}\n{log}")
        return "\n".join(parts)


@contextmanager
def job_namespace(cluster: Cluster, test: str) -> Iterator[JobNamespace]:
    """Make a namespace and its claim; afterwards both are being removed (`testcluster.shared`)."""
    short = re.sub(r"[^a-z0-9]+", "-", test.lower()).strip("-")[:30].strip("-")
    name = f"{short}-{uuid.uuid4().hex[:6]}"
    cluster.apply(_namespace(name), *_volume(cluster, name))
    try:
        yield JobNamespace(cluster, name)
    finally:
        for what in (["tj", "--all"], ["pods", "--all", "--grace-period=1"]):
            cluster.kubectl("delete", *what, "-n", name, "--wait=false", check=False)
        cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)
        cluster.kubectl("delete", "pv", f"store-{name}", "--wait=false", check=False)


def _namespace(name: str) -> Mapping[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted", TEST: "true"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def _volume(cluster: Cluster, name: str) -> list[Mapping[str, Any]]:
    """A claim: on our own cluster of a static hostPath volume, which `restricted` allows."""
    size = {"storage": "1Gi"}
    claim: dict[str, Any] = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": name},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": size}},
    }  # fmt: skip
    if cluster.folder is None:
        return [claim]
    claim["spec"] |= {"storageClassName": "", "volumeName": f"store-{name}"}
    folder = cluster.folder / "volumes" / name
    folder.mkdir(parents=True)
    os.chown(folder, USER, USER)  # fsGroup does not apply to hostPath
    cluster.folder.chmod(0o755)
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"store-{name}"},
        "spec": {
            "capacity": size, "accessModes": ["ReadWriteMany"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": name, "name": CLAIM},
        },
    }  # fmt: skip
    return [volume, claim]
