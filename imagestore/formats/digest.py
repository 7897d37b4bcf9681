"""Digests: BLAKE3-256, the only hash that names things here (https://github.com/BLAKE3-team/BLAKE3-specs)."""

import re
from typing import Self

from blake3 import blake3

from imagestore.errors import Invalid

Buffer = bytes | bytearray | memoryview
_HEX = re.compile(r"[0-9a-f]{64}")

SIZE_BYTES = 32


class Digest(bytes):
    """The 32 bytes of a BLAKE3 hash. `str()` gives the form people see: `b3:` and 64 hex digits."""

    __slots__ = ()

    def __new__(cls, raw: bytes) -> Self:
        if len(raw) != SIZE_BYTES:
            raise Invalid(f"a digest has {SIZE_BYTES} bytes, not {len(raw)}")
        return super().__new__(cls, raw)

    @classmethod
    def of(cls, data: Buffer) -> Self:
        """Hash `data`."""
        return cls(blake3(data).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `b3:<64 hex>` or the bare hex digits. Raises Invalid."""
        digits = text.removeprefix("b3:")
        if not _HEX.fullmatch(digits):
            raise Invalid(f"not a digest: {text[:80]!r}", hint="a digest is b3: and 64 hex digits")
        return cls(bytes.fromhex(digits))

    def __str__(self) -> str:
        return f"b3:{self.hex()}"

    def __repr__(self) -> str:
        return f"Digest({self.hex()[:12]}…)"
