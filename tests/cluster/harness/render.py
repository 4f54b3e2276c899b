"""Render manifests/install.yaml from the chart with the real Helm; used by `make manifests`."""

import subprocess
import sys

import parts

NAMESPACE = "daruma-system"
HEADER = "# Rendered from charts/daruma by `make manifests`; do not edit. Apply crd.yaml as well.\n"
NAMESPACE_OBJECT = f"""---
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


def render() -> str:
    """Return the text of install.yaml."""
    chart = subprocess.run(
        [str(parts.helm()), "template", "daruma", str(parts.ROOT / "charts/daruma"),
         "--namespace", NAMESPACE, "--kube-version", parts.KUBERNETES],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    return HEADER + NAMESPACE_OBJECT + chart


if __name__ == "__main__":
    sys.stdout.write(render())
