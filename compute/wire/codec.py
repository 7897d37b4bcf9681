"""Frozen dataclasses to JSON and back, by their type hints: for the state store and for the wire to agents.

bytes travel as base64, enums and addresses as their text. Unknown keys are dropped on read and missing ones take the
field's default, so that two versions of the program can read each other's values during a rolling upgrade.
"""

import base64
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from compute.errors import Invalid

T = TypeVar("T")

_TEXT = (IPv4Address, IPv4Network, Path)


@cache
def _plan(cls: type) -> tuple[tuple[str, Any, bool], ...]:
    """(field, type, required) of a dataclass, resolved once per class."""
    hints = get_type_hints(cls)
    return tuple(
        (f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
        if f.metadata.get("stored", True)
    )


def to_plain(value: Any) -> Any:
    """What `json.dumps` takes."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, _TEXT):
        return str(value)
    if is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name, _, _ in _plan(cast(Any, type(value)))}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [to_plain(item) for item in value]
    raise TypeError(f"no plain form of {type(value).__name__}")


def from_plain(hint: type[T], value: Any) -> T:
    """The value of type `hint` behind plain JSON. Raises Invalid."""
    try:
        return cast(T, _read(hint, value))
    except (TypeError, ValueError, KeyError, AttributeError) as err:
        raise Invalid(f"not a {getattr(hint, '__name__', hint)}: {err}") from err


def _read(hint: Any, value: Any) -> Any:
    if hint is Any or hint in (str, int, bool, types.NoneType):
        return value
    if is_dataclass(hint):
        known = {}
        for name, kind, required in _plan(cast(Any, hint)):
            if name in value:
                known[name] = _read(kind, value[name])
            elif required:
                raise ValueError(f"{name} is missing")
        return cast(Any, hint)(**known)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _read(next(a for a in get_args(hint) if a is not types.NoneType), value)
    if origin in (tuple, list, frozenset):
        arguments = get_args(hint)
        if origin is tuple and Ellipsis not in arguments:
            return tuple(_read(kind, item) for kind, item in zip(arguments, value, strict=True))
        return origin(_read(arguments[0], item) for item in value)
    if origin in (dict, Mapping):
        key_hint, item_hint = get_args(hint)
        return {_read(key_hint, key): _read(item_hint, item) for key, item in value.items()}
    if hint is bytes:
        return base64.b64decode(value, validate=True)
    return hint(value)
