"""Names: the mutable objects that point at immutable manifests, changed by compare-and-swap.

What people type is `[remote/]name[:tag][@b3:digest]`. One object per name and tag holds the manifest of
each architecture, a revision and a nonce: whoever gets a Conflict, or no answer, reads it back, and finds
its own nonce if it was its own write that arrived.
"""

import difflib
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.errors import Conflict, Corrupt, Invalid, NotFound, StoreError, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import NAMES, kind_of
from imagestore.formats.sealed import decode, seal
from imagestore.outside import YEAR_9999_S, real, whole

if TYPE_CHECKING:
    from imagestore.store.index import LocalIndex

log = logging.getLogger(__name__)
LATEST = "latest"
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
PREFIX_DIGITS = 12
_NAME = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_]{0,31}")
_DIGEST = re.compile(r"b3:([0-9a-f]{12,64})")
_NAME_LENGTH = 100
_HISTORY_LENGTH = 100
_ATTEMPTS = 30


@dataclass(frozen=True, slots=True)
class Reference:
    """What a person typed. `digest_prefix` has 12 to 64 hex digits; `name` is empty when only it was given."""

    name: str
    tag: str = LATEST
    remote: str | None = None
    digest_prefix: str | None = None

    @property
    def digest(self) -> Digest | None:
        """The whole digest, where all of it was given."""
        whole = self.digest_prefix is not None and len(self.digest_prefix) == 64
        return Digest.parse(self.digest_prefix or "") if whole else None

    def __str__(self) -> str:
        text = f"{self.remote}/" if self.remote else ""
        text += f"{self.name}:{self.tag}" if self.name else ""
        return text + (f"@b3:{self.digest_prefix}" if self.digest_prefix else "")


def parse_reference(text: str) -> Reference:
    """Read `[remote/]name[:tag][@b3:digest]` or `b3:digest`. Raises Invalid."""
    rest, at, digest = text.partition("@")
    if not at and _DIGEST.fullmatch(text):
        rest, at, digest = "", "@", text
    prefix = None
    if at:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            hint = f"a digest is b3: and 64 hex digits, or the first {PREFIX_DIGITS} or more of them"
            raise Invalid(f"not a digest: {digest[:80]!r}", hint=hint)
        prefix = match[1]
        if not rest:
            return Reference("", digest_prefix=prefix)
    remote, slash, rest = rest.rpartition("/")
    name, colon, tag = rest.partition(":")
    if slash:
        check_name(remote, "remote")
    tag = check_name(tag, "tag") if colon else LATEST
    return Reference(check_name(name), tag, remote if slash else None, prefix)


def check_name(text: str, what: str = "name") -> str:
    """The text itself if it may be a name, a tag or a remote's name, else Invalid."""
    if len(text) > _NAME_LENGTH or not _NAME.fullmatch(text):
        hint = f"lower-case letters, digits, and . _ - between them; at most {_NAME_LENGTH} characters"
        raise Invalid(f"not a valid {what}: {text[:120]!r}", hint=hint)
    return text


def check_architecture(text: str) -> str:
    """The architecture as `uname -m` says it (amd64 and arm64 are translated), else Invalid."""
    if not _ARCHITECTURE.fullmatch(text):
        raise Invalid(f"not an architecture: {text[:80]!r}", hint="for example x86_64 or aarch64")
    return ARCHITECTURES.get(text, text)


@dataclass(frozen=True, slots=True)
class Change:
    """A former state of a name. `at_s`: when it was set, by the store's clock."""

    revision: int
    images: Mapping[str, Digest]
    removed: bool
    at_s: float


