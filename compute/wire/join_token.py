"""What `sf node token` prints and `sf agent --join` takes.

    sfj1.<SHA-256 of the server's certificate, base64url>.<secret, base64url>

It tells the new node which certificate to expect, so that it meets the right server before it says anything.
"""

import base64
from dataclasses import dataclass

from compute.errors import Denied

_PREFIX = "sfj1"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What `sf node token` prints."""

    fingerprint: bytes
    secret: str

    def __str__(self) -> str:
        return f"{_PREFIX}.{base64.urlsafe_b64encode(self.fingerprint).decode()}.{self.secret}"

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        """Raises Denied."""
        try:
            prefix, fingerprint, secret = text.strip().split(".")
            pinned = base64.urlsafe_b64decode(fingerprint)
            if prefix != _PREFIX or len(pinned) != 32 or not secret:
                raise ValueError(prefix)
        except ValueError as err:
            raise Denied("that is no join token", hint="sf node token, on the server, prints one") from err
        return cls(pinned, secret)
