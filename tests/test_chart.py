"""The chart as users render it: valid objects, least rights, values that are checked.

Real Helm renders it. It is built from its Go module once and cached, so without Go these skip.
"""

import json
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import parts
import pytest
import yaml

from bad_manifests import PROGRAM, manifest
from daruma_operator.api.load import parse_manifest
from daruma_operator.substrate.pods import pod_manifest
from daruma_operator.substrate.protocol import PodPlan
from daruma_trainer.contract import Role

CHART = parts.ROOT / "charts/daruma"
SCHEMA = "1.34"
OTHER_SCHEMAS = {"PodMonitor", "ServiceMonitor"}
"""Kinds of other projects, which no Kubernetes schema describes."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("go") is None, reason="no Go to build Helm with"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "three replicas, scheduled": {
        "replicas": 3,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "podAnnotations": {"team": "training"},
        "imagePullSecrets": [{"name": "pull"}],
    },
    "observed": {
        "serviceMonitor": {"enabled": True, "interval": "30s"},
        "podMonitor": {"enabled": True},
    },
    "bare": {"dashboard": {"enabled": False}},
}


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm, with values on its standard input."""
    return subprocess.run(
        [str(parts.helm()), *arguments, "--values", "-"],
        input=json.dumps(values or {}), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def rendered(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the chart's objects."""
    done = helm(
        "template", "daruma", str(CHART), "--namespace", "daruma-system",
        "--kube-version", parts.KUBERNETES, values=values,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def the(kind: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the one object of a kind."""
    (found,) = [document for document in rendered(values) if document["kind"] == kind]
    return found


def test_helm_lint_finds_nothing() -> None:
    done = helm("lint", str(CHART), "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_charts_crd_is_the_manifests() -> None:
    manifest = (parts.ROOT / "manifests/crd.yaml").read_text()
    assert (CHART / "crds/crd.yaml").read_text() == manifest, "stale: run `make manifests`"


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_object_is_valid_and_knows_its_namespace(values: dict[str, Any]) -> None:
    for document in rendered(values):
        if document["kind"] in OTHER_SCHEMAS:
            continue
        kubernetes_validate.validate(document, SCHEMA, strict=True)
        if not document["kind"].startswith("Cluster"):
            known = {"daruma-system", *values.get("watchNamespaces", ())}
            assert document["metadata"]["namespace"] in known


def test_install_yaml_is_valid() -> None:
    text = (parts.ROOT / "manifests/install.yaml").read_text()
    documents = [document for document in yaml.safe_load_all(text) if document]
    assert {d["kind"] for d in documents} >= {"Namespace", "Deployment", "ClusterRole", "Service"}
    for document in documents:
        kubernetes_validate.validate(document, SCHEMA, strict=True)


def test_the_claim_is_valid() -> None:
    claim = yaml.safe_load((parts.ROOT / "manifests/claim.yaml").read_text())
    kubernetes_validate.validate(claim, SCHEMA, strict=True)


def test_the_image_that_the_readme_sets_is_the_operators() -> None:
    readme = (parts.ROOT / "README.md").read_text().replace("$R", "registry.example.com/mine")
    (command,) = re.findall(r"^helm install (daruma .*)$", readme, re.MULTILINE)
    done = helm("template", *command.split(), "--kube-version", parts.KUBERNETES)
    assert done.returncode == 0, done.stderr
    assert 'image: "registry.example.com/mine/operator:0.1.0"' in done.stdout


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"replicas": 0}, "replicas"),
        ({"logLevel": "LOUD"}, "logLevel"),
        ({"image": {"repo": "x"}}, "image"),
        ({"watchNamespaces": "team-a"}, "watchNamespaces"),
        ({"watchNamespaces": ["team-*"]}, "watchNamespaces"),
        ({"service": {"port": 0}}, "port"),
        ({"unheard": True}, "unheard"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_value_is_refused_and_named(values: dict[str, Any], field: str) -> None:
    done = helm("template", "daruma", str(CHART), values=values)
    assert done.returncode != 0
    assert field in done.stderr


JOB_RULES = {
    "trainingjobs": {"get", "list", "watch"},
    "trainingjobs/status": {"patch"},
    "pods": {"list", "watch", "create", "delete"},
    "secrets": {"create"},
    "events": {"create"},
}


def allowed(role: dict[str, Any]) -> dict[str, set[str]]:
    """Return the verbs of a role by resource."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for resource in rule["resources"]:
            found.setdefault(resource, set()).update(rule["verbs"])
    return found


def bound(documents: list[dict[str, Any]]) -> set[tuple[str, str | None]]:
    """Return the roles that the operator's account has: kind and name, and in which namespace."""
    found = set()
    for document in documents:
        if document["kind"].endswith("Binding"):
            account = {"kind": "ServiceAccount", "name": "daruma-operator"}
            assert document["subjects"] == [account | {"namespace": "daruma-system"}]
            role = f"{document['roleRef']['kind']} {document['roleRef']['name']}"
            found.add((role, document["metadata"].get("namespace")))
    return found


def roles(documents: list[dict[str, Any]]) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Return the roles, named as `bound` does."""
    return {
        (f"{d['kind']} {d['metadata']['name']}", d["metadata"].get("namespace")): d
        for d in documents
        if d["kind"].endswith("Role")
    }


def test_the_operator_may_do_what_it_does_and_nothing_else() -> None:
    documents = rendered()
    made = roles(documents)
    own = made[("Role daruma-operator", "daruma-system")]
    assert allowed(made[("ClusterRole daruma-operator", None)]) == JOB_RULES
    assert allowed(own) == {"leases": {"create", "get", "update"}, "secrets": {"create", "get"}}
    named = [rule for rule in own["rules"] if "create" not in rule["verbs"]]
    assert all(rule.get("resourceNames") for rule in named), "reads are of named objects only"
    assert bound(documents) == made.keys()


def test_with_namespaces_to_watch_the_operator_has_no_rights_in_others() -> None:
    watched = ["team-a", "daruma-system", "team-a"]
    documents = rendered({"watchNamespaces": watched})
    made = roles(documents)
    own = made.pop(("Role daruma-operator", "daruma-system"))
    assert allowed(own)["secrets"] == {"create", "get"}, "its key is made in its own namespace"
    assert made.keys() == {("Role daruma-operator-jobs", name) for name in watched}
    assert all(allowed(role) == JOB_RULES for role in made.values())
    assert bound(documents) == {*made, ("Role daruma-operator", "daruma-system")}
    names = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(set(names)) == len(names)


def test_the_operators_pod_is_restricted() -> None:
    spec = the("Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_values_reach_the_operator() -> None:
    values = {
        "watchNamespaces": ["team-a", "team-b"],
        "logLevel": "DEBUG",
        "replicas": 2,
        "image": {"repository": "example.com/daruma", "tag": "7"},
    }
    deployment = the("Deployment", values)["spec"]
    (container,) = deployment["template"]["spec"]["containers"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert deployment["replicas"] == 2
    assert container["image"] == "example.com/daruma:7"
    assert environment["DARUMA_WATCH_NAMESPACES"] == "team-a,team-b"
    assert environment["DARUMA_LOG_LEVEL"] == "DEBUG"


def test_what_is_optional_can_be_had_and_left_out() -> None:
    def kinds(values: dict[str, Any]) -> set[str]:
        return {document["kind"] for document in rendered(values)}

    assert {"ServiceMonitor", "PodMonitor"}.isdisjoint(kinds({}))
    assert "ServiceMonitor" in kinds({"serviceMonitor": {"enabled": True}})
    assert "PodMonitor" in kinds({"podMonitor": {"enabled": True}})
    assert "ConfigMap" in kinds({})
    assert "ConfigMap" not in kinds({"dashboard": {"enabled": False}})


@pytest.mark.parametrize("role", Role)
def test_the_pod_monitor_finds_the_pods_of_jobs(role: Role) -> None:
    chosen = {"podMonitor": {"enabled": True}, "watchNamespaces": ["team-a"]}
    spec = the("PodMonitor", chosen)["spec"]
    job = parse_manifest(json.dumps(manifest({"program": PROGRAM})), "x")
    pod = pod_manifest(job.model_copy(update={"uid": "u"}), PodPlan("p", role, 0, 1))
    (wanted,) = spec["selector"]["matchExpressions"]
    assert wanted["operator"] == "Exists"
    assert wanted["key"] in pod["metadata"]["labels"]
    (endpoint,) = spec["podMetricsEndpoints"]
    (container,) = pod["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    assert spec["namespaceSelector"] == {"matchNames": ["team-a"]}
    everywhere = the("PodMonitor", {"podMonitor": {"enabled": True}})["spec"]
    assert everywhere["namespaceSelector"] == {"any": True}


def test_the_services_selector_finds_the_deployments_pods() -> None:
    labels = the("Deployment")["spec"]["template"]["metadata"]["labels"]
    selector = the("Service")["spec"]["selector"]
    assert selector.items() <= labels.items()
    (container,) = the("Deployment")["spec"]["template"]["spec"]["containers"]
    assert the("Service")["spec"]["ports"][0]["targetPort"] in {
        port["name"] for port in container["ports"]
    }
