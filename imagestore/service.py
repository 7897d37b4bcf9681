"""The image service of a node: owns the cache, serves incomplete images to guests, fills them, forgets old ones.

<cache>/<hex>.raw, .manifest     complete images (imagestore.cache)
<cache>/<hex>.part, .have        incomplete ones (imagestore.partial)
<cache>/<hex>.pin                never forgotten
<cache>/traces/<hex>             boot traces
<cache>/readers/<id>.json        which overlay is backed by which image: written before its export is answered,
                                 so that a service that was killed opens the same sockets again
<run>/<id>                       NBD sockets
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from imagestore.backend import Buffer
from imagestore.cache import ImageCache, list_images
from imagestore.digest import Digest
from imagestore.errors import Conflict, Corrupt, Invalid, NotFound, StoreError
from imagestore.fetcher import Fetcher
from imagestore.filling import Fill, Filling
from imagestore.layout import Layout
from imagestore.manifest import Manifest
from imagestore.nbd import NbdServer
from imagestore.node_stores import Stores
from imagestore.origin import LocalOrigin, Origin, StoreOrigin
from imagestore.partial import PartialImage
from imagestore.peer import PATIENCE_S, Peers, PeerServer, Site
from imagestore.reader import Reader
from imagestore.traces import Traces

T = TypeVar("T")
log = logging.getLogger(__name__)
TRACE_S = 600.0
"""A boot that nobody reported as over ends its trace after this time."""
SETTLE_S = 20.0
"""A trace goes on for so long after the guest is up: what starts beside the login prompt belongs to the boot."""
_KEPT_EVENTS = 256
_RELAY_S = 60.0
"""An image that is open for peers alone is closed when they have asked nothing for so long."""
_READER = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Options:
    """How a service behaves; the control socket can change none of it."""

    connections: int = 16
    fill_bytes_s: float = 0.0
    """0 for no limit."""
    cache_bytes: int = 0
    """Size on disk above which unused images are forgotten; 0 for no limit."""
    read_ahead: int = 2
    """Frames after a missed one at most, where nothing else fills."""
    socket_group: int = -1
    """Group id that may connect to the sockets; -1: the directory's if that is setgid, else the process's own."""

    def for_group(self, group: int) -> "Options":
        """The same, with sockets for this group."""
        return replace(self, socket_group=group)


@dataclass(frozen=True, slots=True)
class Reference:
    """An overlay that is backed by an image. `nbd`: through an export, otherwise by the raw file."""

    reader: str
    image: str
    nbd: bool
    fill: str = Fill.NOW
    patience_s: float = 120.0


@dataclass(slots=True, eq=False)
class Image:
    """An image that is open: being filled or served."""

    digest: Digest
    manifest: Manifest
    partial: PartialImage
    local: LocalOrigin
    filling: Filling
    exports: dict[str, tuple[NbdServer, Reader]] = field(default_factory=dict)
    asked_s: float = 0.0
    """When a peer last wanted something of it."""
    chunks: dict[bytes, int] = field(default_factory=dict)
    """Chunk by id, made when a peer asks for the first time."""

    def chunk_of(self, id_: bytes) -> int | None:
        """The (first) chunk with this id."""
        if not self.chunks:
            self.chunks.update((self.partial.id(c), c) for c in range(len(self.partial.starts) - 1, -1, -1))
        return self.chunks.get(id_)


class ImageService:
    """All methods run on the event loop; `start` before anything else."""

    def __init__(self, cache: Path, run: Path, stores: Sequence[str], options: Options = Options()) -> None:
        self.stores = Stores(stores)
        self._traces = Traces(cache / "traces", self.stores)
        self.events: list[dict[str, Any]] = []
        """The newest lines for people and for the agent, each with a number `seq` that grows."""
        self.happened = asyncio.Condition()
        self._cache = ImageCache(cache, {})
        self._directory, self._run, self._options = cache, run, options
        self._images: dict[Digest, Image] = {}
        self._references: dict[str, Reference] = {}
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.newest = 0
        self.site = Site()
        self._peers = PeerServer(self.site, self._give)

    async def start(self) -> None:
        """Open again what guests were reading when the last service ended."""
        for directory in (
            self._directory,
            self._directory / "readers",
            self._directory / "traces",
            self._run,
        ):
            directory.mkdir(parents=True, exist_ok=True)
        self._fetcher = Fetcher(
            connections=self._options.connections, fill_bytes_s=self._options.fill_bytes_s
        )
        for path in sorted((self._directory / "readers").glob("*.json")):
            try:
                reference = Reference(**json.loads(path.read_text()))
                self._references[reference.reader] = reference
                if reference.nbd:
                    await self._export(reference)
            except (ValueError, TypeError, StoreError, OSError) as error:
                self._event("", f"cannot serve the reader {path.stem} again: {error}", reader=path.stem)

    async def close(self) -> None:
        """Stop serving; what was fetched is kept. Guests wait for the next service."""
        for task in self._tasks:
            task.cancel()
        for image in self._images.values():
            for server, _ in image.exports.values():
                await server.close()
        await self._peers.close()
        await self._fetcher.close()
        self.stores.close()

    # -- readers

    async def attach(
        self, digest: Digest, reader: str, *, fill: str = Fill.NOW, patience_s: float = 120.0
    ) -> dict[str, Any]:
        """What an overlay is to be backed by: {kind: "raw", path} if the image is complete, else {kind: "nbd", path}.

        Asked before its guest starts, so that an image that was completed meanwhile is read without us. Raises
        NotFound, Unavailable, Invalid, Conflict.
        """
        if not _READER.fullmatch(reader):
            raise Invalid(f"not a reader's name: {reader[:80]!r}")
        known = self._references.get(reader)
        if known and known.image != str(digest):
            raise Conflict(f"{reader} is backed by {known.image}")
        if self._cache.has(digest):
            with contextlib.suppress(PermissionError):  # somebody else put it there
                os.utime(self._cache.path(digest))
            self._remember(Reference(reader, str(digest), nbd=False))
            await self._unexport(reader)
            return {"kind": "raw", "path": str(self._cache.path(digest)), "size_bytes": self._size(digest)}
        reference = Reference(reader, str(digest), True, Fill(fill), patience_s)
        self._remember(reference)
        try:
            socket, size_bytes = await self._export(reference)
        except (StoreError, OSError):
            if not known:
                self._forget(reader)
            raise
        return {"kind": "nbd", "path": str(socket), "size_bytes": size_bytes}

    async def settle(self, reader: str) -> None:
        """The overlay is backed by the raw file now: end its export, keep the reference."""
        reference = self._references.get(reader)
        if reference is None:
            raise NotFound(f"no reader is called {reader}")
        self._remember(Reference(reader, reference.image, nbd=False))
        await self._unexport(reader)

    async def detach(self, reader: str) -> None:
        """The overlay is gone. Twice is once."""
        self._forget(reader)
        await self._unexport(reader)

    async def sync(self, readers: Iterable[str]) -> None:
        """These are all the overlays that there are."""
        for reader in set(self._references) - set(readers):
            await self.detach(reader)

    @property
    def busy(self) -> bool:
        """Whether somebody reads through us or waits for an image to become complete."""
        return any(image.exports or image.filling.fill is Fill.NOW for image in self._images.values())

    def figures(self, reader: str) -> dict[str, Any]:
        """From where the bytes of a reader's image came so far, and how long its reads waited; {} if it has none."""
        for image in self._images.values():
            if reader in image.exports:
                _, source = image.exports[reader]
                return {
                    "present_bytes": image.partial.present_bytes,
                    "data_bytes": image.manifest.data_bytes,
                    "received": dict(image.filling.received),
                    "waited_s": round(source.waited_s, 3),
                    "reads": source.reads,
                    "waits": source.waits,
                    "failures": source.failures,
                }
        return {}

    def booted(self, reader: str, settle_s: float = SETTLE_S) -> None:
        """The guest is up: its boot trace ends soon."""
        for image in self._images.values():
            if reader in image.exports:
                source = image.exports[reader][1]
                asyncio.get_running_loop().call_later(settle_s, self._end_trace, image, source)

    def _remember(self, reference: Reference) -> None:
        self._references[reference.reader] = reference
        path = self._directory / "readers" / f"{reference.reader}.json"
        beside = path.with_suffix(".new")
        with beside.open("w") as file:
            json.dump(asdict(reference), file)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)

    def _forget(self, reader: str) -> None:
        self._references.pop(reader, None)
        (self._directory / "readers" / f"{reader}.json").unlink(missing_ok=True)

    async def _export(self, reference: Reference) -> tuple[Path, int]:
        digest = Digest.parse(reference.image)
        async with self._lock:
            image = await self._opened(digest)
            if reference.reader not in image.exports:
                reader = Reader(image.filling, patience_s=reference.patience_s)
                name = Digest.of(reference.reader.encode()).hex()[:12]
                server = NbdServer(reader, self._run / name, group=self._options.socket_group)
                await server.start()
                image.exports[reference.reader] = (server, reader)
                asyncio.get_running_loop().call_later(TRACE_S, self._end_trace, image, reader)
            order = [Fill.NOW, Fill.IDLE, Fill.NEVER]
            image.filling.fill = min(image.filling.fill, Fill(reference.fill), key=order.index)
            self._fetcher.pump()
            return image.exports[reference.reader][0].path, image.manifest.size_bytes

    async def _unexport(self, reader: str) -> None:
        async with self._lock:
            for image in list(self._images.values()):
                if reader in image.exports:
                    server, source = image.exports.pop(reader)
                    self._end_trace(image, source)
                    await server.close()
                    if not image.exports:
                        await self._release(image)

    # -- images

    def _size(self, digest: Digest) -> int:
        return self._cache.path(digest).stat().st_size

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
            stored = [StoreOrigin(u, partial(self.stores.get, u), digest, manifest) for u in self.stores.urls]
            origins += stored
            layout = await asyncio.to_thread(_first_layout, stored)
            await asyncio.to_thread(self._seed, local, digest)
        image: Image

        def tell(line: str) -> None:
            # From any thread.
            loop.call_soon_threadsafe(self._event, str(digest), line)

        loop = asyncio.get_running_loop()
        filling = Filling(
            file, origins, layout, self._fetcher,
            peers=Peers(self.site, digest, manifest),
            read_ahead=self._options.read_ahead, event=tell, complete=lambda: self._later(self._seal(image)),
        )  # fmt: skip
        image = self._images[digest] = Image(digest, manifest, file, local, filling)
        if file.complete and not whole:
            self._later(self._seal(image))
        elif not whole:
            self._fetcher.add(filling)
            self._later(self._replay(image))
            self._later(self.prune())
        return image

    async def _give(self, digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
        """Chunks for a peer, fetched if need be, also of an image that no guest here uses: we own a part of it."""
        async with self._lock:
            image = await self._opened(digest)
        image.asked_s = time.monotonic()
        asyncio.get_running_loop().call_later(_RELAY_S + 1, lambda: self._later(self._release_unasked(image)))
        wanted = [ids[at : at + 32] for at in range(0, len(ids), 32)]
        chunks = [image.chunk_of(one) for one in wanted]
        if None in chunks:
            return None
        loose = await image.filling.obtain([c for c in chunks if c is not None], PATIENCE_S, for_peer=True)
        return [loose.get(c) or image.partial.read_chunk(c) for c in chunks if c is not None]

    async def join(self, me: str, listen: str, peers: Mapping[str, str], secret: bytes) -> None:
        """Share with these nodes (name to host:port), listening on an address of ours. Raises OSError."""
        self.site.me, self.site.addresses, self.site.secret = me, dict(peers), secret
        await self._peers.listen(listen)

    def _manifest(self, digest: Digest) -> Manifest:
        with contextlib.suppress(NotFound, Corrupt):
            return self._cache.manifest(digest)
        manifest = self.stores.first(lambda store: store.manifest(digest))
        path = self._directory / f"{digest.hex()}.manifest"
        path.with_suffix(".manifest-new").write_bytes(manifest.encode())
        path.with_suffix(".manifest-new").rename(path)
        return manifest

    def _seed(self, local: LocalOrigin, digest: Digest) -> None:
        for image in list(self._images.values()):
            if image.digest != digest:
                local.add(image.partial.path, image.manifest, image.partial.present)
        for seed in self._cache.seeds():
            local.add(seed.path, seed.manifest, None)

    async def _seal(self, image: Image) -> None:
        """Everything is there: give the file its final name and tell the agent."""
        if image.partial.path.suffix != ".part":
            return
        path = self._cache.path(image.digest)
        try:
            await asyncio.to_thread(image.partial.seal, path)
        except OSError as error:
            self._event(str(image.digest), f"cannot complete the image: {error}")
            return
        if image.partial.complete:
            self._event(str(image.digest), "the image is complete", complete=str(path))
        async with self._lock:
            if not image.exports:
                await self._release(image)

    async def _release_unasked(self, image: Image) -> None:
        async with self._lock:
            idle = not image.exports and image.filling.fill is not Fill.NOW
            if idle and time.monotonic() - image.asked_s > _RELAY_S:
                await self._release(image)

    async def _release(self, image: Image) -> None:
        """Nobody reads it through us any more: an incomplete image stays as it is."""
        if self._images.pop(image.digest, None):
            await self._fetcher.remove(image.filling)
            image.local.close()
            image.partial.close()

    # -- traces

    async def _replay(self, image: Image) -> None:
        trace = await asyncio.to_thread(self._traces.best, image.digest, image.manifest)
        if trace:
            image.filling.prefetch(trace.chunks(image.manifest.ids))

    def _end_trace(self, image: Image, reader: Reader) -> None:
        recorder, reader.recorder = reader.recorder, None
        if recorder and recorder.order:
            self._later(asyncio.to_thread(self._traces.keep, image.digest, image.manifest, recorder))

    # -- policy

    def pin(self, digest: Digest, *, pinned: bool) -> None:
        """Keep an image although nobody uses it, or no longer."""
        path = self._directory / f"{digest.hex()}.pin"
        if pinned:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    async def prefetch(self, digest: Digest) -> None:
        """Bring the whole image here."""
        if not self._cache.has(digest):
            async with self._lock:
                image = await self._opened(digest)
                image.filling.fill = Fill.NOW
                self._fetcher.pump()

    async def prune(self, limit_bytes: int | None = None) -> list[str]:
        """Forget images, least recently used first, until the cache is below the limit; their digests."""
        limit = self._options.cache_bytes if limit_bytes is None else limit_bytes
        if not limit and limit_bytes is None:
            return []
        used = {reference.image for reference in self._references.values()}
        rows = self.ls()
        total = sum(row["used_bytes"] for row in rows)
        gone = []
        for row in sorted(rows, key=lambda row: float(row["used_s"])):
            digest = Digest.parse(row["digest"])
            if total <= limit or row["digest"] in used or row["pinned"] or digest in self._images:
                continue
            for suffix in (".raw", ".have", ".part", ".manifest"):
                (self._directory / f"{digest.hex()}{suffix}").unlink(missing_ok=True)
            total -= row["used_bytes"]
            gone.append(row["digest"])
        if total > limit:
            self._event(
                "", f"the cache holds {total >> 20} MiB, {limit >> 20} are allowed: the rest is in use"
            )
        return gone

    # -- seeing

    def ls(self) -> list[dict[str, Any]]:
        """A row for each image of the cache, complete or not."""
        rows = list_images(self._directory)
        for row in rows:
            row |= self._figures(Digest.parse(row["digest"]))
        return rows

    def _figures(self, digest: Digest) -> dict[str, Any]:
        image = self._images.get(digest)
        if image is None:
            return {}
        filling, readers = image.filling, [reader for _, reader in image.exports.values()]
        return {
            "present_bytes": image.partial.present_bytes,
            "data_bytes": image.manifest.data_bytes,
            "fill": str(filling.fill),
            "received": dict(filling.received),
            "requests": filling.requests,
            "last_error": filling.last_error,
            "exports": {
                name: {
                    "reads": r.reads, "read_bytes": r.read_bytes, "waits": r.waits,
                    "waited_s": round(r.waited_s, 3), "failures": r.failures, "clients": server.connections,
                }
                for name, (server, r) in image.exports.items()
            },
            "waited_s": round(sum(reader.waited_s for reader in readers), 3),
        }  # fmt: skip

    def free_bytes(self) -> int:
        """Room on the cache's file system."""
        return shutil.disk_usage(self._directory).free

    def _event(self, image: str, message: str, **more: str) -> None:
        log.info("%s %s", image[:15], message)
        readers = [r.reader for r in self._references.values() if r.image == image]
        # Grows over restarts too.
        self.newest = max(self.newest + 1, time.time_ns() // 1_000_000)
        entry = {
            "seq": self.newest,
            "time_s": time.time(),
            "image": image,
            "readers": readers,
            "message": message,
        }
        self.events = [*self.events[-_KEPT_EVENTS:], entry | more]
        self._later(self._wake())

    async def _wake(self) -> None:
        async with self.happened:
            self.happened.notify_all()

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("in the background: %s", task.exception(), exc_info=task.exception())


def _first_layout(origins: Sequence[StoreOrigin]) -> Layout | None:
    for origin in origins:
        with contextlib.suppress(StoreError):
            return origin.layout()
    return None
