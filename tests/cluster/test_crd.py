"""The CRD at the API server's door."""

import json
from pathlib import Path
from typing import Any

import pytest
from render import render
from testcluster import Cluster, locked

from bad_manifests import BAD, BAD_NAMES, PROGRAM, STORE, manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def with_crd(k8s: Cluster, run_folder: Path) -> Cluster:
    """A cluster that knows TrainingJobs."""
    with locked(run_folder):  # Helm makes the same one
        k8s.kubectl("apply", "-f", str(ROOT / "manifests/crd.yaml"))
        k8s.kubectl(
            "wait", "--for=condition=Established", "crd/trainingjobs.daruma.dev", "--timeout=60s"
        )
    served = ("get", "trainingjobs", "--all-namespaces")
    k8s.until(lambda: k8s.kubectl(*served, check=False).returncode == 0, "they are served", 60)
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


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_api_server_refuses_names_that_are_no_labels(with_crd: Cluster, name: str) -> None:
    done = with_crd.apply(manifest({"program": PROGRAM}, name=name), check=False)
    assert done.returncode != 0
    assert "write at most 52" in done.stderr


def test_the_longest_name_is_taken_and_its_store_stays(with_crd: Cluster) -> None:
    name = "a" * 52
    with_crd.apply(manifest({"program": PROGRAM, "checkpoint": STORE}, name=name))
    try:
        for field, value in (("claimName", "d"), ("store", "file:///d")):
            patch = json.dumps({"spec": {"checkpoint": {field: value}}})
            done = with_crd.kubectl("patch", "tj", name, "--type=merge", "-p", patch, check=False)
            assert done.returncode != 0
            assert f"spec.checkpoint.{field} is immutable" in done.stderr
    finally:
        with_crd.kubectl("delete", "tj", name, "--timeout=30s")


def test_the_api_server_keeps_no_field_that_the_types_lack(with_crd: Cluster) -> None:
    job = manifest({"program": {**PROGRAM, "env": [{"name": "A", "vlaue": "b"}]}}, name="vlaue")
    done = with_crd.apply(job, check=False)
    assert done.returncode != 0
    assert 'unknown field "spec.program.env[0].vlaue"' in done.stderr


def test_a_minimal_manifest_gets_its_defaults_from_the_api_server(with_crd: Cluster) -> None:
    with_crd.apply(manifest({"program": PROGRAM}, name="minimal"))
    try:
        spec = with_crd.get("tj", "minimal", "default")["spec"]
        assert spec["servers"]["replicas"] == spec["workers"]["replicas"] == 1
        assert spec["recovery"]["strategy"] == "Freshest"
        assert spec["checkpoint"]["every"] == 96
        patch = json.dumps({"spec": {"servers": {"replicas": 2}}})
        done = with_crd.kubectl("patch", "tj", "minimal", "--type=merge", "-p", patch, check=False)
        assert done.returncode != 0
        assert "immutable" in done.stderr
    finally:
        with_crd.kubectl("delete", "tj", "minimal", "--timeout=30s")