@dataclass(frozen=True, slots=True)
class NameRecord:
    """The object behind `name:tag`. `images`: architecture to manifest; a tombstone keeps them for undelete."""

    name: str
    tag: str
    revision: int = 0
    nonce: str = ""
    images: Mapping[str, Digest] = field(default_factory=dict)
    removed: bool = False
    history: Sequence[Change] = ()
    etag: str | None = None
    modified_s: float = 0.0

    def digest(self, architecture: str) -> Digest:
        """The manifest for one architecture. Raises NotFound."""
        found = self.images.get(check_architecture(architecture))
        if found is None:
            has = ", ".join(sorted(self.images)) or "none"
            raise NotFound(f"{self.name}:{self.tag} has no image for {architecture}", hint=f"it has: {has}")
        return found

    @property
    def state(self) -> Change:
        """As the history will have it."""
        return Change(self.revision, self.images, self.removed, self.modified_s)

    def encode(self) -> bytes:
        """The sealed object; etag and time are the store's, not in it."""
        history = [_state(change) | {"at": round(change.at_s, 3)} for change in self.history]
        body = {"name": self.name, "tag": self.tag, "nonce": self.nonce, "history": history}
        return seal(body | _state(self.state))

    @classmethod
    def decode(cls, data: bytes, *, etag: str | None = None, modified_s: float = 0.0) -> "NameRecord":
        """Raises Corrupt for what is no name, Unsupported for a later format."""
        return replace(decode(data, "name", cls._of), etag=etag, modified_s=modified_s)

    @classmethod
    def _of(cls, body: dict[str, Any]) -> "NameRecord":
        history = tuple(_change(entry, real(entry["at"], high=YEAR_9999_S)) for entry in body["history"])
        name, tag, now = check_name(body["name"]), check_name(body["tag"], "tag"), _change(body, 0.0)
        return cls(name, tag, now.revision, str(body["nonce"]), now.images, now.removed, history)


def _state(change: Change) -> dict[str, Any]:
    images = {architecture: str(digest) for architecture, digest in change.images.items()}
    return {"revision": change.revision, "images": images, "removed": change.removed}


def _change(body: dict[str, Any], at_s: float) -> Change:
    images = {check_architecture(key): Digest.parse(value) for key, value in body["images"].items()}
    return Change(whole(body["revision"]), images, bool(body["removed"]), at_s)


def name_key(name: str, tag: str) -> str:
    """Where the store keeps it."""
    return NAMES.key(check_name(name), check_name(tag, "tag"))


