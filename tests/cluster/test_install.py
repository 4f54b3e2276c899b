"""The cluster itself, the CRD at its door, and both ways to install the operator."""

import json
from pathlib import Path
from typing import Any

import parts
import pytest
import yaml
from render import render
from testcluster import Cluster
from testjobs import JobNamespace

from bad_manifests import BAD, PROGRAM, manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def with_crd(k8s: Cluster) -> Cluster:
    """A cluster that knows TrainingJobs."""
    k8s.kubectl("apply", "-f", str(ROOT / "manifests/crd.yaml"))
    k8s.kubectl(
        "wait", "--for=condition=Established", "crd/trainingjobs.daruma.dev", "--timeout=30s"
    )
    return k8s


def test_install_yaml_is_what_the_chart_makes() -> None:
    assert (ROOT / "manifests/install.yaml").read_text() == render(), "stale: run `make manifests`"


@pytest.mark.parametrize(("name", "spec", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_the_api_server_refuses_bad_manifests_in_words(
    with_crd: Cluster, name: str, spec: dict[str, Any], message: str
) -> None:
    done = with_crd.apply(manifest(spec, name="bad"), check=False)
    assert done.returncode != 0, f"{name} was accepted"
    assert message in done.stderr


def test_a_minimal_manifest_gets_its_defaults_from_the_api_server(with_crd: Cluster) -> None:
    with_crd.apply(manifest({"program": PROGRAM}, name="minimal"))
    try:
        spec = with_crd.get("tj", "minimal")["spec"]
        assert spec["servers"]["replicas"] == spec["workers"]["replicas"] == 1
        assert spec["recovery"]["strategy"] == "Freshest"
        assert spec["checkpoint"]["every"] == 96
        patch = json.dumps({"spec": {"servers": {"replicas": 2}}})
        done = with_crd.kubectl("patch", "tj", "minimal", "--type=merge", "-p", patch, check=False)
        assert done.returncode != 0
        assert "immutable" in done.stderr
    finally:
        with_crd.kubectl("delete", "tj", "minimal", "--timeout=30s")


def test_the_operators_image_has_neither_torch_nor_numpy(operated: Cluster) -> None:
    probe = "import importlib.util as u; print([m for m in ('torch', 'numpy') if u.find_spec(m)])"
    done = operated.kubectl(
        "exec", "-n", "daruma-system", "deploy/daruma-operator", "--", "python3", "-c", probe
    )
    assert done.stdout.strip() == "[]"


def test_the_operator_exports_metrics_through_its_service(operated: Cluster) -> None:
    path = "/api/v1/namespaces/daruma-system/services/daruma-operator-metrics:metrics/proxy/metrics"
    text = operated.raw(path)
    assert "daruma_leader 1.0" in text
    assert "daruma_build_info" in text


def test_kubectl_apply_of_the_manifests_works_as_well(jobs: JobNamespace) -> None:
    """install.yaml takes over from Helm's objects of the same names; the operator goes on."""
    documents = list(yaml.safe_load_all((ROOT / "manifests/install.yaml").read_text()))
    assert {d["kind"] for d in documents if d} >= {"Deployment", "ClusterRole", "ServiceAccount"}
    cluster = jobs.cluster
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "manifests/install.yaml")
    )
    cluster.kubectl(
        "rollout", "status", "-n", "daruma-system", "deploy/daruma-operator", "--timeout=110s"
    )
    cluster.apply(jobs.manifest("applied", servers=1, workers=1, steps=20))
    jobs.ended("applied")
    assert parts.tag("operator") in json.dumps(documents)
