"""Pods as Kubernetes has them: the manifest of a member's pod, and the facts of one that is there.

Pure: dictionaries in, dictionaries or facts out.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from daruma_operator.api.job import API_VERSION, KIND, TrainingJob
from daruma_operator.substrate.protocol import PodFacts, PodPlan, PodState
from daruma_trainer.contract import (
    AGENT_PORT,
    DATA_PORT,
    ENV_INCARNATION,
    ENV_INDEX,
    ENV_JOB,
    ENV_NAMESPACE,
    ENV_ROLE,
    ENV_TOKEN_FILE,
    STORE_MOUNT,
    Role,
)

CONTAINER = "daruma"
LABEL = "daruma.dev"
TOKEN_FOLDER = "/var/run/daruma"  # noqa: S105 - a path
USER = 65532
"""Numeric, so that the kubelet can see that it is not root."""
DISRUPTIONS = frozenset(
    {"Preempting", "Preempted", "Evicted", "NodeShutdown", "Shutdown", "Terminated", "NodeLost"}
)
"""Reasons of pods that the cluster took; such a loss never counts as a failure."""
_MERGED_BY = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}
"""Lists of a template that are merged by a key; other lists are appended."""


def labels_of(job: TrainingJob, plan: PodPlan) -> dict[str, str]:
    """Return the labels of a member's pod."""
    return {
        f"{LABEL}/job": job.name,
        f"{LABEL}/role": plan.role.value.lower(),
        f"{LABEL}/index": str(plan.index),
        f"{LABEL}/incarnation": str(plan.incarnation),
        "app.kubernetes.io/name": "daruma",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/component": plan.role.value.lower(),
        "app.kubernetes.io/managed-by": "daruma-operator",
    }


def owner(job: TrainingJob) -> dict[str, Any]:
    """Return the owner reference by which the garbage collector removes what belongs to a job."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def token_secret(job: TrainingJob) -> str:
    """Name the Secret that holds the job's token."""
    return f"{job.name}-token-{job.uid[:8]}"


def pod_manifest(job: TrainingJob, plan: PodPlan) -> dict[str, Any]:
    """Return the pod of a plan: ours, with the user's template merged in, ours again on top."""
    part = job.spec.servers if plan.role is Role.SERVER else job.spec.workers
    ours = _our_pod(job, plan)
    pod = merge(ours, part.template or {})
    pod["metadata"]["labels"] |= labels_of(job, plan)
    pod["metadata"] |= {k: ours["metadata"][k] for k in ("name", "namespace", "ownerReferences")}
    pod["spec"]["restartPolicy"] = "Never"
    container = next(c for c in pod["spec"]["containers"] if c["name"] == CONTAINER)
    container["ports"] = ours["spec"]["containers"][0]["ports"]
    fixed = {
        e["name"]: e for e in ours["spec"]["containers"][0]["env"][: len(_identity(job, plan))]
    }
    container["env"] = [fixed.get(e["name"], e) for e in container["env"]]
    return {"apiVersion": "v1", "kind": "Pod", **pod}


def merge(base: Any, over: Any, field: str = "") -> Any:
    """Merge a template: maps by key, named lists by name, others appended, scalars replaced."""
    if isinstance(base, dict) and isinstance(over, Mapping):
        both = {k: merge(base[k], over[k], k) for k in base if k in over}
        return {**base, **over, **both}
    if isinstance(base, list) and isinstance(over, Sequence) and not isinstance(over, str):
        key = _MERGED_BY.get(field)
        if key is None:
            return [*base, *over]
        given = {item.get(key): item for item in over}
        known = {item.get(key) for item in base}
        return [
            *(
                merge(item, given[item.get(key)]) if item.get(key) in given else item
                for item in base
            ),
            *(item for item in over if item.get(key) not in known),
        ]
    return over


