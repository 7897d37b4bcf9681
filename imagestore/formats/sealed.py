"""Small JSON objects of a store with their own checksum, for what is not named by its digest.

`{"format": 1, …, "seal": "b3:<BLAKE3 of the canonical JSON without it>"}`: one value has one encoding, and a
changed bit anywhere in it is noticed.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from imagestore.errors import Corrupt, Invalid, Unsupported
from imagestore.formats.digest import Digest
from imagestore.outside import read_json

FORMAT = 1
T = TypeVar("T")


def seal(body: dict[str, Any]) -> bytes:
    """The object's bytes."""
    whole = {"format": FORMAT, **body}
    return _canonical({**whole, "seal": str(Digest.of(_canonical(whole)))})


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The body. Raises Corrupt, and Unsupported for a later format that is intact."""
    try:
        body = read_json(data)
    except ValueError as err:
        raise Corrupt(f"{what}: not JSON, or damaged: {err}") from err
    if not isinstance(body, dict) or _canonical(body) != data:
        raise Corrupt(f"{what}: not in canonical form, or damaged")
    if body.pop("seal", None) != str(Digest.of(_canonical(body))):
        raise Corrupt(f"{what}: the content does not match its seal")
    if body.pop("format", None) != FORMAT:
        raise Unsupported(f"{what} has a later format", hint="a newer sf wrote it: upgrade")
    return body


def decode(data: bytes, what: str, take: Callable[[dict[str, Any]], T]) -> T:
    """What `take` makes of the body. Raises Corrupt where that is not what it expects, and as `unseal` does."""
    body = unseal(data, what)
    try:
        return take(body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, Invalid) as err:
        raise Corrupt(f"{what}: {err}") from err


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
