"""The CustomResourceDefinition, made from the types: `python -m daruma_operator.api.crd`."""

import sys
from typing import Any

import yaml

from daruma_operator.api.job import GROUP, KIND, PLURAL, VERSION
from daruma_operator.api.model import cel
from daruma_operator.api.rules import OF_THE_OBJECT
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.status import TrainingJobStatus

HEADER = "# Made from operator/daruma_operator/api by `make manifests`; do not edit.\n"
_DROPPED = frozenset({"title", "discriminator", "const"})

COLUMNS = [
    ("Phase", "string", ".status.phase", 0),
    ("Servers", "string", ".status.servers.text", 0),
    ("Workers", "string", ".status.workers.text", 0),
    ("Step", "integer", ".status.progress.step", 0),
    ("Restarts", "integer", ".status.restarts.servers", 0),
    ("Strategy", "string", ".spec.recovery.strategy", 0),
    ("Last-Recovery", "number", ".status.recoveries[-1:].seconds", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Loss", "number", ".status.progress.loss", 1),
    ("Goodput", "number", ".status.progress.goodput", 1),
    ("Reason", "string", ".status.reason", 1),
]


def crd() -> dict[str, Any]:
    """Return the whole definition."""
    schema = {
        "type": "object",
        "description": "A parameter-server training job that survives the loss of its members.",
        "required": ["spec"],
        **cel(*OF_THE_OBJECT),
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(TrainingJobSpec.model_json_schema(by_alias=True)),
            "status": structural(
                TrainingJobStatus.model_json_schema(by_alias=True, mode="serialization"),
                described=False,
            ),
        },
    }
    columns = [
        {"name": n, "type": t, "jsonPath": p, **({"priority": r} if r else {})}
        for n, t, p, r in COLUMNS
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas",
                "statusReplicasPath": ".status.workers.total",
            },
        },
        "additionalPrinterColumns": columns,
    }
    names = {"kind": KIND, "plural": PLURAL, "singular": KIND.lower(), "shortNames": ["tj"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def structural(schema: dict[str, Any], *, described: bool = True) -> dict[str, Any]:
    """Turn pydantic's JSON schema into a structural one: no $ref, no anyOf, no titles."""
    definitions = schema.get("$defs", {})

    def convert(node: dict[str, Any]) -> dict[str, Any]:
        node = {k: v for k, v in node.items() if k not in _DROPPED and k != "$defs"}
        if "$ref" in node:
            target = definitions[node.pop("$ref").rpartition("/")[2]]
            node = {**convert(target), **node}
        if "anyOf" in node:
            # Only `X | None` is used: null means that the field is not set.
            (branch,) = (n for n in node.pop("anyOf") if n.get("type") != "null")
            node = {**convert(branch), **node, "nullable": True}
        if node.get("default", ...) is None:
            node.pop("default")
        if not described:
            # Status is written by the operator whole: defaults there would hide what it left out.
            node.pop("description", None)
            node.pop("default", None)
            node.pop("required", None)
        return _convert_children(node, convert)

    return convert(schema)


def _convert_children(node: dict[str, Any], convert: Any) -> dict[str, Any]:
    if "properties" in node:
        node["properties"] = {k: convert(v) for k, v in node["properties"].items()}
        if "required" in node or any("default" in v for v in node["properties"].values()):
            _give_defaults(node)
    if isinstance(node.get("items"), dict):
        node["items"] = convert(node["items"])
    if "prefixItems" in node:
        node["items"] = convert(node.pop("prefixItems")[0])
    extra = node.pop("additionalProperties", None)
    if isinstance(extra, dict) and extra and "x-kubernetes-preserve-unknown-fields" not in node:
        node["additionalProperties"] = convert(extra)
    # Exclusive bounds are booleans in the dialect that Kubernetes speaks.
    for bound, flag in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node and node[bound] is not True:
            node[flag] = node.pop(bound)
            node[bound] = True
    return node


def _give_defaults(node: dict[str, Any]) -> None:
    """An object that may be left out gets {}: the API server fills in defaults below it only then.

    Not one of unknown fields: has() must tell whether the user gave a template or resources. Nor
    one that cannot be empty.
    """
    for name, child in node["properties"].items():
        whole = "properties" in child and "required" not in child
        if whole and name not in node.get("required", []):
            child.setdefault("default", {})


def main() -> None:
    """Print the definition."""
    sys.stdout.write(HEADER + yaml.safe_dump(crd(), sort_keys=False, width=100))


if __name__ == "__main__":
    main()
