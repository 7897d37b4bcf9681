"""An error stays where it happened: parts of a program begin anew, and the log stays short."""

import asyncio
import logging

import pytest

from compute import process
from compute.errors import Unavailable, brief


def deep(levels: int) -> None:
    if levels:
        deep(levels - 1)
    raise ValueError("chosen by a tenant\n" * 10_000)


def test_a_part_that_fails_begins_anew_and_its_error_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """E4, D2: an ExceptionGroup out of the agent ended sf serve"""
    monkeypatch.setattr(process, "_AGAIN_S", 0)
    rounds = []

    async def part() -> None:
        rounds.append(1)
        if len(rounds) == 5:
            raise asyncio.CancelledError
        if len(rounds) == 4:
            raise Unavailable("another error")
        raise ExceptionGroup("unhandled errors in a TaskGroup", [OSError(28, "No space left on device")])

    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        asyncio.run(process.lasting("agent", part))
    assert len(rounds) == 5
    said = [record.message for record in caplog.records]
    assert [line.split(" (")[0].split(";")[0] for line in said] == [
        "agent: OSError: [Errno 28] No space left on device",
        "agent: Unavailable: another error",
    ]


def test_a_missing_package_is_not_waited_for() -> None:
    """E4"""

    async def part() -> None:
        raise ModuleNotFoundError("no libvirt")

    with pytest.raises(ModuleNotFoundError):
        asyncio.run(process.lasting("agent", part))


def test_tracebacks_of_the_web_server_and_the_loop_are_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    """E5"""
    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(process.shortened)
    try:
        deep(500)
    except ValueError as err:
        logger.error("Exception in ASGI application\n", exc_info=err)
    finally:
        logger.removeFilter(process.shortened)
    assert "ValueError: chosen by" in caplog.text and len(caplog.text) < 1500


def test_an_error_of_any_length_is_one_short_line_with_its_place() -> None:
    """E5: 75-KiB tracebacks"""
    try:
        deep(500)
    except ValueError as err:
        line = brief(err)
    assert len(line) < 1000 and "\n" not in line
    assert line.startswith("ValueError: chosen by a tenant chosen") and "test_process.py:" in line
