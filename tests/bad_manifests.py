"""Manifests that the API server and `daruma run` must refuse, and in which words."""

from typing import Any

Case = tuple[str, dict[str, Any], str]
"""Name, spec, and part of the message that both give."""

PROGRAM = {"image": "i", "command": ["c"]}
STORE = {"store": "file:///s", "claimName": "c"}

BAD: list[Case] = [
    ("no program", {"servers": {"replicas": 1}}, "program"),
    ("no command", {"program": {"image": "i"}}, "command"),
    (
        "zero servers",
        {"program": PROGRAM, "servers": {"replicas": 0}},
        "greater than or equal to 1",
    ),
    (
        "fraction 0",
        {"program": PROGRAM, "checkpoint": {**STORE, "fraction": 0}},
        "greater than 0",
    ),
    (
        "fraction 2",
        {"program": PROGRAM, "checkpoint": {**STORE, "fraction": 2}},
        "less than or equal to 1",
    ),
    (
        "unknown strategy",
        {"program": PROGRAM, "recovery": {"strategy": "Magic"}},
        "Freshest",
    ),
    (
        "no gap at all",
        {"program": PROGRAM, "recovery": {"replay": {"maxGap": 0}}},
        "greater than 0",
    ),
    (
        "negative deadline",
        {"program": PROGRAM, "recovery": {"timeouts": {"replaceSeconds": -1}}},
        "greater than 0",
    ),
    (
        "Partial without a store",
        {"program": PROGRAM, "recovery": {"strategy": "Partial"}},
        "needs spec.checkpoint.store",
    ),
    (
        "fallback without a store",
        {"program": PROGRAM, "recovery": {"fallback": ["FullCheckpoint"]}},
        "needs spec.checkpoint.store",
    ),
    (
        "Partial without saves",
        {
            "program": PROGRAM,
            "checkpoint": {**STORE, "every": 0},
            "recovery": {"strategy": "Partial"},
        },
        "set spec.checkpoint.every to 1",
    ),
    (
        "file without a claim",
        {"program": PROGRAM, "checkpoint": {"store": "file:///s"}},
        "needs spec.checkpoint.claimName",
    ),
    (
        "another store",
        {"program": PROGRAM, "checkpoint": {"store": "ftp://b/p"}},
        "must be s3://bucket/folder, gs://bucket/folder",
    ),
    (
        "a bucket without a name",
        {"program": PROGRAM, "checkpoint": {"store": "s3:///folder"}},
        "must be s3://bucket/folder, gs://bucket/folder",
    ),
    (
        "a folder above the bucket",
        {"program": PROGRAM, "checkpoint": {"store": "gs://bucket/../other"}},
        "must be s3://bucket/folder, gs://bucket/folder",
    ),
    (
        "a folder outside the claim",
        {"program": PROGRAM, "checkpoint": {**STORE, "store": "file:///saves/../../other"}},
        "without . or .. in it",
    ),
    (
        "credentials in the store's URI",
        {"program": PROGRAM, "checkpoint": {"store": "s3://id:key@bucket/p"}},
        "put them into a Secret that spec.checkpoint.secretRef names",
    ),
    (
        "a signature in the store's URI",
        {"program": PROGRAM, "checkpoint": {"store": "az://container/p?sig=x"}},
        "put them into a Secret that spec.checkpoint.secretRef names",
    ),
    (
        "a bucket with a claim",
        {"program": PROGRAM, "checkpoint": {"store": "s3://bucket/p", "claimName": "c"}},
        "claimName belongs to a file:// store",
    ),
    (
        "a claim with a Secret",
        {"program": PROGRAM, "checkpoint": {**STORE, "secretRef": {"name": "s"}}},
        "secretRef belongs to an s3://, gs:// or az:// store",
    ),
    (
        "a Secret without a store",
        {"program": PROGRAM, "checkpoint": {"secretRef": {"name": "s"}}},
        "secretRef belongs to an s3://, gs:// or az:// store",
    ),
    (
        "saves too often",
        {"program": PROGRAM, "checkpoint": {**STORE, "every": 4, "fraction": 0.125}},
        "must be at least 1",
    ),
    (
        "no worker at all to go on with",
        {"program": PROGRAM, "workers": {"minReplicas": 0}},
        "greater than or equal to 1",
    ),
    (
        "more workers to go on with than there are",
        {"program": PROGRAM, "workers": {"replicas": 2, "minReplicas": 3}},
        "minReplicas must be at most spec.workers.replicas",
    ),
    (
        "a staleness without a bound",
        {"program": PROGRAM, "consistency": {"mode": "Sync", "maxStaleness": 2}},
        "maxStaleness belongs to mode Bounded",
    ),
    (
        "a negative staleness",
        {"program": PROGRAM, "consistency": {"mode": "Bounded", "maxStaleness": -1}},
        "greater than or equal to 0",
    ),
    *(
        (
            f"copies with {strategy}",
            {
                "program": PROGRAM,
                "servers": {"replicas": 2},
                "checkpoint": STORE,
                "recovery": {"strategy": strategy, "copies": 2},
            },
            "copies goes together with Freshest or Stateless",
        )
        for strategy in ("Chain", "Partial", "FullCheckpoint")
    ),
    (
        "Chain as a fallback without replicas",
        {"program": PROGRAM, "servers": {"replicas": 2}, "recovery": {"fallback": ["Chain"]}},
        "only strategy: Chain, or copies above 1, keeps replicas",
    ),
    (
        "pulls from replicas that lag behind",
        {
            "program": PROGRAM,
            "recovery": {"chain": {"pulls": "Any", "every": 4, "ack": "None"}},
        },
        "pulls: Any needs every: 1",
    ),
    (
        "pulls from replicas under Bounded",
        {
            "program": PROGRAM,
            "consistency": {"mode": "Bounded"},
            "recovery": {"chain": {"pulls": "Any"}},
        },
        "pulls: Any needs every: 1",
    ),
    (
        "a variable's name with =",
        {"program": {**PROGRAM, "env": [{"name": "A=B", "value": "c"}]}},
        "env[0].name",
    ),
    (
        "a number where a string is wanted",
        {"program": {**PROGRAM, "args": ["--steps", 400]}},
        "args[1]",
    ),
    (
        "a string where a number is wanted",
        {"program": PROGRAM, "servers": {"replicas": "2"}},
        "servers.replicas",
    ),
    (
        "fallback to itself",
        {"program": PROGRAM, "recovery": {"strategy": "Freshest", "fallback": ["Freshest"]}},
        "twice",
    ),
]

BAD_NAMES = ["a" * 53, "a.b", "a" * 70]
"""Names of jobs that both refuse: no label or name of a pod can be made of them."""


def manifest(spec: dict[str, Any], name: Any = "bad") -> dict[str, Any]:
    """Wrap a spec into a TrainingJob."""
    return {
        "apiVersion": "daruma.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": spec,
    }
