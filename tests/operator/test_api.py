"""Tests of the API types: they agree with the CRD, and say what is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bad_manifests import BAD, BAD_NAMES, PROGRAM, manifest
from daruma_operator.api.crd import HEADER, crd
from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import MAX_BYTES, load_manifest, parse_manifest
from daruma_operator.api.reference import reference
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.status import Phase, RecoveryRecord, TrainingJobStatus
from daruma_operator.errors import ManifestError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", ["manifests/crd.yaml", "charts/daruma/crds/crd.yaml"])
def test_the_crd_in_the_repository_is_the_one_that_the_types_make(path: str) -> None:
    text = (ROOT / path).read_text()
    assert text.startswith(HEADER)
    assert yaml.safe_load(text) == crd(), "stale: run `make manifests`"
    assert len(text) < 200_000, "client-side apply keeps it in an annotation of 256 KB at most"


def test_the_guide_in_the_repository_is_the_one_that_the_types_make() -> None:
    guide = (ROOT / "docs/guides/trainingjob.md").read_text()
    assert guide == reference(), "stale: run `make manifests`"


def nodes(schema: dict[str, Any]) -> list[dict[str, Any]]:
    found = [schema]
    for child in [*schema.get("properties", {}).values(), schema.get("items", {})]:
        if isinstance(child, dict) and child:
            found += nodes(child)
    return found


def test_the_schema_is_structural() -> None:
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for node in nodes(schema):
        assert not {"$ref", "anyOf", "title", "prefixItems", "const"} & set(node), node
        assert "type" in node, node


def test_the_schema_keeps_no_field_that_the_types_lack() -> None:
    """What only the types refuse would be stored, and no operator could read it."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for node in nodes(schema):
        assert not {"properties", "x-kubernetes-preserve-unknown-fields"} <= set(node), node


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_labels_are_refused_here_and_at_the_door(name: str) -> None:
    with pytest.raises(ManifestError, match="write at most 52 lower-case letters"):
        parse_manifest(json.dumps(manifest({"program": PROGRAM}, name)), "x.yaml")
    (rule,) = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    (pattern,) = re.findall(r"^self\.metadata\.name\.matches\('(.+)'\)$", rule["rule"])
    assert not re.fullmatch(pattern, name)
    assert re.fullmatch(pattern, "a" * 52)


def test_where_a_store_lies_and_who_may_reach_it_is_never_changed() -> None:
    spec = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rules = {rule["message"]: rule["rule"] for rule in spec["x-kubernetes-validations"]}
    for field in ("store", "claimName", "secretRef"):
        (held,) = [rules[m] for m in rules if m.startswith(f"spec.checkpoint.{field} is immutable")]
        # Given, changed or taken away.
        assert f"has(self.checkpoint.{field}) == has(oldSelf.checkpoint.{field})" in held
        assert f"self.checkpoint.{field} == oldSelf.checkpoint.{field}" in held


def test_templates_and_resources_have_no_default() -> None:
    """CEL's has() is true for a field with a default, and a merge would not see its absence."""
    spec = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for role in ("servers", "workers"):
        for field in ("template", "resources"):
            assert "default" not in spec["properties"][role]["properties"][field]


def test_defaults_of_the_crd_are_those_of_the_types() -> None:
    spec = TrainingJobSpec.model_validate({"program": PROGRAM}).model_dump(
        mode="json", by_alias=True
    )
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    def check(node: dict[str, Any], value: Any, at: str) -> None:
        if "default" in node and "properties" not in node:
            assert node["default"] == value, at
        for name, child in node.get("properties", {}).items():
            if isinstance(value, dict):
                check(child, value.get(name), f"{at}.{name}")

    check(schema, spec, "spec")


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/examples").glob("*.yaml")), ids=str)
def test_the_examples_are_good(path: Path) -> None:
    assert load_manifest(path).spec.servers.replicas >= 1


