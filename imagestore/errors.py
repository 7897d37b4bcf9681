"""What can go wrong in the image store, said in one line with a cause and, where there is one, a hint.

Adapters only say what *kind* of error it was; retrying lives in one wrapper and only ever repeats
`Unavailable`. One table in `cli` maps these to exit codes, one in `compute` to HTTP statuses.
"""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of an OSError that mean: no room


class StoreError(Exception):
    """Base of all errors of this package. `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NotFound(StoreError):
    """The name, digest or object does not exist (and the store that says so was reachable)."""


class Conflict(StoreError):
    """Somebody else changed it first, or it exists already with other content."""


class Invalid(StoreError):
    """Input from outside breaks a rule: a name, an image file, a URL, a parameter."""


class Corrupt(StoreError):
    """Bytes do not match their digest, or a structure breaks its own rules."""


class Unavailable(StoreError):
    """The store did not answer or is overloaded: the only error worth a retry."""


class Denied(StoreError):
    """The store refused the credentials."""


class NoSpace(StoreError):
    """The disk or the quota is full."""


class Unsupported(StoreError):
    """The backend cannot do this (a write on a read-only store, a conditional write where there is none)."""
