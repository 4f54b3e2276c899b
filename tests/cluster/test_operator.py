"""The operator itself: both ways to install it, killed at every point of a pass, losing a race.

All that changes its Deployment is in this file, for files may run at the same time. For most tests
it runs `harness/watched_operator.py`, which starts the same program and interferes with jobs of
certain names. A shell starts it again when it was killed, because the kubelet waits longer each
time.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import parts
import pytest
import yaml
from longjob import LongJob, recoveries
from members import kill
from testcluster import ROOT, SYSTEM, Cluster, operator_away
from testjobs import JobNamespace, job_namespace

from daruma_trainer.contract import Role

POINTS = ("decided", "status-written", "pods-created", "membership-sent", "restore-sent")
DEPLOYMENT = "deploy/daruma-operator"
PROGRAM = (Path(__file__).parent / "harness" / "watched_operator.py").read_text()
AGAIN = """
trap 'kill $child; wait $child; exit 0' TERM
while :; do
    python3 -c "$PROGRAM" & child=$!
    wait $child
    echo $? >> /tmp/ends
done
"""
METRICS = "/api/v1/namespaces/daruma-system/services/daruma-operator-metrics:metrics/proxy/metrics"


@pytest.fixture(scope="module")
def long(operated: Cluster, run_folder: Path) -> Iterator[LongJob]:
    """The job whose recoveries the operator does not survive, so that they take longer."""
    with job_namespace(operated, "operator") as jobs:
        away = partial(operator_away, run_folder)
        yield LongJob(jobs, "at", away, enough=100, servers=2, workers=1, steps=300, think_ms="200")


@pytest.fixture(scope="module")
def watched(operated: Cluster, run_folder: Path) -> Iterator[Cluster]:
    """The cluster, with somebody at the operator's elbow; afterwards the usual one again."""
    before = operated.get("deploy", "daruma-operator", SYSTEM)["spec"]["template"]["spec"]
    container = before["containers"][0]
    changed = {
        **before,
        "containers": [
            {
                **container,
                "command": ["sh", "-c", AGAIN],
                "env": [*container["env"], {"name": "PROGRAM", "value": PROGRAM}],
            }
        ],
    }
    try:
        with operator_away(run_folder):
            _replace(operated, changed)
        yield operated
    finally:
        with operator_away(run_folder):
            _replace(operated, before)


def _replace(cluster: Cluster, spec: dict[str, Any]) -> None:
    patch = [{"op": "replace", "path": "/spec/template/spec", "value": spec}]
    cluster.kubectl("patch", DEPLOYMENT, "-n", SYSTEM, "--type=json", "-p", json.dumps(patch))
    cluster.kubectl("rollout", "status", DEPLOYMENT, "-n", SYSTEM, "--timeout=100s")
    cluster.until(lambda: len(_pods(cluster)) == 1, "the operator before is gone", 60)


def _pods(cluster: Cluster) -> list[dict[str, Any]]:
    selector = "app.kubernetes.io/name=daruma-operator"
    found: list[dict[str, Any]] = cluster.get("pods", namespace=SYSTEM, selector=selector)["items"]
    return found


def _lines(cluster: Cluster, file: str) -> list[str]:
    read = ("sh", "-c", f"cat {file} 2>/dev/null; true")
    return cluster.kubectl("exec", "-n", SYSTEM, DEPLOYMENT, "--", *read).stdout.split()