class Names:
    """The names of one store. Without conditional writes only one writer at a time may use the changing verbs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.local: LocalIndex | None = None  # where a list remembers the records that it read, if anywhere

    def get(self, name: str, tag: str = LATEST) -> NameRecord:
        """Raises NotFound, with the nearest names as the hint, also for a removed one."""
        record = self.read(name, tag)
        if record.revision == 0 or record.removed:
            near = self.nearest(f"{name}:{tag}")
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            if record.removed:
                hint = "it was removed; `sf image undelete` brings it back within the grace period"
            raise NotFound(f"no image {name}:{tag} in {self._backend.url}", hint=hint)
        return record

    def read(self, name: str, tag: str) -> NameRecord:
        """The record as it is: a tombstone too, and revision 0 where there is none."""
        record = self._read(name, tag)
        if (record.name, record.tag) != (name, tag):
            key = name_key(name, tag)
            raise Corrupt(f"{self._backend.url}/{key} holds the name {record.name}:{record.tag}")
        return record

    def _read(self, name: str, tag: str) -> NameRecord:
        key = name_key(name, tag)
        try:
            found = self._backend.get(key)
        except NotFound:
            return NameRecord(name, tag)
        if not found.data:  # deleted, where deletes know no conditions
            return NameRecord(name, tag, etag=found.stat.etag)
        return NameRecord.decode(found.data, etag=found.stat.etag, modified_s=found.stat.modified_s)

    def set(self, name: str, tag: str, architecture: str, digest: Digest) -> NameRecord:
        """Point one architecture at a manifest; the others stay."""
        architecture = check_architecture(architecture)

        def change(old: NameRecord) -> NameRecord:
            kept = {} if old.removed else old.images
            return replace(old, images={**kept, architecture: digest}, removed=False)

        return self._change(name, tag, change)

    def remove(self, name: str, tag: str = LATEST, architecture: str | None = None) -> NameRecord:
        """Leave a tombstone, or take one architecture away. Raises NotFound."""
        self.get(name, tag)

        def change(old: NameRecord) -> NameRecord:
            if architecture is None or set(old.images) == {check_architecture(architecture)}:
                return replace(old, removed=True)
            old.digest(architecture)
            gone = check_architecture(architecture)
            return replace(old, images={key: value for key, value in old.images.items() if key != gone})

        return self._change(name, tag, change)

    def undelete(self, name: str, tag: str = LATEST) -> NameRecord:
        """Undo `remove`. Raises NotFound when there is no tombstone (any more)."""

        def change(old: NameRecord) -> NameRecord:
            if not old.removed:
                raise NotFound(f"{name}:{tag} was not removed, or its grace period is over")
            return replace(old, removed=False)

        return self._change(name, tag, change)

    def mend_times(self, record: NameRecord, ahead_s: float) -> None:
        """Write it as it is, so that its time is now; in its history nothing is after `ahead_s`. Raises Conflict."""
        history = tuple(replace(change, at_s=min(change.at_s, ahead_s)) for change in record.history)
        data = replace(record, history=history).encode()
        self._backend.put(name_key(record.name, record.tag), data, if_match=record.etag)

    def history(self, name: str, tag: str = LATEST) -> list[Change]:
        """Every state still remembered, newest first; a tombstone has one too. Raises NotFound."""
        record = self.read(name, tag)
        if record.revision == 0:
            return [*self.get(name, tag).history]
        return [record.state, *record.history]

    def images(self, *, lenient: bool = False) -> dict[tuple[str, str, str], Digest]:
        """Every image that has a name, by name, tag and architecture."""
        return {(r.name, r.tag, a): d for r in self.list(lenient=lenient) for a, d in r.images.items()}

    def doubt(self) -> StoreError | None:
        """Why names cannot be believed now, as they were read; a store's own always can."""
        return None

    def nearest(self, name: str) -> list[str]:
        """Existing `name:tag`s that resemble this one, for error messages; none where nothing can be listed."""
        known = self._known()
        same = [text for text in known if text.partition(":")[0] == name.partition(":")[0]]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        return list(dict.fromkeys([*close, *same]))[:3]

    def _known(self) -> list[str]:
        with suppress(Unsupported):
            found = (stat.key for stat in self._backend.list(NAMES.prefix) if kind_of(stat.key) is NAMES)
            return [":".join(key.split("/")[1:]) for key in found]
        return []

    def _change(self, name: str, tag: str, change: Callable[[NameRecord], NameRecord]) -> NameRecord:
        nonce = secrets.token_hex(16)
        for _ in range(_ATTEMPTS):
            old = self.read(name, tag)
            if old.nonce == nonce:
                return old
            new = change(replace(old, revision=old.revision + 1, nonce=nonce))
            if old.revision and (new.images, new.removed) == (old.images, old.removed):
                return old
            history = (old.state, *old.history) if old.revision else ()
            new = replace(new, history=history[:_HISTORY_LENGTH])
            key, absent = name_key(name, tag), old.etag is None
            try:
                stat = self._backend.put(key, new.encode(), if_match=old.etag, if_none_match=absent)
            except Conflict:
                # Another writer was first, or this is the repeat of a write whose answer was lost: the
                # nonce tells. A later writer may already stand on ours: then its history holds our revision.
                seen = self.read(name, tag)
                if any((past.revision, past.images) == (new.revision, new.images) for past in seen.history):
                    return replace(new, etag=None)
                continue
            return replace(new, etag=stat.etag, modified_s=stat.modified_s)
        raise Conflict(f"{name}:{tag} is being changed by too many writers at once", hint="try again")

    def list(self, *, removed: bool = False, lenient: bool = False) -> Iterator[NameRecord]:
        """All names, in order; with `removed` the tombstones too. What is no name's key is passed over.

        A record that was copied to another name's key counts as that name. Raises Corrupt, Unsupported.
        lenient: names are only shown; one that cannot be read is left out, and logged.
        """
        stats = [s for s in self._backend.list(NAMES.prefix) if s.size_bytes and kind_of(s.key) is NAMES]
        known, seen = self.local.recall("names") if self.local else {}, dict[str, list[str | None]]()

        def read(stat: ObjectStat) -> NameRecord:
            match known.get(stat.key):
                case [stat.etag, str(text)]:
                    with suppress(Corrupt, Unsupported):
                        return NameRecord.decode(text.encode(), etag=stat.etag, modified_s=stat.modified_s)
            try:
                return self._read(*stat.key.split("/")[1:])
            except (Corrupt, Unsupported) as err:
                if not lenient:
                    raise
                log.warning("%s/%s is left out: %s", self._backend.url, stat.key, err)
                return NameRecord("", "")

        with ThreadPoolExecutor(8, "names") as pool:
            for stat, record in zip(stats, pool.map(read, stats), strict=True):
                if record.revision:
                    seen[stat.key] = [record.etag, record.encode().decode()]
                    name, tag = stat.key.split("/")[1:]
                    if removed or not record.removed:
                        yield replace(record, name=name, tag=tag)
        if self.local and seen != known:
            self.local.remember("names", seen)
