"""A guest's owner while it moves live: it neither stands still for long, nor is lost by what fails on the way."""

import asyncio
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock, MagicMock

import pytest

from compute.agent.guest import passage
from compute.agent.guest.record import Phase
from compute.agent.hypervisor import passing
from compute.agent.hypervisor.accel import Verdict
from compute.errors import NotFound, Unavailable
from compute.wire.streams import pair
from net import NetError
from tests.unit.compute.agent.test_guest_start import SPEC, guest


@pytest.mark.parametrize("accel, reached", [("kvm", "pre-switchover"), ("tcg", "active")])
def test_what_stands_still_for_the_other_node_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accel: str, reached: str
) -> None:
    """A node that lives and takes nothing: a disk that hangs, or malice. An emulated guest stands from the start."""
    said, asked = iter([("active", 0), (reached, 0)]), list[bool]()
    for name, done in (("mirror", None), ("settled", True), ("go_on", None)):
        monkeypatch.setattr(passing, name, lambda *_, done=done, **__: done)
    monkeypatch.setattr(passing, "send", lambda *_, still: asked.append(still))
    monkeypatch.setattr(passing, "sending", lambda *_: next(said, ("device", 0)))
    monkeypatch.setattr(passage, "_STILL_S", 0.05)
    made, _, _ = guest(tmp_path)
    made.passage._host.verdict = Verdict(accel, "for a test")

    async def story() -> None:
        with pytest.raises(Unavailable, match="stood still"):
            await asyncio.wait_for(made.passage._send(), 10)
        assert next(said, None) is None and asked == [accel == "tcg"]

    asyncio.run(story())


def test_a_qemu_that_waits_for_the_other_node_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest stands still with it, as while it greets an NBD server that does not answer."""
    monkeypatch.setattr(passage, "_STILL_S", 0.05)
    made, _, _ = guest(tmp_path)

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    made.passage._host = MagicMock(do=hangs)

    async def story() -> None:
        with pytest.raises(Unavailable, match="not answered"):
            await asyncio.wait_for(made.passage._send(), 20)

    asyncio.run(story())


def test_a_stream_whose_server_has_gone_is_over(tmp_path: Path) -> None:
    made, _, _ = guest(tmp_path)

    async def story() -> None:
        near, far = pair()
        arriving = asyncio.create_task(made.passage.arrive(made, {}, far))
        await asyncio.sleep(0.01)
        await near.aclose()
        with pytest.raises(Unavailable, match="gave the move up"):
            await asyncio.wait_for(arriving, 20)

    asyncio.run(story())


def test_one_that_came_to_a_machine_which_was_started_anew_boots_from_its_disks(tmp_path: Path) -> None:
    """Its taps went with its qemu: nobody can move them into their networks."""
    made, hypervisor, _ = guest(tmp_path)
    hypervisor.qmp.side_effect = NotFound("it is off")
    made.passage._taps = made._taps
    made._taps.adopt.side_effect = NetError("there is no such tap")
    made._course.now = replace(made.record, coming="move", created=True)
    assert not asyncio.run(made.passage.rules(SPEC, {}, asyncio.Event()))
    assert (made.record.phase, made.record.coming) == (Phase.UP, "")


def test_what_fails_while_one_comes_is_no_failure_of_its_creation(tmp_path: Path) -> None:
    """A network that is not there yet when it has come: it is tried again."""
    made, _, _ = guest(tmp_path)
    made.passage._disks, made.passage._taps = made._disks, made._taps
    made._disks.images = AsyncMock(side_effect=NetError("for a test"))
    assert asyncio.run(made.passage.rules(replace(SPEC, coming="move"), {}, asyncio.Event()))
    made.passage._taps.adopt.side_effect = NetError("network lan is not on this node yet")
    with pytest.raises(NetError):
        asyncio.run(made._attempt())
    assert made.record.phase is Phase.NEW and not made.host.publish.called
