"""Images on their way into this node's cache: one fetch per image, however many guests wait for it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from imagestore.digest import Digest
from imagestore.progress import Progress, Report

_AT_ONCE = 3

Say = Callable[[str], None]


class Cache(Protocol):
    """`imagestore.cache.ImageCache`, as far as guests need it."""

    def ensure(self, digest: Digest, progress: Report, cancel: threading.Event) -> Path: ...


@dataclass(slots=True)
class _Job:
    task: "asyncio.Future[Path]"
    cancel: threading.Event
    listeners: list[Say] = field(default_factory=list)
    said: str = ""


class ImageJobs:
    """Fetches in threads of their own, so that a slow store does not hold up the rest of the agent."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="image")
        self._jobs: dict[str, _Job] = {}
        self._paths: dict[str, Path] = {}

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
        found = self._cache.ensure(Digest.parse(digest), heard, cancel)
        self._paths[digest] = found
        return found

    def where(self, digest: str) -> Path:
        """The raw file of an image that instances here use already (complete; its directory is the cache's)."""
        if digest not in self._paths:
            self._ensure(digest, lambda _: None, threading.Event())
        return self._paths[digest]

    def close(self) -> None:
        """Stop all fetches; what was fetched so far is kept by the cache."""
        for job in self._jobs.values():
            job.cancel.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
