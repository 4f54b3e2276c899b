"""Parse JSON into dataclasses, by their types, and back; what does not fit is refused by its name.

Members and the operator parse each other's reports all the time: what a type asks for is looked up
once, and what it makes of it is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Parser = Callable[[Any], Any]
_LEAVES = frozenset((bool, float, int, str, NoneType))


class ContractError(ValueError):
    """A control message that is not one: the sender is of another version, or not ours."""


class _MisfitError(Exception):
    """What is wrong, and where: each value that holds it adds its part of the path in front."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.path = ""


def parse_message(kind: type[T], raw: Any) -> T:
    """Make a dataclass of what its fields name; ContractError names the first that is wrong.

    Unknown fields are passed over, so that an operator of a newer version can still speak to the
    pods of jobs that it did not start.
    """
    if not isinstance(raw, dict):
        raise ContractError(f"{kind.__name__}: expected an object, got {raw!r:.80}")
    try:
        made: T = _parser(cast("Any", kind))(raw)
    except _MisfitError as error:
        raise ContractError(f"{kind.__name__}{error.path}: {error.what}") from error
    return made


def plain(message: Any) -> dict[str, Any]:
    """Return what `parse_message` makes a message of again: plain JSON values."""
    kind: Any = type(message)
    return {name: _plain(getattr(message, name)) for name in _names(kind) or ()}


def _plain(value: Any) -> Any:
    kind: Any = type(value)
    if kind in _LEAVES:
        return value
    if _names(kind) is not None:
        return plain(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


@cache
def _names(kind: Any) -> tuple[str, ...] | None:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None


@cache
def _parser(kind: Any) -> Parser:
    """Return what makes a value of this type of JSON, or raises _MisfitError."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return _union(_parser(args[0]), optional=NoneType in args)
    if origin is tuple:
        inner = [_parser(arg) for arg in args if arg is not Ellipsis]
        return _tuple(kind, inner, many=args[-1] is Ellipsis)
    if origin is Mapping:
        return _mapping(kind, _parser(args[1]))
    if isinstance(kind, type) and is_dataclass(kind):
        return _object(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _choice(kind)
    return _number if kind is float else _scalar(kind)


def _misfit(kind: Any, raw: Any) -> _MisfitError:
    return _MisfitError(f"expected {getattr(kind, '__name__', kind)}, got {raw!r:.80}")


def _union(inner: Parser, *, optional: bool) -> Parser:
    return lambda raw: None if raw is None and optional else inner(raw)


def _tuple(kind: Any, inner: list[Parser], *, many: bool) -> Parser:
    """`many`: as many as there are, all made by the first."""

    def parse(raw: Any) -> Any:
        if not isinstance(raw, list | tuple) or not (many or len(raw) == len(inner)):
            raise _misfit(kind, raw)
        try:
            if many:
                return tuple(map(inner[0], raw))
            return tuple(make(value) for make, value in zip(inner, raw, strict=True))
        except _MisfitError as error:
            error.path = f"[]{error.path}"
            raise

    return parse


def _mapping(kind: Any, inner: Parser) -> Parser:
    def parse(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _misfit(kind, raw)
        made = {}
        for key, value in raw.items():
            try:
                made[str(key)] = inner(value)
            except _MisfitError as error:
                error.path = f"[{key}]{error.path}"
                raise
        return made

    return parse


def _object(kind: type[Any]) -> Parser:
    hints = get_type_hints(kind)
    known = [(field.name, _parser(hints[field.name])) for field in fields(kind)]

    def parse(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _misfit(kind, raw)
        made = {}
        for name, make in known:
            if name in raw:
                try:
                    made[name] = make(raw[name])
                except _MisfitError as error:
                    error.path = f".{name}{error.path}"
                    raise
        try:
            return kind(**made)
        except TypeError as error:
            raise _MisfitError(str(error)) from error

    return parse


def _choice(kind: type[StrEnum]) -> Parser:
    values = {str(value): value for value in kind}

    def parse(raw: Any) -> Any:
        found = values.get(raw) if isinstance(raw, str) else None
        if found is None:
            raise _misfit(kind, raw)
        return found

    return parse


def _number(raw: Any) -> float:
    if type(raw) is float:
        return raw
    if type(raw) is int and not _huge(raw):
        return float(raw)
    raise _misfit(float, raw)


def _scalar(kind: Any) -> Parser:
    def parse(raw: Any) -> Any:
        if kind not in (str, bool, int) or type(raw) is not kind or (kind is int and _huge(raw)):
            raise _misfit(kind, raw)
        return raw

    return parse


def _huge(number: int) -> bool:
    # Nothing here counts further than 63 bits, and arrays of it are int64.
    return bool(abs(number) >> 63)
