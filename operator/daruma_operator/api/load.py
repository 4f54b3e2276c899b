"""Read a manifest from a file, as `kubectl apply` and the API server would."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from daruma_operator.api.job import API_VERSION, KIND, TrainingJob
from daruma_operator.api.rules import NAME_FORM, NAME_PATTERN
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.wrong import sentence
from daruma_operator.errors import ManifestError

MAX_BYTES = 1 << 20
"""The API server takes no larger object either."""


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a key that is there twice is a mistake, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r:.80} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


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
    raw = _document(text, name)
    if raw.get("apiVersion") != API_VERSION or raw.get("kind") != KIND:
        found = f"{raw.get('apiVersion')} {raw.get('kind')}"
        raise ManifestError(f"{name} is a {found}: write apiVersion: {API_VERSION}, kind: {KIND}")
    meta = raw.get("metadata")
    if not isinstance(meta, dict) or meta.get("name") is None:
        raise ManifestError(f"{name}: metadata.name is missing: name the job")
    # They become names of folders and pods.
    for field in ("name", "namespace"):
        value = meta.get(field) or "default"
        if not isinstance(value, str):
            raise ManifestError(f"{name}: metadata.{field} {value!r:.80}: write it in quotes")
        if not re.fullmatch(NAME_PATTERN, value):
            raise ManifestError(f"{name}: metadata.{field} {value!r:.80} {NAME_FORM}")
    unknown = sorted(set(raw) - {"apiVersion", "kind", "metadata", "spec", "status"})
    if unknown:
        raise ManifestError(f"{name}: unknown field {unknown[0]!r} at the top level")
    try:
        # Strict, and of JSON: the API server takes no "2" for a 2 either.
        spec = TrainingJobSpec.model_validate_json(_json(raw.get("spec"), name), strict=True)
    except ValidationError as error:
        lines = [sentence(found) for found in error.errors()]
        raise ManifestError("\n".join(f"{name}: {line}" for line in lines)) from error
    problems = spec.problems(local=local)
    if problems:
        raise ManifestError("\n".join(f"{name}: {problem}" for problem in problems))
    return TrainingJob(name=meta["name"], namespace=meta.get("namespace") or "default", spec=spec)


def _document(text: bytes | str, name: str) -> dict[str, Any]:
    try:
        documents = [d for d in yaml.load_all(text, _Loader) if d is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" (line {where.line + 1}, column {where.column + 1})" if where else ""
        raise ManifestError(
            f"{name} is not YAML{at}: {getattr(error, 'problem', error)}"
        ) from error
    if len(documents) != 1:
        raise ManifestError(f"{name} holds {len(documents)} documents; one TrainingJob is expected")
    if not isinstance(documents[0], dict):
        raise ManifestError(f"{name} holds no map of fields; one TrainingJob is expected")
    return documents[0]


def _json(spec: Any, name: str) -> str:
    """Return it as JSON without nulls, which the API server takes for fields that are not there.

    What YAML's aliases make of a small file is not small, and bounded as well.
    """
    parts, size = [], 0
    try:
        for part in json.JSONEncoder(default=str).iterencode(spec):
            size += len(part)
            if size > MAX_BYTES:
                raise ManifestError(f"{name}: spec is larger than {MAX_BYTES} bytes")
            parts.append(part)
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{name}: spec is nothing that JSON can hold: {error}") from error
    return json.dumps(json.loads("".join(parts), object_pairs_hook=_given))


def _given(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}
