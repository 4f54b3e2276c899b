"""The TrainingJob guide's tables, made from the CRD: `python -m daruma_operator.api.reference`."""

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from daruma_operator.api.crd import COLUMNS, crd

INTRODUCTION = """\
# TrainingJob

`daruma.dev/v1alpha1`, short name `tj`. Made from the types by `make manifests`; do not edit.

A minimal job names a program; everything else has a default:

```yaml
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: minimal}
spec:
  program: {image: daruma.dev/worker:0.1.0, command: [python, train.py]}
```

`servers.template` and `workers.template` are PodTemplateSpecs that are merged into the pods made: containers, initContainers,
volumes and env by `name`, volumeMounts by `mountPath`, maps by key, other lists appended, scalars replaced. Our container is
`daruma`. `restartPolicy`, our labels, names, ports and the `DARUMA_*` variables stay ours. They are not checked at the door but
when the first pod is made: the event `PodNotCreated` says what is wrong, and the job stays Pending up to `pendingSeconds`.

## spec
"""


def reference() -> str:
    """Return the whole guide."""
    whole = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema = whole["properties"]
    lines = [INTRODUCTION, "| field | type | default | bounds | |", "|---|---|---|---|---|"]
    lines += [_row(path, node) for path, node in _leaves(schema["spec"], "")]
    lines += ["", "## What is refused at the door", ""]
    rules = [node["x-kubernetes-validations"] for node in (whole, schema["spec"])]
    lines += [f"* {rule['message']}." for rule in chain(*rules)]
    lines += ["", "## status", "", "| field | type |", "|---|---|"]
    lines += [f"| `{path}` | {_type(node)} |" for path, node in _leaves(schema["status"], "")]
    names = [f"{name} (`-o wide`)" if wide else name for name, _, _, wide in COLUMNS]
    lines += ["", f"Columns of `kubectl get tj`: {', '.join(names)}.", ""]
    return "\n".join(lines)


def _leaves(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        if "properties" in child:
            yield from _leaves(child, here)
        elif "properties" in child.get("items", {}):
            yield from _leaves(child["items"], f"{here}[]")
        else:
            yield here, child


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return " \\| ".join(str(value) for value in node["enum"])
    kind = str(node["type"])
    return f"{_type(node['items'])} list" if kind == "array" else kind


def _row(path: str, node: dict[str, Any]) -> str:
    bounds = []
    for key, sign in (("minimum", ">"), ("maximum", "<")):
        if key in node:
            exclusive = node.get(f"exclusive{key.capitalize()}")
            bounds.append(f"{sign}{'' if exclusive else '='} {node[key]}")
    default = f"`{node['default']}`" if "default" in node else ""
    text = node.get("description", "").replace("\n", " ")
    return f"| `{path}` | {_type(node)} | {default} | {', '.join(bounds)} | {text} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