def _value(text: str, name: str, **labels: str) -> float:
    """Return a sample of an exposition; 0 if it is not there."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and wanted <= set((found.group(1) or "").split(",")):
            return float(found.group(2))
    return 0.0


def test_the_operators_image_has_neither_torch_nor_numpy(operated: Cluster) -> None:
    probe = "import importlib.util as u; print([m for m in ('torch', 'numpy') if u.find_spec(m)])"
    done = operated.kubectl("exec", "-n", SYSTEM, DEPLOYMENT, "--", "python3", "-c", probe)
    assert done.stdout.strip() == "[]"


def test_the_operator_exports_metrics_through_its_service(operated: Cluster) -> None:
    text = operated.raw(METRICS)
    assert "daruma_leader 1.0" in text
    assert "daruma_build_info" in text


def test_kubectl_apply_of_the_manifests_works_as_well(jobs: JobNamespace, run_folder: Path) -> None:
    """install.yaml takes over from Helm's objects of the same names; the operator goes on."""
    documents = list(yaml.safe_load_all((ROOT / "manifests/install.yaml").read_text()))
    assert {d["kind"] for d in documents if d} >= {"Deployment", "ClusterRole", "ServiceAccount"}
    cluster, file = jobs.cluster, str(ROOT / "manifests/install.yaml")
    with operator_away(run_folder):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", file)
        cluster.kubectl("rollout", "status", "-n", SYSTEM, DEPLOYMENT, "--timeout=110s")
    cluster.apply(jobs.manifest("applied", servers=1, workers=1, steps=20))
    jobs.ended("applied")
    assert parts.tag("operator") in json.dumps(documents)


@pytest.mark.parametrize("point", POINTS)
def test_the_operator_killed_during_a_recovery(watched: Cluster, long: LongJob, point: str) -> None:
    with long.losing("server-1") as name:
        known = len(recoveries(long.status()))
        before = len(_lines(watched, "/tmp/ends"))
        watched.kubectl(
            "exec", "-n", SYSTEM, DEPLOYMENT, "--", "sh", "-c", f"echo {point} > /tmp/die-at"
        )
        kill(long.jobs, name, Role.SERVER, 1)
        watched.until(
            lambda: "137" in _lines(watched, "/tmp/ends")[before:], f"it is killed at {point}", 60
        )
    assert len(recoveries(long.status())) == known + 1, "a second recovery"
    members = {m["pod"] for m in long.status()["members"]}
    watched.until(lambda: set(long.jobs.pods(name)) == members, "no pod is an orphan", 60)


def test_the_job_whose_operator_was_killed_succeeds(long: LongJob) -> None:
    long.ended()


def test_a_status_write_that_loses_leads_to_no_act(watched: Cluster, jobs: JobNamespace) -> None:
    jobs.cluster.apply(jobs.manifest("conflict", servers=1, workers=1, steps=20))
    jobs.ended("conflict")
    passes = _lines(watched, "/tmp/passes")
    assert passes[:3] == ["decided", "decided", "acted"], "it acted on a decision that was void"


def test_metrics_tell_what_status_tells(watched: Cluster, jobs: JobNamespace) -> None:
    jobs.cluster.apply(jobs.manifest("counted", servers=2, workers=1, steps=80))
    jobs.at_step("counted", 10)
    kill(jobs, "counted", Role.SERVER, 0)
    (record,) = jobs.ended("counted")["recoveries"]
    here = {"namespace": jobs.name}
    # The status may be read before the operator has the answer to its write.
    watched.until(
        lambda: _value(watched.raw(METRICS), "daruma_jobs", **here, phase="Succeeded"), "counted"
    )
    value = partial(_value, watched.raw(METRICS))
    what = {"strategy": record["strategy"], "cause": record["cause"]}
    assert value("daruma_recoveries_total", **here, **what, outcome="Succeeded") == 1
    (loss,) = record["losses"]
    assert value("daruma_pod_failures_total", **here, role="Server", cause=loss["reason"]) == 1
    assert value("daruma_jobs", **here, phase="Succeeded") == 1
    assert value("daruma_recovery_seconds_count", **what) >= 1
    assert value("daruma_recovery_seconds_sum", **what) >= record["seconds"] - 0.001
    for phase, seconds in record["phases"].items():
        spent = value("daruma_recovery_phase_seconds_sum", strategy=record["strategy"], phase=phase)
        assert spent >= seconds - 0.001
    assert value("daruma_pushes_replayed_total") >= record["pushes"]["replayed"]
