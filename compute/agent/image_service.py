"""The node's image service (`sf imaged`) as the agent sees it: kept running, asked for backing files, listened to.

Nothing else brings images to a node. The service is a process of its own: an agent that ends leaves it to the guests
that read through it, and the next agent finds it by its socket.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compute.errors import Unavailable
from compute.wire.spec import ImageSite
from imagestore import (
    Away,
    ControlClient,
    Digest,
    ImageCache,
    Invalid,
    Options,
    StoreError,
    control_socket,
    trust_memories,
    unprivileged,
)
from imagestore import Unavailable as StoreUnavailable

log = logging.getLogger(__name__)
_START_S = 15.0
_WAIT_S = 10.0
_RETRY_S = 1.0
_PAUSE_S = 0.1

Heard = Callable[[str, str], None]
"""Told (reader, what) of each event of the reader's image; "": look at all again, "figures": at what fills up."""


@dataclass(frozen=True, slots=True)
class Backing:
    """What an overlay stands on: a raw file, complete now, or (with an NBD socket) one day."""

    path: Path
    size_bytes: int
    socket: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """How guests boot from images that are not there yet."""

    stores: Callable[[], Sequence[str]]  # URLs as this machine's settings have them now
    fill: str = "now"
    patience_s: float = 120.0
    options: Options = field(default_factory=Options)
    peer_address: str = ""  # host:port where other nodes may be served


