"""What an agent has to say is kept until the server has taken it, whatever the server says to one report."""

import asyncio
from collections.abc import Sequence

import pytest

from compute.agent import reports
from compute.agent.reports import Reports
from compute.errors import Conflict, NoSpace
from compute.wire.spec import InstanceState, InstanceStatus, NodeEvent


def test_a_report_that_is_refused_ends_no_agent_and_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """E4"""
    monkeypatch.setattr(reports, "_RETRY_S", 0)
    refusals = [Conflict("too many others"), NoSpace("the disk is full")]
    heard: list[str] = []

    async def send(statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]) -> None:
        if refusals:
            raise refusals.pop()
        heard.extend(status.uuid for status in statuses)

    async def story() -> None:
        kept = Reports(send)
        running = asyncio.create_task(kept.run())
        kept.publish(InstanceStatus("u", InstanceState.CREATED))
        async with asyncio.timeout(30):
            while not heard:
                await asyncio.sleep(0.001)
        running.cancel()

    asyncio.run(story())
    assert heard == ["u"] and not refusals
