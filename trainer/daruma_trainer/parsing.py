"""Parse JSON into dataclasses, by their types; whatever does not fit is refused by its name."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ContractError(ValueError):
    """A control message that is not one: the sender is of another version, or not ours."""


def parse_message(kind: type[T], raw: Any) -> T:
    """Make a dataclass of what its fields name; ContractError names the first that is wrong."""
    if not isinstance(raw, dict):
        raise ContractError(f"{kind.__name__}: expected an object, got {raw!r:.80}")
    return _parse_fields(kind, raw, kind.__name__)


def _parse(kind: Any, raw: Any, at: str) -> Any:
    """Make a value of the type `kind` of JSON, or say which field (`at`) is wrong.

    Unknown fields are passed over, so that an operator of a newer version can still speak to the
    pods of jobs that it did not start.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if raw is None and NoneType in args else _parse(args[0], raw, at)
    if origin is tuple and isinstance(raw, list | tuple):
        kinds = repeat(args[0]) if args[-1] is Ellipsis else args
        if args[-1] is Ellipsis or len(args) == len(raw):
            return tuple(_parse(k, r, f"{at}[]") for k, r in zip(kinds, raw, strict=False))
    if origin is Mapping and isinstance(raw, dict):
        return {str(key): _parse(args[1], value, f"{at}[{key}]") for key, value in raw.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(raw, dict):
        return _parse_fields(kind, raw, at)
    return _parse_scalar(kind, raw, at)


def _parse_scalar(kind: Any, raw: Any, at: str) -> Any:
    # Nothing here counts further than 63 bits, and arrays of it are int64.
    huge = type(raw) is int and bool(abs(raw) >> 63)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if isinstance(raw, str) and raw in set(kind):
            return kind(raw)
    elif kind is float and type(raw) in (int, float) and not huge:
        return float(raw)
    elif kind in (str, bool, int) and type(raw) is kind and not huge:
        return raw
    raise ContractError(f"{at}: expected {getattr(kind, '__name__', kind)}, got {raw!r:.80}")


@lru_cache(maxsize=64)
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Fields' types; a view holds dozens of reports, and looking them up is half of the work."""
    return get_type_hints(kind)


def _parse_fields(kind: type[T], raw: Mapping[str, Any], at: str) -> T:
    hints = _hints(cast("Any", kind))
    known = {
        f.name: _parse(hints[f.name], raw[f.name], f"{at}.{f.name}")
        for f in fields(cast("type[Any]", kind))
        if f.name in raw
    }
    try:
        return kind(**known)
    except TypeError as error:
        raise ContractError(f"{at}: {error}") from error
