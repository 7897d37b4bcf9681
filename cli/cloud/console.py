"""What a guest writes to its serial console, and how one sees there that it is up."""

import codecs
import functools
import re
from contextlib import suppress
from typing import TextIO

from cli.cloud.api import Api
from cli.errors import Problem
from cli.output import Row

_UP = re.compile(rb"SF-GUEST-READY [^\r\n]+|^[^\r\n]*\blogin: ?$", re.MULTILINE)
"""What a guest's serial console says when it is up."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?"
    r"|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)


def answers(_: Api, found: Row) -> str:
    """How one sees that the guest can be given commands; "" while it cannot."""
    return "its agent answers" if str(found.get("agent_state") or "").startswith("ready") else ""


def up(api: Api, found: Row) -> str:
    """How one sees that the guest is up; "" while it is not."""
    if sign := answers(api, found):
        return sign
    match = _UP.search(_said(api, found, 20_000))
    return match[0].decode(errors="replace").strip() if match else ""


def last_line(api: Api, found: Row) -> str:
    """What the guest said last, for whoever waits for it."""
    said = _said(api, found, 2_000) if found["state"] == "created" else b""
    lines = _ESCAPES.sub("", said.decode(errors="replace")).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _said(api: Api, found: Row, length: int) -> bytes:
    """Nothing where its node has not begun with it, or is silent for a moment: that ends nobody's wait."""
    with suppress(Problem):
        return read(api, str(found["uuid"]), length)
    return b""


def read(api: Api, name: str, length: int) -> bytes:
    """Its last `length` bytes; -1 for all that is kept."""
    return bytes(api("GET", "instances", name, "consoledata", length=length))


@functools.cache
def _decoder(_: TextIO) -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def emit(data: bytes, out: TextIO) -> None:
    """A guest may write anything, in any pieces: its escape sequences do not reach a terminal."""
    if out.isatty():
        data = _ESCAPES.sub("", _decoder(out).decode(data)).encode()
    out.buffer.write(data)
    out.flush()
