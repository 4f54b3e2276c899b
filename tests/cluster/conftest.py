"""Fixtures of the cluster tests: one cluster a session, the operator in it, a namespace a test."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parts
import pytest
from testcluster import Cluster, cluster
from testjobs import JobNamespace, job_namespace

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_NAMESPACE = "daruma-system"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here; without a cluster to be had they skip, and say why."""
    here = Path(__file__).parent
    reason = None if os.environ.get("KUBECONFIG") else parts.missing()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(600))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def k8s() -> Iterator[Cluster]:
    """A real Kubernetes, without Daruma."""
    with cluster() as made:
        yield made


@pytest.fixture(scope="session")
def operated(k8s: Cluster) -> Iterator[Cluster]:
    """The same, with the operator installed by the real Helm from the chart."""
    namespace: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": OPERATOR_NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    k8s.apply(namespace)
    k8s.helm(
        "upgrade", "--install", "daruma", str(ROOT / "charts/daruma"),
        "--namespace", OPERATOR_NAMESPACE, "--wait", "--timeout", "110s",
    )  # fmt: skip
    yield k8s
    k8s.helm("uninstall", "daruma", "--namespace", OPERATOR_NAMESPACE, "--wait")


@pytest.fixture
def jobs(operated: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A fresh namespace with Pod Security `restricted` and a claim for checkpoints."""
    with job_namespace(operated, request.node.name) as made:
        yield made
        if request.session.testsfailed:
            sys.stderr.write(made.story())
