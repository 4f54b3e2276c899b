"""Tests of the pods made of a job: what reaches whom."""

import json
from typing import Any

import pytest

from bad_manifests import PROGRAM, STORE, manifest
from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import parse_manifest
from daruma_operator.substrate.pods import pod_manifest
from daruma_operator.substrate.protocol import PodPlan
from daruma_trainer.contract import STORE_MOUNT, Role


def job_of(checkpoint: dict[str, Any], **more: Any) -> TrainingJob:
    text = json.dumps(manifest({"program": PROGRAM, "checkpoint": checkpoint, **more}))
    return parse_manifest(text, "x").model_copy(update={"uid": "12345678-uid"})


def container(job: TrainingJob, role: Role) -> dict[str, Any]:
    pod = pod_manifest(job, PodPlan(f"{role.value.lower()}-0", role, 0, 1))
    found: dict[str, Any] = pod["spec"]["containers"][0]
    return found


def test_the_stores_secret_reaches_servers_alone() -> None:
    job = job_of({"store": "s3://bucket/folder", "secretRef": {"name": "s3"}})
    wanted = [{"secretRef": {"name": "s3", "optional": False}}]
    assert container(job, Role.SERVER)["envFrom"] == wanted
    for role in (Role.SERVER, Role.WORKER):
        pod = pod_manifest(job, PodPlan("p", role, 0, 1))
        assert ("s3" in json.dumps(pod["spec"])) is (role is Role.SERVER)


def test_without_a_secret_there_is_none() -> None:
    job = job_of({"store": "s3://bucket/folder"})
    assert "envFrom" not in container(job, Role.SERVER)
    assert [m["name"] for m in container(job, Role.SERVER)["volumeMounts"]] == ["token", "tmp"]


def test_a_template_adds_to_the_secret() -> None:
    more = {"configMapRef": {"name": "endpoint"}}
    template = {"spec": {"containers": [{"name": "daruma", "envFrom": [more]}]}}
    job = job_of(
        {"store": "gs://bucket", "secretRef": {"name": "gcs"}}, servers={"template": template}
    )
    assert [next(iter(e)) for e in container(job, Role.SERVER)["envFrom"]] == [
        "secretRef",
        "configMapRef",
    ]


@pytest.mark.parametrize(
    ("checkpoint", "uri"),
    [
        ({}, None),
        ({"store": "s3://bucket/folder"}, "s3://bucket/folder"),
        (STORE, f"file://{STORE_MOUNT}/s"),
    ],
)
def test_where_members_see_the_store(checkpoint: dict[str, Any], uri: str | None) -> None:
    # Slow to import: only the process that runs this pays for it.
    from kubernetes.aio import client

    from daruma_operator.substrate.kubernetes import KubernetesSubstrate

    substrate = KubernetesSubstrate(client.ApiClient.__new__(client.ApiClient), "ns", [])
    assert substrate.store_uri(job_of(checkpoint)) == uri
