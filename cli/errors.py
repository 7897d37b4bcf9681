"""The one table of exit codes, and how an error becomes one line."""

import errno
import re
from typing import Any

import click

OK, ERROR, USAGE, MISSING, AUTH, CONFLICT, CAPACITY, TIMEOUT, UNREACHABLE = range(9)
INTERRUPTED = 130

EXIT_CODES = {
    # By name, so that an exit code costs no import of imagestore, net or compute.
    "NotFound": MISSING,
    "Conflict": CONFLICT,
    "Invalid": USAGE,
    "Unavailable": UNREACHABLE,
    "Denied": AUTH,
    "Unauthenticated": AUTH,
    "NoSpace": CAPACITY,
    "Exhausted": CAPACITY,
    "TimeoutError": TIMEOUT,
    "ConnectionError": UNREACHABLE,
}
HTTP_CODES = {400: USAGE, 401: AUTH, 403: AUTH, 404: MISSING, 406: CONFLICT, 408: TIMEOUT, 409: CONFLICT}
HTTP_CODES |= {412: CONFLICT, 422: USAGE, 502: UNREACHABLE, 503: UNREACHABLE, 504: TIMEOUT, 507: CAPACITY}

_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")


class Problem(Exception):
    """An error of the command itself, with its exit code."""

    def __init__(self, message: str, *, hint: str = "", code: int = ERROR, request_id: str = "") -> None:
        super().__init__(message)
        self.hint, self.code, self.request_id = hint, code, request_id


def exit_code(error: BaseException) -> int:
    """The code of an error: its own if it has one, else by the names of its classes, else 1."""
    if isinstance(error, Problem):
        return error.code
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CAPACITY
    return next((EXIT_CODES[k.__name__] for k in type(error).__mro__ if k.__name__ in EXIT_CODES), ERROR)


def one_line(error: BaseException) -> str:
    """`cause (hint) [request id]`, without line breaks or terminal escapes from whoever wrote the cause."""
    hint = getattr(error, "hint", None)
    cause = str(error)
    if isinstance(error, click.UsageError):
        cause, hint = error.format_message(), f"see {error.ctx.command_path} --help" if error.ctx else ""
    elif isinstance(error, OSError) and error.strerror:
        cause = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, ModuleNotFoundError):
        cause = f"this needs the Python package {error.name}"
        hint = "pip install 'sf-cloud[node]' for sf serve and sf agent, 'sf-cloud[mirror]' for sf mirror"
    elif hint is None:  # nothing of ours raised it: its text may mean little without its class
        cause = f"{type(error).__name__}: {cause}"
    request = getattr(error, "request_id", "")
    text = clean(cause).rstrip(".") + (f" ({clean(hint)})" if hint else "")
    return text + (f" [request {clean(request)}]" if request else "")


def cleaned(record: Any) -> bool:
    """What is logged as one line, too, whoever said it: a filter of logging."""
    record.msg, record.args = clean(record.getMessage()), ()
    return True


def clean(text: object) -> str:
    """One line that is safe on a terminal: control and bidirectional characters become a space."""
    return _UNSAFE.sub(" ", str(text)).strip()