class ServedImages:
    """This node's images, complete or not, as the one process that fetches them has them. `reader` names a disk."""

    def __init__(self, cache: ImageCache, state_dir: Path, settings: Settings) -> None:
        self._cache, self._log = cache, state_dir / "run" / "imaged.log"
        self._state_dir, self._settings = state_dir, settings
        self._client = ControlClient(control_socket(state_dir))
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = _PAUSE_S
        self.peer_address = settings.peer_address
        self._handed: dict[str, str] = {}
        self._identities: dict[str, str] | None = None  # URL → the store's identity, once it was opened
        self._site: ImageSite | None = None
        self._trouble = ""
        self._missed: dict[str, str] = {}
        self._away: dict[str, float] = {}  # reader → since when the store of its image has been away
        self._closed: Path | None = None

    async def use(self, handed: Mapping[str, str]) -> None:
        """The stores at these URLs, which the server knows by these names, are read too, from now on."""
        if handed != self._handed:
            self._handed = dict(handed)
            await self.tell("use", stores=self._urls())
            self._learn(await self.tell("readable"))

    def _learn(self, readable: dict[str, str] | None) -> None:
        if readable is not None:
            self._identities = (self._identities or {}) | readable

    def _urls(self) -> list[str]:
        return list(dict.fromkeys((*self._settings.stores(), *self._handed.values())))

    @property
    def stores(self) -> tuple[str, ...] | None:
        """Identities of the stores that this node reads, without namespaces' own; None before the service has tried."""
        if self._identities is None:
            return None
        own = {url for name, url in self._handed.items() if "/" in name}
        known = {url: self._identities.get(url) for url in self._urls() if url not in own}
        return tuple(sorted(set(filter(None, known.values()))))

    async def backing(self, reader: str, digest: str) -> Backing:
        """What a guest that is about to start reads its image from.

        Raises imagestore's errors, and Unavailable (try again later) when no service can be kept running, or while a
        store has been away for less than the patience of the settings.
        """
        self._missed.pop(reader, None)
        settings = self._settings
        options: dict[str, Any] = {"fill": settings.fill, "patience_s": settings.patience_s}
        for again in (True, False):
            try:
                await self._ensure_running()
                found = await self._client.ask("attach", image=digest, reader=reader, **options)
                break
            except Away as err:
                # One that was killed over the question is asked again: the next one may answer. A snapshot asks once.
                if not again:
                    raise Unavailable(str(err), hint=err.hint) from err
            except StoreUnavailable as err:
                # A store that is away for a moment is waited for; an error would be for good.
                now = asyncio.get_running_loop().time()
                if now < self._away.setdefault(reader, now) + settings.patience_s:
                    raise Unavailable(str(err), hint=err.hint) from err
                del self._away[reader]
                raise
        self._away.pop(reader, None)
        socket = Path(found["path"]) if found["kind"] == "nbd" else None
        return Backing(self._cache.path(Digest.parse(digest)), found["size_bytes"], socket)

    def here(self) -> tuple[str, ...]:
        """Digests of the images that are complete."""
        return tuple(sorted(map(str, self._cache.digests())))

    def complete(self, digest: str) -> Path | None:
        """The complete raw file of an image, if it is here."""
        path = self._cache.path(Digest.parse(digest))
        return path if path.exists() else None

    def own_store(self, namespace: str) -> str:
        """The URL of a namespace's own store. Raises Unavailable before it is known here."""
        if not (url := self._handed.get(f"my/{namespace}", "")):
            raise Unavailable(f"namespace {namespace} has no store here yet", hint="try again")
        return url

    def admit(self, group: int) -> None:
        """Exports are this group's to connect to, also those that a service makes after a restart; images, to read."""
        for name, mode in (("run/nbd", 0o2711), ("cache", 0o710)):
            directory = self._state_dir / name
            directory.mkdir(mode=0o710, parents=True, exist_ok=True)
            os.chown(directory, -1, group)
            directory.chmod(mode)

    async def settled(self, reader: str) -> None:
        """The guest reads the raw file itself now."""
        await self._tell_surely("settle", reader)

    async def gone(self, reader: str) -> None:
        """The guest's disk is deleted."""
        self._away.pop(reader, None)
        await self._tell_surely("detach", reader)

    async def ask(self, op: str, **arguments: Any) -> Any:
        """What people ask of the service. Raises Unavailable, in its words."""
        try:
            return await self._client.ask(op, timeout_s=_WAIT_S, **arguments)
        except StoreError as err:
            raise Unavailable(str(err), hint=err.hint) from err

    async def share(self, site: ImageSite) -> None:
        """With whom to share what is here, from now on."""
        if site != self._site:
            self._site = site
            await self._join(logging.INFO)  # a service that is not there yet hears it when it is

    async def _join(self, level: int) -> None:
        site, told = self._site, self._trouble
        self._trouble = ""
        if site is None:
            return
        try:
            more = {"peers": site.peers, "secret": site.secret.hex()}
            await self._client.ask("join", timeout_s=10, me=site.me, listen=site.listen, **more)
        except StoreError as err:
            self._trouble = str(err)
            if self._trouble != told:  # tried again and again
                log.log(level, "sharing images with %s: %s", ", ".join(site.peers), err)

    async def _tell_surely(self, op: str, reader: str) -> None:
        # A service that missed it would serve this reader for ever. For what this agent cannot say any more there is
        # "sync", when the next one starts.
        self._missed[reader] = op
        await self._say_missed()

    async def _say_missed(self) -> None:
        for reader, op in list(self._missed.items()):
            try:
                await self._client.ask(op, timeout_s=10, reader=reader)
            except StoreError as err:
                log.info("image service, %s: %s", op, err)
                if isinstance(err, Away):
                    return
            if self._missed.get(reader) == op:  # and not something newer
                del self._missed[reader]

    async def tell(self, op: str, **arguments: Any) -> Any:
        """One of the service's operations, what it answers; None where it does not answer, or refuses."""
        try:
            return await self._client.ask(op, timeout_s=10, **arguments)
        except StoreError as err:
            log.info("image service, %s: %s", op, err)
            return None

    async def listen(self, heard: Heard) -> None:
        """Keep the service running and pass its events on, for ever. `heard("", "")`: look at everything again."""
        after, said = None, ""
        while True:
            try:
                await self._ensure_running()
                if after is None:
                    events = await self._client.ask("watch", after=0, wait_s=0)
                    after = max((event["seq"] for event in events), default=0)
                    heard("", "")
                await self._join(logging.WARNING)  # it may be another service than a moment ago
                await self._say_missed()
                self._learn(await self._client.ask("readable"))
                events = await self._client.ask("watch", after=after, wait_s=_WAIT_S)
                if not events:
                    heard("", "figures")  # have grown meanwhile
                for event in events:
                    after = max(after, event["seq"])
                    for reader in event["readers"]:
                        heard(reader, event["message"])
                said = ""
            except StoreError as err:
                if said != (said := str(err)):
                    log.warning("%s", err)
                await asyncio.sleep(_RETRY_S)
                after = None

    async def _ensure_running(self) -> None:
        clock, deadline = asyncio.get_running_loop().time, 0.0
        async with self._starting:
            while True:
                try:
                    await self._client.ask("use", stores=self._urls(), timeout_s=_START_S)
                    self._pause_s = _PAUSE_S
                    return
                except Away:
                    pass
                except Invalid:
                    if not deadline:
                        log.info("the image service is of an earlier version: it makes room for this one's")
                        os.kill((await self._client.ask("ls"))["pid"], signal.SIGTERM)
                deadline = deadline or clock() + _START_S
                if clock() > deadline:
                    raise Away("the image service does not start", hint=f"see {self._log}")
                if self._process is None or self._process.poll() is not None:
                    if self._process is not None:  # it may end at once, again and again
                        await asyncio.sleep(self._pause_s)
                        self._pause_s = min(2 * self._pause_s, _START_S / 2)
                    try:
                        self._process = await asyncio.to_thread(self._spawn)
                    except OSError as err:
                        raise Away(f"the image service cannot be started: {err}") from err
                await asyncio.sleep(0.02)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        options, stores = json.dumps(asdict(self._settings.options)), self._settings.stores()
        argv = [sys.executable, "-m", "imagestore.cache.imaged", str(self._state_dir), options, *stores]
        if os.geteuid() == 0:
            prefix, closed = unprivileged(self._state_dir, stores)
            if closed and not self._closed:
                log.warning("%s is closed to other users: the image service keeps the right to read", closed)
            argv, self._closed = [*prefix, *argv], closed
        # It may not read the file that SF_CONFIG names, nor root's home; what they say it is told.
        told = {**os.environ, "SF_TRUST_DIR": str(trust_memories())}
        told.pop("SF_CONFIG", None)
        # Begun anew each time, so that it stays small.
        with self._log.open("wb") as log_file:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                env=told,
            )
