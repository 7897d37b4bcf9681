"""What can go wrong in the cluster's state, said in one line with a cause and, where there is one, a hint.

`api/problems.py` maps these (and those of imagestore and net) to HTTP statuses; `cli` maps them to exit codes.
"""

import traceback

_LONGEST = 500


def brief(error: BaseException) -> str:
    """One line for the log: what it was and where; of a group its first. Others may have chosen its text."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in where)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST]}{place}"


class ComputeError(Exception):
    """Base of all errors of this package. `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NotFound(ComputeError):
    """No such object, or none that the caller may see."""


class Conflict(ComputeError):
    """The name is taken, the object is in use, or its state forbids the verb."""


class Invalid(ComputeError):
    """Input breaks a rule, or a name fits several objects."""


class Unauthenticated(ComputeError):
    """No token, an expired one, or a wrong key."""


class Denied(ComputeError):
    """The caller is known and may not do this."""


class NotReady(ComputeError):
    """The object exists and is not there yet: ask again."""


class NoCapacity(ComputeError):
    """No node has room, or a pool is exhausted."""


class Precondition(ComputeError):
    """The object changed since the caller read it (If-Match)."""


class Unavailable(ComputeError):
    """A node does not answer: worth a retry."""


class NoSpace(Unavailable):
    """The disk is full."""


class Stale(ComputeError):
    """A transaction compared revisions that have moved on; `transact` reads again and repeats it."""


class Compacted(ComputeError):
    """The history asked for is gone: list again, then watch from there."""


class LeaseLost(ComputeError):
    """The lease has expired, so nothing was written."""
