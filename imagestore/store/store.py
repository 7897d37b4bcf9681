"""A store: a backend with a `store.json`, and the objects that every part of the package reads from it."""

import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.backends.wrappers import innermost, replace
from imagestore.errors import Conflict, Corrupt, Denied, NoSpace, NotFound, StoreError, Unsupported
from imagestore.formats.chunking import ChunkerParams
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import INFO, LAYOUTS, MANIFESTS, PACKS, STATES, Kind, kind_of, untrashed
from imagestore.formats.sealed import decode, seal
from imagestore.store.names import Names

if TYPE_CHECKING:  # numpy: not needed to resolve a name
    from imagestore.formats.layout import Image, Layout
    from imagestore.formats.manifest import Manifest

    Paged = tuple[Layout, Sequence[Buffer]]

T = TypeVar("T")
_PACKS_A_LIST = 4
"""A list is worth its requests while each of a thousand keys names so many that are asked for."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What `store.json` says. `conditional`: S3 address to which conditions held there: none, put, delete (both)."""

    id: str
    chunker: ChunkerParams
    private: bool = False
    """Never published, never served as a mirror: who may read a store may read all of it."""
    conditional: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The sealed object."""
        return seal(asdict(self) | {"requires": []})

    @classmethod
    def decode(cls, data: bytes) -> "StoreInfo":
        """Raises Corrupt for nonsense, Unsupported for what a later version wrote."""
        return decode(data, INFO.tree, cls._of)

    @classmethod
    def _of(cls, body: dict[str, Any]) -> "StoreInfo":
        if body["requires"]:
            needs = ", ".join(body["requires"])
            raise Unsupported(f"the store needs {needs}", hint="a newer sf made it: upgrade")
        chunker = ChunkerParams.from_dict(body["chunker"])
        private = body.get("private", False) is not False
        return cls(str(body["id"]), chunker, conditional=dict(body["conditional"]), private=private)


class Store:
    """An open store. Cheap to make (one request); whoever built the backend closes it.

    `conditional` says whether names may be changed by several writers at once. Where it is false, changing
    anything needs `single_writer`: the user's word that nobody else writes now.
    """

    def __init__(
        self, backend: Backend, info: StoreInfo, *, single_writer: bool = False, names: Names | None = None
    ) -> None:
        self.backend = backend
        self.info = info
        self.single_writer = single_writer
        self._sizes: dict[str, Any] = {}  # of disks, by digest: they never change
        self.names = names or Names(backend)
        """The mutable part; of a store with a pinned signer, what that one signed."""

    @classmethod
    def init(
        cls,
        backend: Backend,
        params: ChunkerParams | None = None,
        *,
        single_writer: bool = False,
        private: bool = False,
    ) -> "Store":
        """Make a new store. Raises Conflict when there is one already."""
        params = params or ChunkerParams()
        s3: Any = innermost(backend)
        conditional = {s3.address: s3.conditions} if backend.url.startswith("s3://") else {}
        info = StoreInfo(secrets.token_hex(16), params, conditional=conditional, private=private)
        exists = Conflict(f"there is a store in {backend.url} already")
        if not backend.conditional:
            with suppress(NotFound):
                backend.stat(INFO.tree)
                raise exists
        try:
            replace(backend, INFO.tree, info.encode(), None)
        except Conflict as err:
            raise exists from err
        return cls(backend, info, single_writer=single_writer)

    @classmethod
    def open(cls, backend: Backend, *, single_writer: bool = False) -> "Store":
        """Raises NotFound when there is no store."""
        try:
            data = backend.get(INFO.tree).data
        except NotFound as err:
            hint = "`sf store init` makes one"
            raise NotFound(f"there is no image store in {backend.url}", hint=hint) from err
        return cls(backend, StoreInfo.decode(data), single_writer=single_writer)

    @property
    def url(self) -> str:
        """For messages."""
        return self.backend.url

    def check_writable(self) -> None:
        """Raises Denied on a read-only store, Unsupported where `single_writer` has to be given first."""
        if self.backend.read_only:
            raise Denied(f"{self.url} is read-only", hint="push to the store that it mirrors")
        if not self.backend.conditional and not self.single_writer:
            hint = "with --single-writer it works as long as nobody else writes at the same time"
            raise Unsupported(f"{self.url} has no conditional writes, which keep writers apart", hint=hint)
        inner = innermost(self.backend)
        if isinstance(inner, Directory):
            inner.reserve.keep()

    def freeing(self, action: Callable[[], T]) -> T:
        """What `action` returns, which frees space in the end: where there is none, with what was set aside for it."""
        while True:
            try:
                return action()
            except NoSpace:
                inner = innermost(self.backend)
                if not isinstance(inner, Directory) or not inner.reserve.spend():
                    raise

    def check_public(self) -> None:
        """Raises Denied for a private store, and for one that keeps a server's state."""
        state = None if self.backend.read_only else next(self.objects(STATES), None)
        if self.info.private or state:
            why = "keeps the state of a server" if state else "is private"
            raise Denied(f"{self.url} {why}", hint="`sf store copy` its images into a store for everybody")

    def image(self, digest: Digest) -> "Image":
        """Manifest and layout, None where that is lost; pages of both in one go. Raises NotFound, Corrupt."""
        try:
            head, pages = self._paged(digest, range)
        except (NotFound, Corrupt):
            return self.manifest(digest), None
        half = len(pages) // 2
        manifest = self.manifest(digest, paged=(head, pages[:half]))
        with suppress(Corrupt):
            layout = head.whole(pages[half:]) if pages else head
            layout.check(manifest)
            return manifest, layout
        return manifest, None

    def manifest(self, digest: Digest, data: bytes | None = None, paged: "Paged | None" = None) -> "Manifest":
        """data: what is, or is to be, under its key; paged: its layout's head and its pages, if they were read.

        Raises NotFound, Corrupt.
        """
        from imagestore.formats.manifest import Manifest, Pages

        data = data or self._content(MANIFESTS.key(digest))
        if Digest.of(data) != digest:
            raise Corrupt(f"the bytes of manifest {digest} in {self.url} do not match it")

        def fetch(pages: Pages) -> Sequence[Buffer]:
            head, found = paged or self._paged(digest, lambda _: range(len(pages.ids)))
            if head.pages.ids[: len(pages.ids)].tobytes() != pages.ids.tobytes():
                raise Corrupt(f"the layout of {digest} in {self.url} has other pages than its manifest")
            return found

        return Manifest.decode(data, fetch)

    def sizes(self, digests: Iterable[Digest]) -> dict[Digest, int]:
        """Bytes of the disks, for lists of many images, as their manifests' first bytes say, of those there."""
        wanted, local = set(digests), self.names.local
        known = local.recall("sizes") if local else self._sizes
        fresh = [digest for digest in wanted if not isinstance(known.get(digest.hex()), int)]
        with ThreadPoolExecutor(8, "sizes") as pool:
            read = {d.hex(): size for d, size in zip(fresh, pool.map(self._size, fresh), strict=True) if size}
        if local and read:
            local.remember("sizes", known | read)
        known |= read
        return {digest: known[digest.hex()] for digest in wanted if digest.hex() in known}

    def _size(self, digest: Digest) -> int | None:
        with suppress(StoreError):  # shorter than that, perhaps
            head = self.backend.get(MANIFESTS.key(digest), 0, 1024).data
            # The keys are sorted and a quote inside a label is escaped: this can be nothing but the key itself.
            if found := re.search(rb'"size_bytes":(\d{1,15})[,}]', head):
                return int(found[1])
        with suppress(StoreError):
            return self.manifest(digest).size_bytes
        return None

    def objects(self, kind: Kind) -> Iterator[ObjectStat]:
        """Those of a kind; what lies among them and has no such key is none of ours."""
        return (stat for stat in self.backend.list(kind.prefix) if kind_of(stat.key) is kind)

    def has_manifest(self, digest: Digest) -> bool:
        """One request without a body."""
        return self.has(MANIFESTS.key(digest))

    def has(self, key: str, least_bytes: int = 1) -> bool:
        """Whether there is such an object, so long at least. One request without a body."""
        with suppress(NotFound):
            return self.backend.stat(key).size_bytes >= least_bytes
        return False

    def has_packs(self, sizes: Mapping[Digest, int]) -> set[Digest]:
        """Those of these packs that are there and at least so many bytes long.

        A request without a body for each; where they are many, most in lists, of a thousand packs a request.
        """
        found = set[Digest]()
        if len(sizes) > _PACKS_A_LIST and not self.backend.read_only:
            for number, stat in enumerate(self.objects(PACKS), 1):
                pack = Digest.parse(stat.key[-64:])
                if stat.size_bytes >= sizes.get(pack, math.inf):
                    found.add(pack)
                if number % 1000 == 0 and len(found) * 1000 < number * _PACKS_A_LIST:
                    break
        rest = [pack for pack in sizes if pack not in found]
        with ThreadPoolExecutor(8, "packs") as pool:
            there = pool.map(lambda pack: self.has(PACKS.key(pack), sizes[pack]), rest)
            return found | {pack for pack, stands in zip(rest, there, strict=True) if stands}

    def layout(self, manifest: Digest, data: bytes | None = None) -> "Layout":
        """Where the chunks of a manifest lie, now or by `data`, what was under its key. Raises NotFound, Corrupt."""
        head, pages = self._paged(manifest, lambda count: range(count // 2, count), data)
        return head.whole(pages) if pages else head

    def _paged(self, manifest: Digest, choose: Callable[[int], range], data: bytes | None = None) -> "Paged":
        """A layout's object, and those of the pages that it places, by the packs that they are in now."""
        from imagestore.formats.layout import Layout
        from imagestore.store.frames import read_pages

        for again in (False, True):
            head = Layout.decode(data or self._content(LAYOUTS.key(manifest)), manifest)
            try:
                count = len(head.pages.ids)
                return head, read_pages(self, head, choose(count)) if count else ()
            except NotFound:  # moved by a repack, perhaps
                if again or data:
                    raise
        raise AssertionError

    def _content(self, key: str) -> bytes:
        data = untrashed(self.backend.get(key).data)
        if not data:  # deleted, where deletes know no conditions
            raise NotFound(f"{self.url}/{key}: no such object")
        return data
