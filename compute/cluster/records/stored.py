"""What every record has in common: a kind, a key, a schema that is upgraded when an older one is read."""

import json
import re
import uuid as uuid_module
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from compute.cluster.state.protocol import ABSENT
from compute.errors import Invalid
from compute.wire.codec import from_plain, to_plain

METADATA_BYTES = 2**16
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object with a place in the state store. `revision` is that of its record, never part of it."""

    KIND: ClassVar[str] = ""
    SCHEMA: ClassVar[int] = 1
    UPGRADES: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    """schema n → function that turns a record of schema n into one of schema n + 1."""
    revision: int = field(default=ABSENT, compare=False)

    @property
    def id(self) -> str:
        return str(getattr(self, "uuid", "") or getattr(self, "name", ""))

    @property
    def key(self) -> str:
        return f"{self.KIND}/{self.id}"

    def encode(self) -> bytes:
        plain = {"schema": self.SCHEMA, **to_plain(self)}
        del plain["revision"]
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, value: bytes, revision: int) -> Self:
        """Raises Invalid for a record of a newer program."""
        plain = json.loads(value, parse_constant=lambda _: None)  # 0.1 let NaN and Infinity in
        for schema in range(plain.get("schema", 1), cls.SCHEMA):
            plain = cls.UPGRADES[schema](plain)
        if plain.get("schema", 1) > cls.SCHEMA:
            raise Invalid(f"a {cls.KIND} was written by a newer version of sf", hint="upgrade this node")
        return from_plain(cls, {**plain, "revision": revision})


def new_uuid() -> str:
    return str(uuid_module.uuid4())


def check_name(name: str, what: str) -> str:
    """Letters, digits, dot, dash, underscore; at most 63. Raises Invalid."""
    if not _NAME.fullmatch(name):
        raise Invalid(f"not a {what}: {name[:80]!r}", hint="1 to 63 letters, digits, dots, dashes, or _")
    return name


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises Invalid: each node and each listing of its kind has all of it."""
    if len(json.dumps(metadata)) > METADATA_BYTES:
        raise Invalid(f"an object has at most {METADATA_BYTES} bytes of metadata")
