"""Brings missing chunks of partial images: demand before prefetch before fill, each frame once.

A `Fetcher` is one per process and holds the limits; a `Filling` is one per incomplete image. All state lives on the
event loop's thread; requests to origins, hashing and writing run in the fetcher's threads, so memory is bounded by
threads times a request and its plain bytes.
"""

import asyncio
import collections
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from imagestore.cache.filling import Filling, Job, Kind
from imagestore.cache.intake import Brought
from imagestore.errors import Unavailable

log = logging.getLogger(__name__)
FLUSH_S = 2.0
_RESERVED = 2
"""Connections that only demand may use."""
_FILLING = 4
"""Connections that fill may use at most: a demand read shares the link with this many requests."""


class Fetcher:
    """The threads and limits that all images of a process share. Made and used on the event loop."""

    def __init__(self, *, connections: int = 16, fill_bytes_s: float = 0.0) -> None:
        self._pool = ThreadPoolExecutor(connections, "fetch")
        self._askers = ThreadPoolExecutor(connections, "peers")
        self._asking = 0
        self._connections = connections
        self._fill_bytes_s = fill_bytes_s
        """0 for no limit."""
        self._fill_from_s = 0.0
        self._running = collections.Counter[Kind]()
        self._images: list[Filling] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._tick = asyncio.get_running_loop().create_task(self._ticking())

    def add(self, image: Filling) -> None:
        """Work for this image from now on."""
        self._images.append(image)
        self.pump()

    async def remove(self, image: Filling) -> None:
        """Start nothing for this image any more, wait for what is under way, keep what came."""
        if image in self._images:
            self._images.remove(image)
        while image.running:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(image.partial.flush)

    async def close(self) -> None:
        """Wait for what is under way, flush every image."""
        self._tick.cancel()
        images, self._images = self._images, []
        if self._tasks:
            await asyncio.wait(self._tasks)
        for image in images:
            with contextlib.suppress(OSError):
                image.partial.flush()
        self._pool.shutdown()
        self._askers.shutdown()

    def pump(self) -> None:
        """Start as many jobs as the limits allow."""
        while picked := self._pick():
            image, job = picked
            self._running[job.kind] += 1
            task = asyncio.get_running_loop().create_task(self._work(image, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _pick(self) -> tuple[Filling, Job] | None:
        running = self._running.total()
        for kind in Kind:
            if running >= self._connections - (_RESERVED if kind is not Kind.DEMAND else 0):
                return None
            if kind is not Kind.DEMAND and self._asking >= self._connections:
                return None
            if kind is Kind.FILL and (
                self._running[kind] >= _FILLING or time.monotonic() < self._fill_from_s
            ):
                return None
            for at, image in enumerate(self._images):
                if image.running < self._share(image) and (job := image.take(kind)):
                    image.running += 1
                    # The next one first next time, so that one image cannot keep all the others waiting.
                    self._images.append(self._images.pop(at))
                    return image, job
        return None

    def _share(self, image: Filling) -> int:
        """How many connections an image may hold: one whose stores hang must leave some to the others."""
        if image.failing:
            return 2
        return self._connections if len(self._images) == 1 else max(2, self._connections // 2)

    async def _work(self, image: Filling, job: Job) -> None:
        loop, intake, brought = asyncio.get_running_loop(), image.intake, Brought()
        try:
            if image.peers and job.owner:
                # In other threads and beside the limits: whoever waits for a peer must not keep this node from
                # fetching what others wait for, or all would wait for each other.
                self._running[job.kind] -= 1
                image.running -= 1
                self._asking += 1
                try:
                    origins = [*intake.origins[:1], image.peers.at(job.owner)]
                    await loop.run_in_executor(self._askers, intake.bring, job.chunks, origins, brought)
                finally:
                    self._asking -= 1
                    self._running[job.kind] += 1
                    image.running += 1
                brought.error = None
            await loop.run_in_executor(self._pool, intake.bring, job.chunks, intake.origins, brought)
        except Exception as error:
            # A defect, not a failing store: the readers must hear of it, or they would wait for ever.
            log.exception("fetching failed")
            brought = Brought(error=Unavailable(f"{type(error).__name__}: {error}"))
        self._running[job.kind] -= 1
        image.finish(job, brought)
        if job.kind is Kind.FILL and self._fill_bytes_s:
            spent = sum(brought.received.values()) / self._fill_bytes_s
            self._fill_from_s = max(self._fill_from_s, time.monotonic()) + spent
        self.pump()

    async def _ticking(self) -> None:
        """Flush, and look again at what waited for time to pass."""
        while True:
            for _ in range(10):
                await asyncio.sleep(FLUSH_S / 10)
                self.pump()
            for image in list(self._images):
                try:
                    await asyncio.to_thread(image.partial.flush)
                except OSError as error:
                    image.lost(error)
