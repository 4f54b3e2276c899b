"""Fixtures of the cluster tests: one cluster a run, the operator in it, a namespace a test."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import parts
import pytest
from testcluster import Cluster, installed, shared
from testjobs import JobNamespace, job_namespace


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
def run_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def until_the_end() -> Iterator[ExitStack]:
    """What this process must hold until all of its tests are done."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="package")
def k8s(run_folder: Path, until_the_end: ExitStack) -> Iterator[Cluster]:
    """A real Kubernetes, without Daruma unless another test installed it."""
    with shared(run_folder, until_the_end) as made:
        yield made


@pytest.fixture(scope="package")
def operated(k8s: Cluster, run_folder: Path) -> Cluster:
    """The same, with the operator installed by the real Helm from the chart."""
    return installed(k8s, run_folder)


@pytest.fixture
def jobs(operated: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A fresh namespace with Pod Security `restricted` and a claim for checkpoints."""
    with job_namespace(operated, request.node.name) as made:
        yield made
        if request.session.testsfailed:
            sys.stderr.write(made.story())
