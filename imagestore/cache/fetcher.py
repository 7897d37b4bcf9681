"""Brings missing chunks of incomplete images: demand before prefetch before fill, each frame once.

A `Fetcher` is one per process and holds threads, limits and counts; a `Filling` is one incomplete image, whose
`Wanted` says what comes next. All state lives on the event loop's thread; requests to origins, hashing and writing
(`imagestore.cache.intake`) run in threads, so memory is bounded by threads times a request and its plain bytes.
"""

import asyncio
import collections
import contextlib
import errno
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from imagestore.cache.intake import DOWN_S, Brought, bring
from imagestore.cache.partial import PartialImage
from imagestore.cache.peers import PeerOrigin, Site
from imagestore.cache.wanted import Job, Kind, Wanted
from imagestore.errors import Unavailable
from imagestore.formats.digest import Buffer
from imagestore.formats.layout import Layout
from imagestore.store.frames import Origin

log = logging.getLogger(__name__)
FLUSH_S = 2.0
_CONNECTIONS = 16
_RESERVED = 2  # connections that only demand may use
_FILLING = 4  # connections that fill may use at most: a demand read shares the link with this many requests
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_FULL_S = 5.0
_SAID_S = 60.0  # for so long a line about an image is not said again


class Filling:
    """One incomplete image: its file, where its chunks come from, what is wanted of it, and how that went."""

    def __init__(
        self,
        partial: PartialImage,
        origins: Sequence[Origin],
        layout: Layout | None,
        site: Site,
        read_ahead: int,
    ) -> None:
        self.digest, self.partial, self.origins, self.site = partial.digest, partial, list(origins), site
        self.wanted = Wanted(partial, layout, read_ahead, self._owner)
        self.down: dict[Origin, float] = {}
        self.received: collections.Counter[str] = collections.Counter()  # bytes by kind of origin
        self.running = 0
        self.failing, self.last_error = False, ""
        self.said: dict[str, float] = {}

    def _owner(self, chunk: int) -> str:
        now = time.monotonic()
        helpless = all(self.down.get(o, 0.0) > now for o in self.origins if o.kind == "store")
        return self.site.owner(self.digest, chunk, others=helpless)


Happened = Callable[[Filling, str], None]
"""Told on the loop, in one line, what people should know of an image: a failing origin, a full disk; "": complete."""


