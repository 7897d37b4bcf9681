"""Dataclasses to JSON and back, by their type hints: for the state store, records on disk and the wire to agents.

Unknown keys are dropped on read and missing ones take the field's default, so that two versions of the program can
read each other's values during a rolling upgrade.
"""

import base64
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from compute.errors import Invalid

T = TypeVar("T")


def _bytes(value: Any) -> bytes:
    with suppress(ValueError, TypeError):
        return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
    raise ValueError("not base64")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


Base64 = Annotated[bytes, PlainValidator(_bytes), PlainSerializer(_text)]
"""Bytes that travel as base64 in its usual alphabet: pydantic's own has another, which older agents refuse."""


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def alike(cls: type, of: object) -> dict[str, Any]:
    """The fields of a dataclass that something else has under the same names, as it has them."""
    return {field.name: getattr(of, field.name) for field in fields(cls) if hasattr(of, field.name)}


def to_plain(value: Any, hint: Any = None) -> Any:
    """What `json.dumps` takes. `hint` where the type does not say it: a plain tuple, bytes."""
    return _adapter(hint or type(value)).dump_python(value, mode="json")


def to_json(value: Any) -> bytes:
    return _adapter(type(value)).dump_json(value)


def from_plain(hint: type[T], value: Any) -> T:
    """The value of type `hint` behind plain JSON. Raises Invalid."""
    try:
        found: T = _adapter(hint).validate_python(value)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"not a {getattr(hint, '__name__', hint)}: {where}: {first['msg']}") from err
    return found
