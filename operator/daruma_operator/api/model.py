"""What all API types share: frozen, snake_case here and camelCase on the wire."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class SpecModel(BaseModel):
    """Part of a spec: unknown fields are refused in a manifest, and passed over in a cluster."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid"
    )


class StatusModel(BaseModel):
    """Part of a status: unknown fields of other versions are passed over."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore"
    )


def rule(expression: str, message: str) -> dict[str, str]:
    """Return a CEL validation: what must hold, and what to do where it does not."""
    return {"rule": expression, "message": message}


def cel(*rules: dict[str, str]) -> dict[str, Any]:
    """Attach CEL validations to a model or field of the schema."""
    return {"x-kubernetes-validations": list(rules)}


def free(**more: Any) -> dict[str, Any]:
    """Describe an object whose fields Kubernetes knows and this schema does not list."""
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, **more}


Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
"""A duration in seconds, above 0 and at most a year."""
