"""Say in a sentence what is wrong with a field of a manifest, and what to write instead."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from daruma_operator.api.spec import TrainingJobSpec

_MOST_SHOWN = 60
_ALIKE = 0.78
"""At least so similar (0 to 1) is a name that may have been meant."""
_KINDS = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "tuple_type": "a list",
    "model_type": "a map of fields",
    "dict_type": "a map of fields",
}
"""Pydantic's types of errors, in the words of YAML."""


def sentence(found: ErrorDetails) -> str:
    """Return `spec.field: what is wrong, what to do` of one error of TrainingJobSpec."""
    place, kind = found["loc"], found["type"]
    field = "spec"
    for part in place:
        field += f"[{part}]" if isinstance(part, int) else f".{part}"
    if kind == "extra_forbidden":
        return f"{field}: there is no such field; {_near(place)}"
    if kind == "missing":
        return f"{field}: is missing and has no default"
    given = found["input"]
    if kind == "string_type" and isinstance(given, int | float):
        return f"{field}: should be a string, not {_shown(given)}: write it in quotes"
    if kind in _KINDS:
        return f"{field}: should be {_KINDS[kind]}, not {_shown(given)}"
    if kind in ("too_short", "string_too_short"):
        return f"{field}: should not be empty"
    text = found["msg"].removeprefix("Input ")
    return f"{field}: {text[0].lower()}{text[1:]}, not {_shown(given)}"


def _shown(given: Any) -> str:
    text = json.dumps(given, ensure_ascii=False)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _near(place: Sequence[int | str]) -> str:
    """Name the field that may have been meant, or those that there are."""
    known = _fields(place[:-1])
    wanted = str(place[-1])
    same = [name for name in known if name.lower() == wanted.lower()]
    near = same or difflib.get_close_matches(wanted, known, 1, _ALIKE)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _fields(place: Sequence[int | str]) -> list[str]:
    """Return the names of the fields of the model at a place of the spec."""
    model: type[BaseModel] = TrainingJobSpec
    for part in place:
        fields: Mapping[str, Any] = {f.alias or n: f for n, f in model.model_fields.items()}
        if part in fields:
            annotation = fields[str(part)].annotation
            inner = (annotation, *get_args(annotation))
            model = next(t for t in inner if isinstance(t, type) and issubclass(t, BaseModel))
    return [f.alias or name for name, f in model.model_fields.items()]
