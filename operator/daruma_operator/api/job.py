"""A TrainingJob as the operator reads it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.status import TrainingJobStatus

GROUP = "daruma.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TrainingJob"
PLURAL = "trainingjobs"


class TrainingJob(BaseModel):
    """Metadata that matters, spec and status."""

    model_config = ConfigDict(frozen=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    created_at: datetime | None = None
    deletion_timestamp: datetime | None = None
    spec: TrainingJobSpec
    status: TrainingJobStatus = Field(default_factory=TrainingJobStatus)

    @classmethod
    def from_wire(cls, raw: Mapping[str, Any]) -> "TrainingJob":
        """Parse an object of the API server; pydantic.ValidationError if it is none of ours.

        Unknown fields are passed over: a newer definition fills its defaults into old objects.
        """
        meta = raw["metadata"]
        return cls(
            name=meta["name"],
            namespace=meta.get("namespace", "default"),
            uid=meta.get("uid", ""),
            generation=meta.get("generation", 1),
            resource_version=meta.get("resourceVersion", ""),
            created_at=meta.get("creationTimestamp"),
            deletion_timestamp=meta.get("deletionTimestamp"),
            spec=TrainingJobSpec.model_validate(raw.get("spec"), extra="ignore"),
            status=TrainingJobStatus.model_validate(raw.get("status") or {}),
        )

    def status_to_wire(self) -> dict[str, Any]:
        """Return the status as JSON values, in camelCase."""
        return self.status.model_dump(mode="json", by_alias=True)