@pytest.mark.parametrize(("name", "spec", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_manifests_are_refused_in_words(name: str, spec: dict[str, Any], message: str) -> None:
    del name
    with pytest.raises(ManifestError) as refused:
        parse_manifest(json.dumps(manifest(spec)), "x.yaml")
    assert message in str(refused.value)
    assert "x.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML (line"),
        ("", "0 documents"),
        ("a: 1\n---\nb: 2", "2 documents"),
        ("kind: Pod\napiVersion: v1", "write apiVersion: daruma.dev/v1alpha1"),
        (json.dumps(manifest({"program": PROGRAM, "wokers": {}})), "spec.wokers: there is no such"),
        (json.dumps({**manifest({"program": PROGRAM}), "spc": 1}), "unknown field 'spc'"),
        (json.dumps({**manifest({"program": PROGRAM}), "metadata": {}}), "metadata.name"),
        (json.dumps(manifest({"program": PROGRAM}, 12)), "metadata.name 12: write it in quotes"),
        ("[1]", "holds no map of fields"),
        ("kind: TrainingJob\nkind: Pod", "line 2, column 1): the key 'kind' is there twice"),
        ("a: &a [1]\nb: {? *a : 1}", "unhashable key"),
    ],
)
def test_what_is_no_manifest_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as refused:
        parse_manifest(text, "x.yaml")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"program": {"image": "i"}}, "spec.program.command: is missing and has no default"),
        ({"programm": PROGRAM, "program": PROGRAM}, "there is no such field; did you mean program"),
        ({"program": PROGRAM, "workers": {"minreplicas": 1}}, "did you mean minReplicas?"),
        ({"program": PROGRAM, "runPolicy": {"suspend": True}}, "there are backoffLimit, window"),
        ({"program": {**PROGRAM, "env": [{"name": "A", "vlaue": ""}]}}, "did you mean value?"),
        ({"program": {**PROGRAM, "args": [4]}}, "args[0]: should be a string, not 4: write it in"),
        ({"program": {**PROGRAM, "command": "a b"}}, 'command: should be a list, not "a b"'),
        ({"program": {**PROGRAM, "command": []}}, "command: should not be empty"),
        ({"program": PROGRAM, "consistency": "Sync"}, 'should be a map of fields, not "Sync"'),
        ({"program": PROGRAM, "servers": {"replicas": True}}, "should be an integer, not true"),
        ({"program": PROGRAM, "recovery": {"allowReset": "no"}}, "should be true or false, not"),
        ({"program": PROGRAM, "recovery": {"placement": "Near"}}, "'Adopt', not \"Near\""),
        ({"program": PROGRAM, "recovery": {"replay": {"maxGap": float("inf")}}}, "finite number"),
        (None, "spec: should be a map of fields, not null"),
    ],
)
def test_what_is_wrong_with_a_field_and_what_to_write(spec: Any, message: str) -> None:
    with pytest.raises(ManifestError) as refused:
        parse_manifest(yaml.safe_dump(manifest(spec)), "x.yaml")
    assert message in str(refused.value)


def test_a_field_left_empty_has_its_default_as_in_a_cluster() -> None:
    spec = {"program": PROGRAM, "recovery": None, "workers": {"replicas": None}}
    job = parse_manifest(json.dumps(manifest(spec)), "x")
    assert job.spec == TrainingJobSpec.model_validate({"program": PROGRAM})


def test_a_number_without_a_point_is_one_as_kubectl_reads_it() -> None:
    text = json.dumps(manifest({"program": PROGRAM, "recovery": {"replay": {"maxGap": "G"}}}))
    job = parse_manifest(text.replace('"G"', "1e-3"), "x")
    assert job.spec.recovery.replay.max_gap == 0.001


def test_aliases_that_grow_without_end_are_refused_at_once() -> None:
    lists = [f"l{i}: &l{i} [{', '.join(10 * [f'*l{i - 1}'])}]" for i in range(1, 20)]
    text = "\n".join(["l0: &l0 [a, a]", *lists]) + "\n"
    head = "apiVersion: daruma.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: x}\nspec:\n"
    with pytest.raises(ManifestError, match="larger than"):
        parse_manifest(head + "".join(f"  {line}\n" for line in text.splitlines()), "x")


def test_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot read"):
        load_manifest(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ManifestError, match="larger than"):
        load_manifest(tmp_path / "huge.yaml")


def test_a_local_run_needs_no_claim() -> None:
    text = json.dumps(manifest({"program": PROGRAM, "checkpoint": {"store": "file:///s"}}))
    assert parse_manifest(text, "x", local=True).spec.checkpoint.store == "file:///s"


@pytest.mark.parametrize(
    "store", ["s3://my-bucket.eu/a/b-c/", "gs://b_1/x=1/2026.01", "az://container", "s3://abc/"]
)
def test_buckets_are_stores_without_a_claim(store: str) -> None:
    point = {"store": store, "secretRef": {"name": "s3"}}
    job = parse_manifest(json.dumps(manifest({"program": PROGRAM, "checkpoint": point})), "x")
    assert job.spec.checkpoint.store == store
    assert job.spec.checkpoint.secret_ref is not None
    assert job.spec.checkpoint.secret_ref.name == "s3"


def test_a_status_reads_back_and_passes_over_what_it_does_not_know() -> None:
    status = TrainingJobStatus(
        phase=Phase.RECOVERING, epoch=7, recovery=RecoveryRecord(id=3, indexes=(1,))
    )
    raw = status.model_dump(mode="json", by_alias=True)
    assert raw["recovery"]["deltaNorm"] == {"value": None, "kind": "Unknown"}
    assert TrainingJobStatus.model_validate({**raw, "ofALaterVersion": 1}) == status


def test_an_object_of_the_api_server_is_read() -> None:
    raw = manifest({"program": PROGRAM}) | {
        "metadata": {
            "name": "j", "namespace": "n", "uid": "u", "generation": 3, "resourceVersion": "9",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "deletionTimestamp": "2026-01-02T00:00:00Z",
        }
    }  # fmt: skip
    job = TrainingJob.from_wire(raw)
    assert (job.namespace, job.name, job.uid, job.resource_version) == ("n", "j", "u", "9")
    assert job.deletion_timestamp is not None
    assert job.status_to_wire()["epoch"] == 0


def test_a_default_holds_what_its_schema_requires() -> None:
    """The API server refuses the whole definition otherwise."""

    def check(node: dict[str, Any], path: str) -> None:
        default = node.get("default")
        if isinstance(default, dict):
            assert not set(node.get("required", [])) - set(default), path
        for name, child in node.get("properties", {}).items():
            check(child, f"{path}.{name}")

    version = crd()["spec"]["versions"][0]
    check(version["schema"]["openAPIV3Schema"], "")
