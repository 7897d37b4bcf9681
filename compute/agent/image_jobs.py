"""What guests read their images from: here always complete files, fetched once however many guests wait.

`compute.agent.image_service.ServedImages` gives them before they are complete.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from compute.agent.guest.host import Backing, Say
from compute.wire.spec import ImageSite
from imagestore import Cached, Digest, Progress, Report

_AT_ONCE = 3

Heard = Callable[[str, str], None]
"""Told (reader, message) for each event of an image that the reader uses; ("", ""): look at everything again."""


class Cache(Protocol):
    """`imagestore.cache.images.ImageCache`, as far as guests need it."""

    def ensure(self, digest: Digest, progress: Report, cancel: threading.Event) -> Path: ...

    def path(self, digest: Digest) -> Path: ...

    def list(self) -> Sequence[Cached]: ...


@dataclass(slots=True)
class _Job:
    task: "asyncio.Future[Path]"
    cancel: threading.Event
    listeners: list[Say] = field(default_factory=list)
    said: str = ""


class ImageJobs:
    """Fetches in threads of their own, so that a slow store does not hold up the rest of the agent."""

    peer_address = ""
    stores: tuple[str, ...] = ()
    """Both as in `NodeFacts`."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="image")
        self._jobs: dict[str, _Job] = {}

    async def backing(self, reader: str, digest: str, say: Say) -> Backing:
        """What a guest that is about to start reads its image from; `reader` names its disk."""
        path = await self.path(digest, say)
        return Backing(path, path.stat().st_size)

    def here(self) -> tuple[str, ...]:
        """Digests of the images that are complete."""
        return tuple(str(image.digest) for image in self._cache.list())

    def complete(self, digest: str) -> Path | None:
        """The complete raw file of an image, if it is here."""
        path = self._cache.path(Digest.parse(digest))
        return path if path.exists() else None

    def admit(self, group: int) -> None:
        """Guests run as this group."""

    async def settled(self, reader: str) -> None:
        """The guest reads the raw file itself now."""

    async def gone(self, reader: str) -> None:
        """The guest's disk is deleted."""

    async def booted(self, reader: str) -> None:
        """The guest is up."""

    async def figures(self, reader: str) -> dict[str, Any]:
        """From where the bytes of its image came."""
        return {}

    async def path(self, digest: str, say: Say) -> Path:
        """The complete raw file of an image; `say` hears "fetching 43%". The last waiter to leave stops the fetch.

        Raises imagestore's errors.
        """
        job = self._jobs.get(digest)
        if job is None:
            job = self._jobs[digest] = self._start(digest)
        job.listeners.append(say)
        if job.said:
            say(job.said)
        try:
            return await asyncio.shield(job.task)
        finally:
            job.listeners.remove(say)
            if not job.listeners:
                job.cancel.set()
                self._jobs.pop(digest, None)

    def _start(self, digest: str) -> _Job:
        loop, cancel = asyncio.get_running_loop(), threading.Event()

        def heard(progress: Progress) -> None:
            percent = 100 * progress.done_bytes // max(1, progress.total_bytes)
            loop.call_soon_threadsafe(tell, f"{progress.stage} {percent}%")

        def tell(text: str) -> None:
            if text != job.said:
                job.said = text
                for listener in job.listeners:
                    listener(text)

        task = loop.run_in_executor(self._pool, partial(self._ensure, digest, heard, cancel))
        # Nobody may be left to hear of a failure.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        job = _Job(task, cancel)
        return job

    def _ensure(self, digest: str, heard: Callable[[Progress], None], cancel: threading.Event) -> Path:
        return self._cache.ensure(Digest.parse(digest), heard, cancel)

    async def share(self, site: ImageSite) -> None:
        """With whom to share what is here, from now on."""

    async def only(self, readers: Sequence[str]) -> None:
        """These are all the disks of guests here."""

    async def listen(self, heard: Heard) -> None:
        """Pass on what happens to images, for ever."""

    async def leave(self) -> None:
        """The agent ends."""

    def close(self) -> None:
        """Stop all fetches; what was fetched so far is kept by the cache."""
        for job in self._jobs.values():
            job.cancel.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
