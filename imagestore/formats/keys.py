"""The kinds of object in a store: what their keys look like, and which rules hold for each. The one table of them.

Who adds a kind adds a row; caches, mirrors, checks and the collector go by it (docs/formats.md).
"""

import re
import secrets
from dataclasses import dataclass
from enum import Enum

from imagestore.formats.digest import Digest

TRASH = b"sf-trash 1 "
_TRASH_BYTES = len(TRASH) + 33
_DIGEST = r"([0-9a-f]{2})/\1[0-9a-f]{62}"
_HOLDER = r"[a-z0-9][a-z0-9-]{0,199}"
_SIGNED = r"[0-9a-f]{64}/[a-z0-9]{1,20}(?:\.[a-z]{1,20})?\.json"
_WORD = r"[a-z0-9][a-z0-9._-]{0,99}"


class Check(Enum):
    """What shows that an object is whole."""

    NAME = "its bytes have the digest that names it"
    FOOTER = "its footer has the digest that names it, and the hashes of all frames"
    HEAD = "its head has the digest that names it, and the hashes of all frames"
    SEAL = "it holds a digest of itself"
    SHAPE = "its structure, and what it says of other objects"
    SIGNATURE = "somebody signed it"


class End(Enum):
    """How an object leaves the store."""

    CONDEMNED = "deleted a grace after it was put on the condemned list"
    MARKED = "marked as trash, deleted a grace later if the mark is still there"
    IMAGE = "deleted with the manifest of the same digest"
    LISTED = "deleted when no image in use lists it"
    PACKS = "replaced when packs that it lists are deleted"
    TOMBSTONE = "removed by hand, deleted a grace later"
    EXPIRY = "deleted when its time is over"
    OWNER = "deleted by who wrote it, and by nobody else"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind. `tree` is the first word of its keys, `rest` a pattern of what follows, empty for the only object.

    changes: what stands under a key may be replaced, so caches ask again; else a copy is good for ever.
    public: readers need it: mirrors and web servers show it. writers: who makes it or changes it.
    good_for: what a key to the API is good for, by mirror/admission: "", read, put, swap (put by compare-and-swap) or
    own (put and delete those whose name one knows).
    """

    tree: str
    rest: str
    changes: bool
    check: Check
    end: End
    public: bool
    writers: str
    good_for: str = "read"

    @property
    def prefix(self) -> str:
        """What all keys of this kind begin with."""
        return f"{self.tree}/"

    def key(self, *names: Digest | str) -> str:
        """The key of one: `tree/ab/<hex>` for a digest (two digits keep directories small), else `tree/name/name`."""
        parts = (f"{name[:1].hex()}/{name.hex()}" if isinstance(name, Digest) else name for name in names)
        return "/".join([self.tree, *parts])

    def digest(self, key: str) -> Digest | None:
        """The digest in a key of this kind; None for any other key."""
        return Digest.parse(key[-64:]) if self.rest is _DIGEST and kind_of(key) is self else None


INFO = Kind("store.json", "", True, Check.SEAL, End.OWNER, True, "who makes the store, once")
PACKS = Kind("packs", _DIGEST, False, Check.FOOTER, End.CONDEMNED, True, "writers, collector", "put")
INDEX = Kind("index", _DIGEST, False, Check.NAME, End.PACKS, True, "writers, collector", "put")
HOOKS = Kind("hooks", "all", True, Check.SHAPE, End.PACKS, True, "writers, collector")
MANIFESTS = Kind("manifests", _DIGEST, False, Check.NAME, End.MARKED, True, "writers", "put")
LAYOUTS = Kind("layouts", _DIGEST, True, Check.SHAPE, End.MARKED, True, "writers, collector", "put")
NAMES = Kind("names", f"{_WORD}/{_WORD}", True, Check.SEAL, End.TOMBSTONE, True, "writers", "swap")
TRACES = Kind("traces", _DIGEST, True, Check.SHAPE, End.IMAGE, True, "nodes")
PROVENANCE = Kind("provenance", _DIGEST, True, Check.SHAPE, End.IMAGE, True, "mirrors", good_for="put")
SUMS = Kind("sums", _DIGEST, True, Check.SHAPE, End.IMAGE, True, "mirrors")
GROUPS = Kind("groups", _DIGEST, True, Check.SHAPE, End.IMAGE, True, "writers", "put")
UPDATES = Kind("updates", _DIGEST, True, Check.SEAL, End.IMAGE, True, "writers, mirrors")
DELTAS = Kind("deltas", _DIGEST, False, Check.HEAD, End.LISTED, True, "writers, mirrors")
TUF = Kind("tuf", _SIGNED, True, Check.SIGNATURE, End.OWNER, True, "signers")
LEASES = Kind("leases", r"[0-9a-f]{32}", True, Check.SEAL, End.EXPIRY, False, "writers, collector", "own")
REFS = Kind("refs", _HOLDER, True, Check.SEAL, End.OWNER, False, "servers", "")
STATES = Kind("state", r"[0-9a-f]{8}-\d{8}t\d{6}z", True, Check.SEAL, End.OWNER, False, "servers", "")
GC = Kind("gc", "condemned", True, Check.SEAL, End.OWNER, False, "collector")

KINDS = tuple(row for row in tuple(vars().values()) if isinstance(row, Kind))
BESIDE = tuple(kind for kind in KINDS if kind.end is End.IMAGE)
"""About an image, but no part of it: copied where they are, missed nowhere."""
HOOKS_KEY = HOOKS.key("all")
CONDEMNED_KEY = GC.key("condemned")
_BY_TREE = {kind.tree: (kind, re.compile(kind.rest)) for kind in KINDS}


def kind_of(key: str) -> Kind | None:
    """The kind whose keys look like this one; None for what is no object of a store."""
    tree, _, rest = key.partition("/")
    kind, pattern = _BY_TREE.get(tree, (None, None))
    return kind if pattern is not None and pattern.fullmatch(rest) else None


def matches(key: str, data: bytes) -> bool:
    """False for an object that is named by the digest of its bytes and has other bytes."""
    kind = kind_of(key)
    return kind is None or kind.check is not Check.NAME or Digest.of(untrashed(data)).hex() == key[-64:]


def trashed(data: bytes) -> bytes:
    """The same object marked for removal: readable as before, and with an etag of its own (imagestore/gc.py)."""
    return TRASH + secrets.token_hex(16).encode() + b"\n" + data


def untrashed(data: bytes) -> bytes:
    """The object without that mark."""
    return data[_TRASH_BYTES:] if data.startswith(TRASH) else data
