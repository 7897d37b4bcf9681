"""A guest's record on disk."""

import asyncio
from dataclasses import replace
from pathlib import Path

from compute.agent.guest.record import DisksHeld, Journal, TapsHeld, rebuilt
from compute.wire.spec import DiskSpec, InstanceSpec, InterfaceSpec, Warm


def test_what_changes_nothing_is_not_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, asyncio.to_thread)
    disks, taps = journal.part(DisksHeld()), journal.part(TapsHeld())
    record = tmp_path / "record.json"

    async def story() -> None:
        await disks.save(served=())  # the first one is, whatever it says
        first = record.stat().st_ino
        await disks.save(served=())
        assert record.stat().st_ino == first
        await taps.save()
        await disks.save(resumes=True)
        assert record.stat().st_ino != first and '"resumes": true' in record.read_text()

    asyncio.run(story())


def test_without_its_record_a_guest_that_resumed_is_what_it_is_once_it_counts_as_made(tmp_path: Path) -> None:
    """Before that it may be its maker, and is made anew; the domain of one that is off has no interfaces of its own."""
    (tmp_path / "vda.qcow2").touch()
    nic = InterfaceSpec("n", "lan", "02:00:00:00:00:01", "10.0.0.2")
    spec = InstanceSpec(
        "u", "web", "system", 1, 16, (DiskSpec("vda"),), interfaces=(nic,), warm=Warm("", "", "")
    )
    for one in (spec, replace(spec, interfaces=())):
        assert rebuilt("here", tmp_path, one, "<domain/>", "lost") is None
        assert rebuilt("here", tmp_path, replace(one, made=True), "<domain/>", "lost")
    assert rebuilt("here", tmp_path, replace(spec, warm=None), "<domain/>", "lost")