def pod_facts(raw: Mapping[str, Any]) -> PodFacts | None:
    """Read the facts of a pod, or None if it is no member's."""
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = meta.get("labels", {})
    try:
        role = Role(labels[f"{LABEL}/role"].capitalize())
        index, incarnation = int(labels[f"{LABEL}/index"]), int(labels[f"{LABEL}/incarnation"])
    except (KeyError, ValueError):
        return None
    state, ended = _state(status)
    disrupted = (
        any(
            c.get("type") == "DisruptionTarget" and c.get("status") == "True"
            for c in status.get("conditions", [])
        )
        or status.get("reason") in DISRUPTIONS
    )
    reason, message = _why(status, ended, state)
    created = meta.get("creationTimestamp")
    return PodFacts(
        meta["name"],
        meta["uid"],
        role,
        index,
        incarnation,
        state,
        f"{status['podIP']}:{DATA_PORT}" if status.get("podIP") else None,
        spec.get("nodeName"),
        "deletionTimestamp" in meta,
        datetime.fromisoformat(created) if created else None,
        ended.get("exitCode"),
        reason,
        message,
        disrupted,
    )


def _state(status: Mapping[str, Any]) -> tuple[PodState, Mapping[str, Any]]:
    """A container's state is there a second before the pod's phase."""
    container: Mapping[str, Any] = next(
        (c for c in status.get("containerStatuses", []) if c.get("name") == CONTAINER), {}
    )
    state = container.get("state", {})
    if "terminated" in state:
        return PodState.TERMINATED, state["terminated"]
    if status.get("phase") in ("Failed", "Succeeded"):
        return PodState.TERMINATED, {}
    return (PodState.RUNNING if "running" in state else PodState.WAITING), {}


def _why(
    status: Mapping[str, Any], ended: Mapping[str, Any], state: PodState
) -> tuple[str | None, str | None]:
    if state is PodState.TERMINATED:
        return (
            ended.get("reason") or status.get("reason"),
            ended.get("message") or status.get("message"),
        )
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if container.get("name") == CONTAINER and waiting:
            return waiting.get("reason"), waiting.get("message")
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return condition.get("reason"), condition.get("message")
    return None, None


def _identity(job: TrainingJob, plan: PodPlan) -> dict[str, str]:
    return {
        ENV_NAMESPACE: job.namespace,
        ENV_JOB: job.name,
        ENV_ROLE: plan.role.value,
        ENV_INDEX: str(plan.index),
        ENV_INCARNATION: str(plan.incarnation),
        ENV_TOKEN_FILE: f"{TOKEN_FOLDER}/token",
    }


def _our_pod(job: TrainingJob, plan: PodPlan) -> dict[str, Any]:
    server = plan.role is Role.SERVER
    env: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in _identity(job, plan).items()]
    mounts = [
        {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "token", "secret": {"secretName": token_secret(job), "defaultMode": 0o440}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if server and job.spec.checkpoint.claim_name:
        mounts.append({"name": "store", "mountPath": STORE_MOUNT})
        claim = {"claimName": job.spec.checkpoint.claim_name}
        volumes.append({"name": "store", "persistentVolumeClaim": claim})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.spec.program.image,
        "env": env,
        "ports": [
            {"name": "data", "containerPort": DATA_PORT},
            {"name": "agent", "containerPort": AGENT_PORT},
        ],
        "volumeMounts": mounts,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if server:
        container["image"] = job.spec.servers.image or job.spec.program.image
        container["command"] = ["daruma-server"]
        secret = job.spec.checkpoint.secret_ref
        if secret is not None:
            # Servers alone speak to the store; a program that anyone wrote must not have its keys.
            container["envFrom"] = [{"secretRef": {"name": secret.name, "optional": False}}]
    else:
        container["command"] = list(job.spec.program.command)
        container["args"] = list(job.spec.program.args)
        taken = {e["name"] for e in env}
        env += [
            e.model_dump(by_alias=True, exclude_none=True)
            for e in job.spec.program.env
            if e.name not in taken
        ]
    part = job.spec.servers if server else job.spec.workers
    if part.resources:
        container["resources"] = dict(part.resources)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if server:
        spec["affinity"] = _apart(job)
    return {
        "metadata": {
            "name": plan.name,
            "namespace": job.namespace,
            "labels": labels_of(job, plan),
            "ownerReferences": [owner(job)],
        },
        "spec": spec,
    }


def _apart(job: TrainingJob) -> dict[str, Any]:
    """Servers of a job on different nodes, where there are enough: one node, one loss."""
    term = {
        "labelSelector": {"matchLabels": {f"{LABEL}/job": job.name, f"{LABEL}/role": "server"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    wish = {"weight": 100, "podAffinityTerm": term}
    return {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}