class Fetcher:
    """The threads and limits that all images of a process share. Made and used on the event loop."""

    def __init__(self, happened: Happened, fill_bytes_s: float = 0.0) -> None:
        self._happened = happened
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "fetch")
        self._askers = ThreadPoolExecutor(_CONNECTIONS, "peers")
        self._asking = 0
        self._fill_bytes_s = fill_bytes_s  # 0 for no limit
        self._fill_from_s = 0.0
        self._running = collections.Counter[Kind]()
        self._images: list[Filling] = []
        self._done: dict[Job, asyncio.Future[Brought]] = {}  # jobs that somebody waits for
        self._tasks: set[asyncio.Task[None]] = set()
        self._tick = asyncio.get_running_loop().create_task(self._ticking())

    def add(self, image: Filling) -> None:
        """Work for this image from now on."""
        self._images.append(image)
        self.pump()

    async def remove(self, image: Filling) -> None:
        """Start nothing for this image any more, wait for what stores bring, keep what came."""
        if image in self._images:
            self._images.remove(image)
        while image.running:
            await asyncio.sleep(0.02)
        with contextlib.suppress(OSError):  # what it was to keep is fetched once more
            await asyncio.to_thread(image.partial.flush)

    async def close(self) -> None:
        """Wait for what is under way, flush every image."""
        self._tick.cancel()
        images, self._images = self._images, []
        if self._tasks:
            await asyncio.wait(self._tasks)
        for image in images:
            await self.remove(image)
        self._pool.shutdown()
        self._askers.shutdown()

    # -- asking

    async def obtain(
        self, image: Filling, chunks: Sequence[int], patience_s: float, *, for_peer: bool = False
    ) -> dict[int, Buffer]:
        """Wait until every one of these chunks is present, except those returned, which could not be kept.

        Raises OSError (EIO) when that took longer than `patience_s`. for_peer: no other peer is asked or waited for,
        and the first failure ends it.
        """
        loose: dict[int, Buffer] = {}
        deadline, failures = time.monotonic() + patience_s, 0
        while missing := [c for c in chunks if not image.partial.present[c] and c not in loose]:
            jobs = image.wanted.demand(missing, time.monotonic(), for_peer=for_peer)
            if for_peer and any(job.owner for job in jobs):
                raise OSError(errno.EIO, "another peer is being asked for it")
            waited = [self._done.setdefault(job, asyncio.Future()) for job in jobs]
            self.pump()
            await asyncio.wait(waited, timeout=deadline - time.monotonic())
            results = [done.result() for done in waited if done.done()]
            for brought in results:
                loose.update((c, brought.loose[c]) for c in missing if c in brought.loose)
            if time.monotonic() >= deadline:
                why = image.last_error or "no answer"
                self._say(image, f"gave up a read after {patience_s:.0f} s: {why}")
                raise OSError(errno.EIO, image.last_error)
            if any(brought.error for brought in results):
                if for_peer:
                    raise OSError(errno.EIO, image.last_error)
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        return loose

    # -- fetching

    def pump(self) -> None:
        """Start as many jobs as the limits allow."""
        while picked := self._pick():
            image, job = picked
            self._running[job.kind] += 1
            task = asyncio.get_running_loop().create_task(self._work(image, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _pick(self) -> tuple[Filling, Job] | None:
        running, now = self._running.total(), time.monotonic()
        for kind in Kind:
            if running >= _CONNECTIONS - (_RESERVED if kind is not Kind.DEMAND else 0):
                return None
            if kind is not Kind.DEMAND and self._asking >= _CONNECTIONS:
                return None
            if kind is Kind.FILL and (self._running[kind] >= _FILLING or now < self._fill_from_s):
                return None
            for at, image in enumerate(self._images):
                # One whose stores hang must leave connections to the others.
                most = 2 if image.failing else _CONNECTIONS // min(2, len(self._images))
                if image.running < most and (job := image.wanted.take(kind, now)):
                    image.running += 1
                    # The next one first next time, so that one image cannot keep all the others waiting.
                    self._images.append(self._images.pop(at))
                    return image, job
        return None

    async def _work(self, image: Filling, job: Job) -> None:
        loop, brought = asyncio.get_running_loop(), Brought()
        partial, down = image.partial, image.down
        try:
            if job.owner:
                # In other threads and beside the limits: whoever waits for a peer must not keep this node from
                # fetching what others wait for, or all would wait for each other.
                self._running[job.kind] -= 1
                image.running -= 1
                self._asking += 1
                try:
                    peer = PeerOrigin(image.site, image.digest, image.partial.manifest, job.owner)
                    near = [*image.origins[:1], peer]
                    await loop.run_in_executor(self._askers, bring, partial, job.chunks, near, down, brought)
                finally:
                    self._asking -= 1
                    self._running[job.kind] += 1
                    image.running += 1
                brought.error = None
            await loop.run_in_executor(self._pool, bring, partial, job.chunks, image.origins, down, brought)
        except Exception as error:
            # A defect, not a failing store: the readers must hear of it, or they would wait for ever.
            log.exception("fetching failed")
            brought = Brought(error=Unavailable(f"{type(error).__name__}: {error}"))
        self._running[job.kind] -= 1
        self._finish(image, job, brought)
        self.pump()

    def _finish(self, image: Filling, job: Job, brought: Brought) -> None:
        """Publish what a job brought."""
        wanted, now = image.wanted, time.monotonic()
        image.partial.mark(brought.kept)
        wanted.done(job)
        image.running -= 1
        image.failing = brought.error is not None
        image.received.update(brought.received)
        for note in brought.notes:
            self._say(image, note)
        if brought.loose and not brought.error:
            wanted.paused_until_s = now + _FULL_S
            self._say(image, "the cache's disk is full: reads go on without being kept, filling waits")
        if brought.error:
            image.last_error = str(brought.error)
            if job.kind is not Kind.DEMAND and (job.owner or not wanted.owner(job.chunks[0])):
                # Whoever needs it asks again; filling starts again after a while, unless a peer may know more.
                wanted.paused_until_s = now + DOWN_S
        if job.kind is Kind.FILL and self._fill_bytes_s:
            spent = sum(brought.received.values()) / self._fill_bytes_s
            self._fill_from_s = max(self._fill_from_s, now) + spent
        if done := self._done.pop(job, None):
            done.set_result(brought)
        if image.partial.complete:
            self._happened(image, "")

    async def _ticking(self) -> None:
        """Flush, and look again at what waited for time to pass."""
        while True:
            for _ in range(10):
                await asyncio.sleep(FLUSH_S / (10 if self._images else 1))
                self.pump()
            for image in list(self._images):
                try:
                    await asyncio.to_thread(image.partial.flush)
                except OSError as error:
                    # What it was to keep is missing again.
                    self._say(image, f"the cache's disk: {error}")
                    image.wanted.settle()

    def _say(self, image: Filling, line: str) -> None:
        now = time.monotonic()
        image.said = {old: at for old, at in image.said.items() if now - at < _SAID_S}
        if line not in image.said and image in self._images:
            image.said[line] = now
            self._happened(image, line)
