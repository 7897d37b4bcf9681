"""How writers and the collector (imagestore/gc.py) stay out of each other's way, on stores without locks.

A writer says in a lease which packs it means to reuse: they are not condemned while it lives. Leases run out; a
writer that was suspended for longer still loses nothing, because what it uses is compared with the condemned list
before and after it sets a name, and the list's epoch tells whether packs were deleted in between.

What is condemned is never used again under that name, so nobody has to ask in time: packs get names that no other
push makes (`Lease.id` is the salt of their footers), and live data in a condemned pack is copied out.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from imagestore.backends.wrappers import replace
from imagestore.errors import NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import CONDEMNED_KEY, LEASES, PACKS
from imagestore.formats.sealed import decode, seal
from imagestore.outside import real, whole
from imagestore.store.store import Store

LEASE_S = 3600.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Condemned:
    """The list of packs that nobody may begin to use, as the store has it.

    packs: since when, by the store's clock. What the last write added has no time of its own: it is the object's.
    epoch: counts the lists that forgot packs, which happens only after these were deleted.
    damaged: packs that a verify found bad. Images that lie in them go on doing so until their chunks are stored again.
    """

    packs: dict[Digest, float] = field(default_factory=dict)
    epoch: int = 0
    etag: str | None = None
    modified_s: float = 0.0
    damaged: frozenset[Digest] = frozenset()

    @property
    def unusable(self) -> frozenset[Digest]:
        """Packs that no writer may count on."""
        return self.damaged | self.packs.keys()

    @classmethod
    def read(cls, store: Store) -> "Condemned":
        """One request. Raises Corrupt."""
        try:
            found = store.backend.get(CONDEMNED_KEY)
        except NotFound:
            return cls()
        modified_s = found.stat.modified_s

        def take(body: dict[str, Any]) -> "Condemned":
            old = {Digest.parse(text): real(since) for text, since in body["packs"].items()}
            new = {Digest.parse(text): modified_s for text in body["new"]}
            damaged = frozenset(map(Digest.parse, body.get("damaged", ())))
            return cls(new | old, whole(body["epoch"]), found.stat.etag, modified_s, damaged)

        return decode(found.data, CONDEMNED_KEY, take)

    def replace(
        self,
        store: Store,
        *,
        add: Iterable[Digest] = (),
        forget: Iterable[Digest] = (),
        damaged: Iterable[Digest] | None = None,
    ) -> "Condemned":
        """Publish the list with packs added (or their time begun again) and others, deleted before, forgotten.

        damaged: all that are, None for those that were. Raises Conflict when another collector was first.
        """
        new, gone = set(add), set(forget)
        kept = {pack: since for pack, since in self.packs.items() if pack not in gone | new}
        epoch = self.epoch + bool(gone)
        body: dict[str, Any] = {
            "packs": {pack.hex(): round(since, 3) for pack, since in kept.items()},
            "new": sorted(pack.hex() for pack in new),
            "epoch": epoch,
        }
        bad = frozenset(self.damaged if damaged is None else damaged) - gone
        if bad:
            body["damaged"] = sorted(pack.hex() for pack in bad)
        stat = replace(store.backend, CONDEMNED_KEY, seal(body), self.etag)
        return Condemned(kept | dict.fromkeys(new, stat.modified_s), epoch, stat.etag, stat.modified_s, bad)


class Lease:
    """A writer's lease, kept alive by a thread until the `with` block ends.

    `id` is the salt of every pack that this writer makes: a name that nobody made before can have been neither
    condemned nor deleted before, and a collector that was paused cannot delete it for what it once was.
    """

    def __init__(self, store: Store, what: str = "push") -> None:
        self.id = secrets.token_hex(16)
        self._store, self._what = store, what
        self._packs: set[Digest] = set()
        self._epoch: int | None = None
        """Of the list as it was before anything was made or reused: what later ones are compared with."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.begin(())
        return self

    def begin(self, packs: Iterable[Digest]) -> set[Digest]:
        """Enter it with packs that it counts on from the first, as `reuse` does. Two requests."""
        usable = self.reuse(packs)
        self._thread.start()
        return usable

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        # Best effort: a lease that stays behind runs out.
        with contextlib.suppress(StoreError):
            self._store.backend.delete(LEASES.key(self.id))

    def made(self, pack: Digest) -> None:
        """This writer uploads a pack of its own: no request now, said with the next."""
        with self._lock:
            self._packs.add(pack)

    def reuse(self, packs: Iterable[Digest]) -> set[Digest]:
        """Say that this writer counts on packs; returns those that it may use. Two requests.

        A pack known from a hint, and not from a layout just read, may be gone: that is the caller's to ask, after.
        """
        wanted = set(packs)
        with self._lock:
            self._packs |= wanted
        self._write()
        return wanted - self.unusable(wanted)

    def unusable(self, packs: Iterable[Digest]) -> set[Digest]:
        """Which of `packs` must not be used: condemned, damaged, gone. One request, unless some were deleted."""
        condemned, wanted = Condemned.read(self._store), set(packs)
        bad = wanted & condemned.unusable
        self._epoch = condemned.epoch if self._epoch is None else self._epoch
        if self._epoch != condemned.epoch:
            # The list forgot some packs since the lease began: those that it names no longer are gone.
            bad |= {pack for pack in wanted - bad if not self._store.has(PACKS.key(pack))}
        return bad

    def _write(self) -> None:
        with self._lock:
            body = {
                "what": self._what,
                "duration_s": LEASE_S,
                "packs": sorted(pack.hex() for pack in self._packs),
                "images": [],  # a writer may also hold manifests: none of ours does
            }
        self._store.backend.put(LEASES.key(self.id), seal(body))

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_S / 4):
            try:
                self._write()
            except StoreError as err:
                log.warning("the lease could not be renewed: %s", err)


def lease_of(body: dict[str, Any]) -> tuple[frozenset[Digest], frozenset[Digest], float]:
    """Packs, images and seconds of a lease. Raises what `decode` takes for Corrupt."""
    packs, images = (frozenset(map(Digest.parse, body[key])) for key in ("packs", "images"))
    return packs, images, real(body["duration_s"])
