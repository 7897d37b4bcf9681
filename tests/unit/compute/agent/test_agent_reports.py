"""What an agent has to say is kept until the server has taken it, whatever the server says to one report."""

import asyncio
import json
from collections.abc import Sequence

import pytest

from compute.agent import reports
from compute.agent.reports import Reports
from compute.api.edge import BODY_BYTES
from compute.errors import Conflict, Invalid, NoSpace
from compute.wire.codec import to_plain
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


def test_what_was_kept_for_long_is_sent_in_pieces_that_a_server_takes() -> None:
    heard: list[str] = []

    async def send(statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]) -> None:
        if len(json.dumps(to_plain([*statuses, *events]))) > BODY_BYTES:
            raise Invalid("the body is too large")
        heard.extend([*(status.uuid for status in statuses), *(event.object_uuid for event in events)])

    async def story() -> None:
        kept = Reports(send)
        for number in range(3000):
            kept.publish(InstanceStatus(f"guest {number}", InstanceState.CREATED, error_message=200 * "x"))
            kept.say(500 * "x", ("node", f"event {number}"))
        await kept.flush()

    asyncio.run(story())
    assert sorted(heard) == sorted(
        f"{kind} {number}" for kind in ("guest", "event") for number in range(3000)
    )
