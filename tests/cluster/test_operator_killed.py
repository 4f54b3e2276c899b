"""The operator is killed with SIGKILL at every point of a pass: the same recovery as without.

Its Deployment is given another command for the while: the same program, which kills itself at the
named point of a recovery's pass, once. A file in its emptyDir, which outlives the container, tells
the next start that it was done.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from members import check_recovered, kill, restarts
from testcluster import Cluster
from testjobs import JobNamespace

from daruma_trainer.contract import Role

POINTS = ("decided", "status-written", "pods-created", "membership-sent", "restore-sent")
SYSTEM = "daruma-system"
DEPLOYMENT = "deploy/daruma-operator"
SELF_KILLING = """
import os, pathlib, signal, sys
from daruma_operator import __main__ as entry
from daruma_operator.controller import loop

done = pathlib.Path("/tmp/killed")
decide, controller = loop.decide, entry.Controller
recovers = {"now": False}

def watched(seen, policy, now):
    decision = decide(seen, policy, now)
    changed = decision.status != seen.job.status
    recovers["now"] = str(decision.phase) == "Recovering" and (changed or bool(decision.acts))
    return decision

def point(name):
    if name == os.environ["POINT"] and recovers["now"] and not done.exists():
        done.touch()
        os.kill(os.getpid(), signal.SIGKILL)

loop.decide = watched
entry.Controller = lambda *given: controller(*given, hooks=loop.Hooks(point=point))
sys.exit(entry.main())
"""


@pytest.fixture
def doomed(operated: Cluster, point: str) -> Iterator[Cluster]:
    """The cluster, with an operator that will die at `point`; afterwards the usual one again."""
    before = operated.get(DEPLOYMENT, "-n", SYSTEM)["spec"]["template"]["spec"]
    container = before["containers"][0]
    changed = {
        **before,
        "shareProcessNamespace": True,  # or it were process 1 of its own, which nothing kills
        "containers": [
            {
                **container,
                "command": ["python3", "-c", SELF_KILLING],
                "env": [*container["env"], {"name": "POINT", "value": point}],
            }
        ],
    }
    try:
        _replace(operated, changed)
        yield operated
    finally:
        _replace(operated, before)


def _replace(cluster: Cluster, spec: dict[str, Any]) -> None:
    patch = [{"op": "replace", "path": "/spec/template/spec", "value": spec}]
    cluster.kubectl("patch", DEPLOYMENT, "-n", SYSTEM, "--type=json", "-p", json.dumps(patch))
    cluster.kubectl("rollout", "status", DEPLOYMENT, "-n", SYSTEM, "--timeout=100s")
    cluster.until(lambda: len(_pods(cluster)) == 1, "the operator before is gone", 60)


def _pods(cluster: Cluster) -> list[dict[str, Any]]:
    selector = "app.kubernetes.io/name=daruma-operator"
    found: list[dict[str, Any]] = cluster.get("pods", "-n", SYSTEM, "-l", selector)["items"]
    return found


def _ends(cluster: Cluster) -> list[int]:
    """Exit codes of the operator's containers before the one that runs."""
    (pod,) = _pods(cluster)
    found = [s["lastState"].get("terminated") for s in pod["status"]["containerStatuses"]]
    return [end["exitCode"] for end in found if end]


@pytest.mark.parametrize("point", POINTS)
def test_the_operator_killed_during_a_recovery(
    doomed: Cluster, jobs: JobNamespace, point: str
) -> None:
    jobs.cluster.apply(jobs.manifest("job"))
    jobs.at_step("job", 60)
    before = jobs.pods("job")
    kill(jobs, "job", Role.SERVER, 1)
    doomed.until(lambda: _ends(doomed) == [137], f"the operator is killed at {point}", 60)
    recovered = doomed.until(lambda: jobs.status("job").get("recoveries"), "it recovers", 120)
    members = {m["pod"] for m in jobs.status("job")["members"]}
    doomed.until(lambda: set(jobs.pods("job")) == members, "no pod is an orphan", 60)

    status = jobs.ended("job")
    check_recovered(jobs, "job", before, {"server-1"}, status)
    assert [r["id"] for r in status["recoveries"]] == [recovered[0]["id"]], "a second recovery"
    assert restarts(status, "servers") == 1
    assert restarts(status, "workers") == 0
