"""Objects of the API server as jobs, also where this version cannot read what was written.

The definition may be newer than the operator: unknown fields are passed over, but there may be
values that it does not know. Such a job trains, and is looked after as it was before the edit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.wrong import sentence
from daruma_operator.substrate.protocol import JobKey

ADVICE = "correct it, or run the version of the operator that the definition belongs to"
NOBODY = f"{ADVICE}; until then nobody looks after the job"
_MOST_TOLD = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """What an object says; `job` is None where that much cannot be read."""

    job: TrainingJob | None
    problem: str | None = None
    """What of it is not read, and what to do."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """A spec that could be read, as it came."""

    uid: str
    generation: int
    raw: Any


class Reader:
    """Reads jobs, and keeps of each the last spec that it could read."""

    def __init__(self) -> None:
        self._specs: dict[JobKey, _Spec] = {}

    def read(self, raw: Mapping[str, Any]) -> Reading:
        """Return the job; of one whose spec cannot be read, with the last spec that could be."""
        meta = raw["metadata"]
        key = JobKey(meta["namespace"], meta["name"])
        try:
            job = TrainingJob.from_wire(raw)
        except ValidationError:
            return self._read_with_last_spec(key, raw)
        self._specs[key] = _Spec(job.uid, job.generation, raw["spec"])
        return Reading(job)

    def _read_with_last_spec(self, key: JobKey, raw: Mapping[str, Any]) -> Reading:
        meta, last = raw["metadata"], self._specs.get(key)
        wrong = _wrong_spec(raw.get("spec"))
        if wrong is None:
            return _with_this_spec(raw)
        if last is None or last.uid != meta["uid"]:
            return Reading(None, f"{wrong}; {NOBODY}")
        # The generation, too: status.observedGeneration says which spec is followed.
        meta = {**meta, "generation": last.generation}
        found = _with_this_spec({**raw, "metadata": meta, "spec": last.raw})
        problem = f"{wrong}; {ADVICE}; until then the spec of generation {last.generation} holds"
        return Reading(found.job, found.problem or problem)

    def forget(self, key: JobKey) -> None:
        """The job is gone."""
        self._specs.pop(key, None)


def _wrong_spec(spec: Any) -> str | None:
    try:
        TrainingJobSpec.model_validate(spec, extra="ignore")
    except ValidationError as error:
        return "; ".join(sentence(found) for found in error.errors()[:_MOST_TOLD])
    return None


def _with_this_spec(raw: Mapping[str, Any]) -> Reading:
    """Read an object whose spec is good, and whose status need not be."""
    try:
        return Reading(TrainingJob.from_wire(raw))
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(["status", *map(str, found["loc"])])
        return Reading(None, f"{field}: {found['msg']}; {NOBODY}")
