"""Read a manifest from a file, as `kubectl apply` and the API server would."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from daruma_operator.api.job import API_VERSION, KIND, TrainingJob
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.errors import ManifestError

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")
MAX_BYTES = 1 << 20
"""The API server takes no larger object either."""


def load_manifest(path: Path, *, local: bool = False) -> TrainingJob:
    """Read one TrainingJob; ManifestError has a line for each problem.

    `local`: for `daruma run`, which needs no claim and always has a store.
    """
    try:
        text = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise ManifestError(f"{path} is larger than {MAX_BYTES} bytes")
    return parse_manifest(text, str(path), local=local)


def parse_manifest(text: bytes | str, name: str, *, local: bool = False) -> TrainingJob:
    """Like `load_manifest`, of a text; `name` stands in messages."""
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" (line {where.line + 1}, column {where.column + 1})" if where else ""
        raise ManifestError(
            f"{name} is not YAML{at}: {getattr(error, 'problem', error)}"
        ) from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ManifestError(f"{name} holds {len(documents)} documents; one TrainingJob is expected")
    raw: dict[str, Any] = documents[0]
    if raw.get("apiVersion") != API_VERSION or raw.get("kind") != KIND:
        found = f"{raw.get('apiVersion')} {raw.get('kind')}"
        raise ManifestError(f"{name} is a {found}: write apiVersion: {API_VERSION}, kind: {KIND}")
    meta = raw.get("metadata")
    if not isinstance(meta, dict) or not isinstance(meta.get("name"), str):
        raise ManifestError(f"{name}: metadata.name is missing: name the job")
    # They become names of folders and pods.
    for field in ("name", "namespace"):
        value = meta.get(field) or "default"
        if not isinstance(value, str) or not _LABEL.fullmatch(value):
            raise ManifestError(
                f"{name}: metadata.{field} {value!r:.80} is no DNS label: write at most 52 "
                "lower-case letters, digits and dashes, with no dash at either end"
            )
    unknown = sorted(set(raw) - {"apiVersion", "kind", "metadata", "spec", "status"})
    if unknown:
        raise ManifestError(f"{name}: unknown field {unknown[0]!r} at the top level")
    try:
        spec = TrainingJobSpec.model_validate(raw.get("spec"))
    except ValidationError as error:
        lines = [_sentence(found["loc"], found["type"], found["msg"]) for found in error.errors()]
        raise ManifestError("\n".join(f"{name}: {line}" for line in lines)) from error
    problems = spec.problems(local=local)
    if problems:
        raise ManifestError("\n".join(f"{name}: {problem}" for problem in problems))
    return TrainingJob(name=meta["name"], namespace=meta.get("namespace") or "default", spec=spec)


def _sentence(place: Sequence[int | str], kind: str, message: str) -> str:
    field = "spec"
    for part in place:
        field += f"[{part}]" if isinstance(part, int) else f".{part}"
    if kind == "extra_forbidden":
        return f"{field}: there is no such field; see the TrainingJob guide for those there are"
    if kind == "missing":
        return f"{field}: is missing and has no default"
    return f"{field}: {message[0].lower()}{message[1:]}"
