"""The image service of a node: owns the cache, knows who is backed by what, forgets old images.

<cache>/<hex>.pin                never forgotten
<cache>/readers/<id>.json        which overlay is backed by which image: written before its export is answered,
                                 so that a service that was killed opens the same sockets again
Images while they are fetched and served, and the other files: `imagestore.cache.open_images`.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagestore import durable
from imagestore.cache.images import ImageCache, list_images
from imagestore.cache.node_stores import Stores
from imagestore.cache.open_images import OpenImages, Options
from imagestore.cache.peers import PeerServer, Site
from imagestore.cache.wanted import Fill
from imagestore.errors import Conflict, Invalid, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.outside import read_json

log = logging.getLogger(__name__)
_KEPT_EVENTS = 256
_REOPEN_S = 5.0
_READER = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """An overlay that is backed by an image. `nbd`: through an export, otherwise by the raw file."""

    reader: str
    image: str
    nbd: bool
    fill: str = Fill.NOW
    patience_s: float = 120.0


class ImageService:
    """Made and used on the event loop; `start` before anything else. The directories are there."""

    def __init__(self, cache: Path, run: Path, stores: Sequence[str], options: Options) -> None:
        self._cache, self._directory, self._cache_bytes = ImageCache(cache, {}), cache, options.cache_bytes
        self._stores, self._site = Stores(stores), Site()
        places = (self._cache, run, self._stores, self._site)
        self.images = OpenImages(*places, options, tell=self._tell, make_room=self.prune)
        self._peers = PeerServer(self._site, self.images.give)
        self._references: dict[str, Reference] = {}
        self._writing = asyncio.Lock()
        self._events: list[dict[str, Any]] = []
        self._newest = 0
        self._happened = asyncio.Event()

    async def start(self) -> None:
        """Open again what guests were reading when the last service ended; what fails is tried again."""
        self._unopened = dict.fromkeys(sorted((self._directory / "readers").glob("*.json")), "")
        await self._reopen()
        self._reopening = asyncio.create_task(self._keep_reopening())

    async def _keep_reopening(self) -> None:
        while self._unopened:
            await asyncio.sleep(_REOPEN_S)
            await self._reopen()

    async def _reopen(self) -> None:
        for path, said in list(self._unopened.items()):
            try:
                if path.exists():
                    reference = Reference(**read_json(path.read_bytes()))
                    reference = self._references.setdefault(reference.reader, reference)
                    if reference.nbd:
                        await self._export(reference)
                del self._unopened[path]
            except (ValueError, TypeError, StoreError, OSError) as error:
                self._unopened[path] = str(error)
                if said != str(error):
                    self._tell("", f"cannot serve the reader {path.stem} yet: {error}", reader=path.stem)

    async def close(self) -> None:
        """Stop serving; what was fetched is kept. Guests wait for the next service."""
        self._reopening.cancel()
        await self.images.close()
        await self._peers.close()
        self._stores.close()

    async def join(self, me: str, listen: str, peers: Mapping[str, str], secret: str) -> None:
        """Share with these nodes (name to host:port), listening on an address of ours. Raises OSError, ValueError."""
        self._site.me, self._site.addresses, self._site.secret = me, dict(peers), bytes.fromhex(secret)
        await self._peers.listen(listen)

    async def use(self, stores: Sequence[str]) -> None:
        """Fetch from the stores at these URLs, in this order, from now on."""
        urls = [str(url) for url in stores]
        if urls != self._stores.urls:
            self._stores.urls = urls
            self.images.renew()

    async def readable(self) -> dict[str, str]:
        """URL → identity of those of them that can be opened now."""
        return await asyncio.to_thread(self._stores.readable)

    # -- readers

    async def attach(
        self, image: str, reader: str, *, fill: str = Fill.NOW, patience_s: float = 120.0
    ) -> dict[str, Any]:
        """What an overlay is to be backed by: {kind: "raw", path} if the image is complete, else {kind: "nbd", path}.

        Asked before its guest starts, so that an image that was completed meanwhile is read without us. Raises
        NotFound, Unavailable, Invalid, Conflict.
        """
        if not _READER.fullmatch(reader):
            raise Invalid(f"not a reader's name: {reader[:80]!r}")
        digest, known = Digest.parse(image), self._references.get(reader)
        if known and known.image != str(digest):
            raise Conflict(f"{reader} is backed by {known.image}")
        if self._cache.has(digest):
            path = self._cache.path(digest)
            with contextlib.suppress(PermissionError):  # somebody else put it there
                os.utime(path)
            await self._remember(reader, Reference(reader, str(digest), nbd=False))
            await self.images.unexport(reader)
            return {"kind": "raw", "path": str(path), "size_bytes": path.stat().st_size}
        reference = Reference(reader, str(digest), True, Fill(fill), patience_s)
        await self._remember(reader, reference)
        try:
            socket, size_bytes = await self._export(reference)
        except (StoreError, OSError):
            if not known:
                await self._remember(reader, None)
            raise
        return {"kind": "nbd", "path": str(socket), "size_bytes": size_bytes}

    async def settle(self, reader: str) -> None:
        """The overlay is backed by the raw file now: end its export, keep the reference."""
        reference = self._references.get(reader)
        if reference is None:
            raise NotFound(f"no reader is called {reader}")
        await self._remember(reader, Reference(reader, reference.image, nbd=False))
        await self.images.unexport(reader)

    async def detach(self, reader: str) -> None:
        """The overlay is gone. Twice is once."""
        await self._remember(reader, None)
        await self.images.unexport(reader)

    async def sync(self, readers: Iterable[str]) -> None:
        """These are all the overlays that there are."""
        for reader in set(self._references) - set(readers):
            await self.detach(reader)

    async def _remember(self, reader: str, reference: Reference | None) -> None:
        """From now on, also for the next service; None: there is no such reader."""
        if reference:
            self._references[reader] = reference
        else:
            self._references.pop(reader, None)
        async with self._writing:
            # In a thread: guests read on while the disk syncs.
            await asyncio.to_thread(self._write, reader)

    def _write(self, reader: str) -> None:
        path, reference = self._directory / "readers" / f"{reader}.json", self._references.get(reader)
        if reference:
            durable.write(path, json.dumps(asdict(reference)).encode(), 0o666)
        else:
            path.unlink(missing_ok=True)

    async def _export(self, reference: Reference) -> tuple[Path, int]:
        digest, fill = Digest.parse(reference.image), Fill(reference.fill)
        return await self.images.export(digest, reference.reader, fill, reference.patience_s)

    # -- policy

    async def pin(self, image: str) -> None:
        """Keep an image although nobody uses it."""
        self._pin(image).touch()

    async def unpin(self, image: str) -> None:
        """Keep it no longer than others."""
        self._pin(image).unlink(missing_ok=True)

    def _pin(self, image: str) -> Path:
        return self._directory / f"{Digest.parse(image).hex()}.pin"

    async def prune(self, limit_bytes: int | None = None) -> list[str]:
        """Forget images, least recently used first, until the cache is below the limit; their digests."""
        limit = self._cache_bytes if limit_bytes is None else limit_bytes
        if not limit and limit_bytes is None:
            return []
        used = {reference.image for reference in self._references.values()}
        rows = self._rows()
        total = sum(row["used_bytes"] for row in rows)
        gone = []
        for row in sorted(rows, key=lambda row: float(row["used_s"])):
            digest = Digest.parse(row["digest"])
            if total <= limit or row["digest"] in used or row["pinned"] or digest in self.images:
                continue
            self._cache.remove(digest)
            total -= row["used_bytes"]
            gone.append(row["digest"])
        if total > limit:
            self._tell("", f"the cache holds {total >> 20} MiB, {limit >> 20} are allowed: the rest is used")
        return gone

    # -- seeing

    async def ls(self) -> dict[str, Any]:
        """A row for each image of the cache, complete or not; our process."""
        return {"pid": os.getpid(), "images": self._rows()}

    def _rows(self) -> list[dict[str, Any]]:
        rows = list_images(self._directory)
        for row in rows:
            row |= self.images.row(Digest.parse(row["digest"]))
        return rows

    async def watch(self, after: int, wait_s: float = 20.0) -> list[dict[str, Any]]:
        """Lines for people and for the agent whose numbers `seq`, which grow, are above `after`; waits for one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(60.0, wait_s)):
                while self._newest <= after:
                    await self._happened.wait()
        return [event for event in self._events if event["seq"] > after]

    def _tell(self, image: str, message: str, **more: str) -> None:
        log.info("%s %s", image[:15], message)
        # Grows over restarts too.
        self._newest = max(self._newest + 1, time.time_ns() // 1_000_000)
        readers = [r.reader for r in self._references.values() if r.image == image]
        entry = {"seq": self._newest, "time_s": time.time(), "image": image, "readers": readers}
        self._events = [*self._events[-_KEPT_EVENTS:], entry | {"message": message} | more]
        self._happened.set()
        self._happened = asyncio.Event()
