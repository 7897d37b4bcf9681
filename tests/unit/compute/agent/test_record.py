"""A guest's record on disk."""

import asyncio
from pathlib import Path

from compute.agent.guest.record import DisksHeld, Journal, TapsHeld


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
