"""The images that a node has open: fetched while guests read them over NBD, given to peers, sealed when complete.

<cache>/<hex>.raw, .manifest     complete images (imagestore.cache.images)
<cache>/<hex>.part, .have        incomplete ones (imagestore.cache.partial)
<cache>/traces/<hex>             boot traces
<run>/<id>                       NBD sockets
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from imagestore import durable
from imagestore.cache.fetcher import Fetcher, Filling
from imagestore.cache.images import ImageCache
from imagestore.cache.nbd.server import NbdServer
from imagestore.cache.node_stores import Stores
from imagestore.cache.partial import PartialImage
from imagestore.cache.peers import PATIENCE_S, Site
from imagestore.cache.reader import Reader
from imagestore.cache.traces import Traces
from imagestore.cache.wanted import Fill
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.store.frames import LocalOrigin, Origin, StoreOrigin
from imagestore.updates.using import Seed, UpdateOrigin

log = logging.getLogger(__name__)
TRACE_S = 600.0  # a boot that nobody reported as over ends its trace after this time
SETTLE_S = 20.0
"""A trace goes on for so long after the guest is up: what starts beside the login prompt belongs to the boot."""
_SEAL_S = 30.0
_RELAY_S = 60.0  # an image that is open for peers alone is closed when they have asked nothing for so long


@dataclass(frozen=True, slots=True)
class Options:
    """How a service behaves; the control socket can change none of it."""

    fill_bytes_s: float = 0.0  # 0 for no limit
    cache_bytes: int = 0  # size on disk above which unused images are forgotten; 0 for no limit
    read_ahead: int = 2  # frames after a missed one at most, where nothing else fills


class Image(Filling):
    """An image that is open: being filled or served."""

    def __init__(self, *filling: Any) -> None:
        super().__init__(*filling)
        self.exports: dict[str, tuple[NbdServer, Reader]] = {}
        self.asked_s = 0.0  # when a peer last wanted something of it
        self.chunks: dict[bytes, int] = {}  # chunk by id, made when a peer asks for the first time

    def chunk_of(self, id_: bytes) -> int | None:
        """The (first) chunk with this id."""
        if not self.chunks:
            self.chunks.update((self.partial.id(c), c) for c in range(len(self.partial.starts) - 1, -1, -1))
        return self.chunks.get(id_)

    def figures(self) -> dict[str, Any]:
        """How much of it is here, and from where that came."""
        present, data = self.partial.present_bytes, self.partial.manifest.data_bytes
        return {"present_bytes": present, "data_bytes": data, "received": dict(self.received)}


class OpenImages:
    """All methods run on the event loop.

    tell: takes an image's digest as text and a line for people, by name what is for the agent. make_room: is started
    when an image was opened that will grow.
    """

    def __init__(
        self,
        cache: ImageCache,
        run: Path,
        stores: Stores,
        site: Site,
        options: Options,
        *,
        tell: Callable[..., None],
        make_room: Callable[[], Coroutine[Any, Any, object]],
    ) -> None:
        self._cache, self._run, self._stores, self._site = cache, run, stores, site
        self._fetcher = Fetcher(self._happened, options.fill_bytes_s)
        self._options = options
        self._tell, self._make_room = tell, make_room
        self._traces = Traces(cache.directory / "traces", stores)
        self._images: dict[Digest, Image] = {}
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Stop serving and keep what came. Guests wait for the next service."""
        for task in self._tasks:
            task.cancel()
        for image in self._images.values():
            for server, _ in image.exports.values():
                await server.close()
        await self._fetcher.close()

    # -- who wants them

    async def export(self, digest: Digest, reader: str, fill: Fill, patience_s: float) -> tuple[Path, int]:
        """Open an image for a reader: its NBD socket and the disk's size. Raises NotFound, Unavailable, OSError."""
        async with self._lock:
            image = await self._opened(digest)
            if reader not in image.exports:
                source = Reader(self._fetcher, image, patience_s=patience_s)
                name = Digest.of(reader.encode()).hex()[:12]
                server = NbdServer(source, self._run / name)
                await server.start()
                image.exports[reader] = (server, source)
                asyncio.get_running_loop().call_later(TRACE_S, self._end_trace, image, source)
            image.wanted.fill = min(image.wanted.fill, fill, key=list(Fill).index)
            self._fetcher.pump()
            return image.exports[reader][0].path, image.partial.size_bytes

    async def unexport(self, reader: str) -> None:
        """The reader needs no socket any more. Twice is once."""
        async with self._lock:
            for image in list(self._images.values()):
                if reader in image.exports:
                    server, source = image.exports.pop(reader)
                    self._end_trace(image, source)
                    await server.close()
                    if not image.exports:
                        await self._release(image)

    async def prefetch(self, image: str) -> None:
        """Bring the whole image here, in the background."""
        if not self._cache.has(digest := Digest.parse(image)):
            async with self._lock:
                (await self._opened(digest)).wanted.fill = Fill.NOW
                self._fetcher.pump()

    async def give(self, digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
        """Chunks for a peer, fetched if need be, also of an image that no guest here uses: we own a part of it."""
        async with self._lock:
            image = await self._opened(digest)
        image.asked_s = time.monotonic()
        asyncio.get_running_loop().call_later(_RELAY_S + 1, lambda: self._later(self._release_unasked(image)))
        found = [image.chunk_of(ids[at : at + 32]) for at in range(0, len(ids), 32)]
        chunks = [chunk for chunk in found if chunk is not None]
        if len(chunks) < len(found):
            return None
        loose = await self._fetcher.obtain(image, chunks, PATIENCE_S, for_peer=True)
        return [loose.get(chunk) or image.partial.read_chunk(chunk) for chunk in chunks]

    async def booted(self, reader: str, settle_s: float = SETTLE_S) -> None:
        """The guest is up: its boot trace ends soon."""
        for image in self._images.values():
            if reader in image.exports:
                source = image.exports[reader][1]
                asyncio.get_running_loop().call_later(settle_s, self._end_trace, image, source)

    # -- opening and closing

    async def _opened(self, digest: Digest) -> Image:
        if digest in self._images:
            return self._images[digest]
        manifest = await asyncio.to_thread(self._manifest, digest)
        whole = self._cache.has(digest)
        path = self._cache.path(digest) if whole else self._cache.path(digest).with_suffix(".part")
        file = await asyncio.to_thread(PartialImage, path, digest, manifest, whole=whole)
        local = LocalOrigin(manifest)
        origins: list[Origin] = [local]
        layout: Layout | None = None
        if not whole:
            stored = self._stored(digest, manifest)
            seeds = await asyncio.to_thread(self._cache.seeds, manifest.parent)
            origins += [UpdateOrigin(origin.store, digest, manifest, seeds) for origin in stored]
            origins += stored
            layout = await asyncio.to_thread(_first_layout, stored)
            await asyncio.to_thread(self._seed, local, seeds)
        image = Image(file, origins, layout, self._site, self._options.read_ahead)
        self._images[digest] = image
        if file.complete and not whole:
            self._later(self._seal(image))
        elif not whole:
            self._fetcher.add(image)
            self._later(self._replay(image))
            self._later(self._make_room())
        return image

    def _stored(self, digest: Digest, manifest: Manifest) -> list[StoreOrigin]:
        told = {url: url.rpartition("@")[2] for url in self._stores.urls}  # messages have no passwords
        return [StoreOrigin(told[url], partial(self._stores.get, url), digest, manifest) for url in told]

    def renew(self) -> None:
        """The stores are others now, also for what is open."""
        for image in self._images.values():
            if not image.partial.complete:
                stored = self._stored(image.digest, image.partial.manifest)
                here = [origin for origin in image.origins if not isinstance(origin, StoreOrigin)]
                image.origins = [*here, *stored]

    def _manifest(self, digest: Digest) -> Manifest:
        with contextlib.suppress(NotFound, Corrupt):
            return self._cache.manifest(digest)
        manifest = self._stores.first(lambda store: store.manifest(digest))
        durable.write(self._cache.path(digest).with_suffix(".manifest"), manifest.whole(), 0o666)
        return manifest

    def _seed(self, local: LocalOrigin, seeds: Sequence[Seed]) -> None:
        for seed in seeds:
            local.add(seed.path, seed.manifest, None)
        for image in list(self._images.values()):
            local.add(image.partial.path, image.partial.manifest, image.partial.present)

    def _happened(self, filling: Filling, line: str) -> None:
        if line:
            self._tell(str(filling.digest), line)
        elif (image := self._images.get(filling.digest)) and image is filling:
            self._later(self._seal(image))

    async def _seal(self, image: Image) -> None:
        """Everything is there: give the file its final name and tell the agent."""
        if image.partial.path.suffix != ".part":
            return
        path = self._cache.path(image.digest)
        try:
            await asyncio.to_thread(image.partial.seal, path)
        except OSError as error:
            self._tell(str(image.digest), f"cannot complete the image, which is tried again: {error}")
            image.wanted.settle()  # what the disk lost is fetched again
            asyncio.get_running_loop().call_later(_SEAL_S, self._happened, image, "")
            return
        if image.partial.complete:
            self._tell(str(image.digest), "the image is complete", complete=str(path))
        async with self._lock:
            if not image.exports:
                await self._release(image)

    async def _release_unasked(self, image: Image) -> None:
        async with self._lock:
            idle = not image.exports and image.wanted.fill is not Fill.NOW
            if idle and time.monotonic() - image.asked_s > _RELAY_S:
                await self._release(image)

    async def _release(self, image: Image) -> None:
        """Nobody reads it through us any more: an incomplete image stays as it is."""
        if self._images.pop(image.digest, None):
            await self._fetcher.remove(image)
            for origin in image.origins:
                if isinstance(origin, LocalOrigin | UpdateOrigin):
                    origin.close()
            image.partial.close()

    async def _replay(self, image: Image) -> None:
        trace = await asyncio.to_thread(self._traces.best, image.digest, image.partial.manifest)
        if trace:
            image.wanted.prefetch(trace.chunks(image.partial.manifest.ids))
            self._fetcher.pump()

    def _end_trace(self, image: Image, reader: Reader) -> None:
        recorder, reader.recorder = reader.recorder, None
        if recorder and recorder.order:
            self._later(asyncio.to_thread(self._traces.keep, image.digest, image.partial.manifest, recorder))

    def _later(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("in the background: %s", task.exception(), exc_info=task.exception())

    # -- seeing

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._images

    @property
    def busy(self) -> bool:
        """Whether somebody reads through us or waits for an image to become complete."""
        return any(image.exports or image.wanted.fill is Fill.NOW for image in self._images.values())

    async def figures(self, reader: str) -> dict[str, Any]:
        """From where the bytes of a reader's image came so far, and how long its reads waited; {} if it has none."""
        for image in self._images.values():
            if reader in image.exports:
                return image.figures() | image.exports[reader][1].figures()
        return {}

    def row(self, digest: Digest) -> dict[str, Any]:
        """What `ls` shows of an image because it is open; {} if it is not."""
        image = self._images.get(digest)
        if image is None:
            return {}
        return image.figures() | {
            "exports": {
                name: reader.figures() | {"clients": len(server.connections)}
                for name, (server, reader) in image.exports.items()
            },
            "waited_s": round(sum(reader.waited_s for _, reader in image.exports.values()), 3),
        }


def _first_layout(origins: Sequence[StoreOrigin]) -> Layout | None:
    for origin in origins:
        with contextlib.suppress(StoreError):
            return origin.layout()
    return None
