"""An error stays where it happened: parts of a program begin anew, and the log stays short."""

import asyncio
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from compute import load, process
from compute.agent.link import Identity
from compute.agent.memory import Memory
from compute.cluster.certificates import certificate
from compute.errors import Unavailable, brief
from imagestore import Settings, Store, open_store
from imagestore import Unavailable as StoreUnavailable


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


def test_a_store_that_is_away_holds_up_neither_the_start_nor_the_other_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that waits for it has no lease, and is replaced by systemd every 15 s."""
    monkeypatch.setattr(process, "_FIRST_S", 0.1)
    given_up, answered = threading.Event(), list[str]()

    def opened(url: str, **how: Any) -> Store:
        if url.startswith("https:"):
            given_up.wait(20)
            answered.append(url)
            raise StoreUnavailable(url)
        return open_store(url, **how)

    monkeypatch.setattr(process, "open_store", opened)
    remotes = '[remotes.away]\nurl = "https://192.0.2.1:9/"\n'
    (tmp_path / "config.toml").write_text(f'store = "{tmp_path / "here"}"\n{remotes}')
    open_store(str(tmp_path / "here"), create=True).backend.close()
    read = Settings(environment={"SF_CONFIG": str(tmp_path / "config.toml"), "SF_STATE_DIR": str(tmp_path)})
    stores = process.NodeStores(load(read), default=False)
    assert not answered
    assert list(stores.urls) == ["local", "away"]
    while not stores.images.stores:
        time.sleep(0.01)
    assert list(stores.images.stores) == ["local"] and not answered
    given_up.set()
    stores.close()


def test_without_a_way_to_its_server_a_node_has_its_link_all_the_same(tmp_path: Path) -> None:
    """It is the link that takes the power of guests which others may be given."""
    trusted = certificate(tmp_path)[0].read_text()
    identity = Identity("https://[::1]:1", "n2", "secret", "0123abcd", trusted)  # of IPv6 alone: no way
    read = Settings(environment={"SF_CONFIG": os.devnull, "SF_STATE_DIR": str(tmp_path)})
    told: Any = (load(read), identity, None, Memory(tmp_path))
    agent, link = process.joined(*told)
    assert callable(link)
    with pytest.raises(Unavailable, match="there is no way to"):  # and `lasting` tries again
        asyncio.run(agent())
