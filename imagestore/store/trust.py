"""Signed names: a client of The Update Framework over a store's own backend (https://theupdateframework.github.io/specification).

A published store carries TUF metadata under `tuf/FINGERPRINT/`, where the fingerprint is the BLAKE3 of the first root:
so a mirror holds the trees of all whose images it carries, untouched, beside its own. Each name and architecture is a
target `names/NAME/TAG/ARCH` whose hash `blake3` is the manifest's digest: the manifest names every byte below it, so
nothing else need be signed. python-tuf keeps what it has verified in a directory of the client's; when a mirror goes
bad or away, names verified before still resolve, with a warning, and nothing new does.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from imagestore import durable
from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend
from imagestore.errors import Corrupt, Denied, Invalid, NotFound, StoreError, Unavailable
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TUF, kind_of
from imagestore.outside import decimal
from imagestore.settings import Settings
from imagestore.store.names import NameRecord, Names, check_architecture, check_name
from imagestore.store.store import Store, StoreInfo

HASH = "blake3"
_PIECE_BYTES = 64 << 10
_ROOT_BYTES = 512_000
_FRESH_S = 30.0  # how long a program that keeps a store open takes its word before it asks again
log = logging.getLogger(__name__)

Target = tuple[str, str, str]  # name, tag, architecture


def tree(fingerprint: Digest) -> str:
    """Prefix of the keys of one signer's metadata."""
    return f"{TUF.key(fingerprint.hex())}/"


def target_path(name: str, tag: str, architecture: str) -> str:
    """The TUF target of a name."""
    return f"names/{check_name(name)}/{check_name(tag, 'tag')}/{check_architecture(architecture)}"


def parse_targets(targets: Targets) -> dict[Target, Digest]:
    """What a targets role says of names. Raises Corrupt: whoever signed it did not mean sf."""
    found = {}
    for path, target in targets.targets.items():
        try:
            kind, name, tag, architecture = path.split("/")
            if kind != "names" or path != target_path(name, tag, architecture):
                raise Invalid(f"not a name: {path[:80]!r}")
            found[name, tag, architecture] = Digest.parse(target.hashes[HASH])
        except (ValueError, KeyError, Invalid) as error:
            raise Corrupt(f"the signed target {path[:80]!r} is no image's name") from error
    return found


class _BackendFetcher(FetcherInterface):
    """Lets python-tuf read through the store's backend, which does the retrying, proxies and CAs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.last = "1.root.json"

    def _fetch(self, url: str) -> Iterator[bytes]:
        """The caller stops at the length it allows: an endless file costs a piece more than that."""
        self.last = url
        try:
            size = self._backend.stat(url).size_bytes
        except NotFound as error:
            raise tuf.DownloadHTTPError(str(error), 404) from error
        for start in range(0, size, _PIECE_BYTES):
            yield self._backend.get(url, start, min(_PIECE_BYTES, size - start)).data


class Trust:
    """One signer's names, as far as this client has verified them. `directory` is its memory."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self._backend = backend
        self._directory = directory

    @classmethod
    def bootstrap(cls, backend: Backend, directory: Path, fingerprint: Digest) -> "Trust":
        """Start to trust a signer by the digest of its first root, which `refresh` verifies. Raises Denied."""
        key = f"{tree(fingerprint)}1.root.json"
        try:
            size = backend.stat(key).size_bytes
            root = backend.get(key, 0, min(size, _ROOT_BYTES)).data
        except NotFound as error:
            hint = "compare the fingerprint with its owner's"
            raise Denied(f"{backend.url} is not signed by {fingerprint}", hint=hint) from error
        if Digest.of(root) != fingerprint:
            raise Denied(f"the root of {backend.url} is {Digest.of(root)}, not {fingerprint}")
        Directory(directory).put("anchor.json", root)
        return cls(backend, directory)

    def refresh(self) -> None:
        """Fetch and verify what the remote signs now. Raises StoreError: its message says which rule was broken."""
        fetcher = _BackendFetcher(self._backend)
        with self._locked():
            try:
                anchor = (self._directory / "anchor.json").read_bytes()
                base = tree(Digest.of(anchor))
                updater = Updater(str(self._directory), base, fetcher=fetcher, bootstrap=anchor)
                try:
                    updater.refresh()
                finally:
                    self._make_durable()
                parse_targets(self._targets())
            except (tuf.RepositoryError, tuf.DownloadError) as error:
                raise _explain(error, fetcher.last.rpartition("/")[2], self._backend.url) from error

    def names(self) -> dict[Target, Digest]:
        """Every name that was verified last; empty before the first refresh."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            return parse_targets(self._targets())
        return {}

    def _targets(self) -> Targets:
        # python-tuf writes this file only after its whole chain of signatures held.
        return Metadata[Targets].from_bytes((self._directory / "targets.json").read_bytes()).signed

    def _make_durable(self) -> None:
        """python-tuf renames without fsync: versions that a power cut took back could be rolled back unnoticed."""
        history = self._directory / "root_history"
        for path in (*self._directory.glob("*.json"), *history.glob("*.json"), history, self._directory):
            durable.sync(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """python-tuf wants one user of its directory at a time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            with durable.locked(self._directory / ".tuf.lock"):
                yield
        except tuf.RepositoryError as error:
            hint = "delete it: sf then starts from the fingerprint again"
            raise Corrupt(f"{self._directory}: {error}", hint=hint) from error


def trust_memories() -> Path:
    """Where this machine (root) or user remembers what signers showed: one memory for all mirrors of one signer."""
    state = Settings().get("state_dir") or ("/var/lib/sf" if os.geteuid() == 0 else "")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(Settings().get("trust_dir") or (Path(state) if state else Path(data) / "sf") / "trust")


def memory(fingerprint: Digest) -> Path:
    """Where what one signer showed is kept."""
    return trust_memories() / fingerprint.hex()[:32]


def trusted_until(fingerprint: Digest) -> datetime | None:
    """When the last verified word of a signer expires; None before this machine has seen any. Raises Corrupt."""
    with contextlib.suppress(NotFound):
        seen: Metadata[Timestamp] = read_metadata(Directory(memory(fingerprint)), "timestamp.json")
        return seen.signed.expires
    return None


def open_signed(backend: Backend, fingerprint: Digest) -> Store:
    """The store in `backend` with the names that this signer gives it; from memory while the backend is away.

    Raises Denied where it is not signed by the one expected.
    """
    directory = memory(fingerprint)
    kept = directory / "store.json"
    try:
        if not (directory / "anchor.json").exists():
            Trust.bootstrap(backend, directory, fingerprint)
        info = Store.open(backend).info
        if not kept.exists() or kept.read_bytes() != info.encode():
            Directory(directory).put(kept.name, info.encode())
    except (NotFound, Unavailable) as error:
        if not kept.exists():
            # Not NotFound, for which names would be looked up in the next remote.
            raise error if isinstance(error, Unavailable) else Denied(str(error)) from error
        info = StoreInfo.decode(kept.read_bytes())
    return Store(backend, info, names=SignedNames(backend, Trust(backend, directory), fingerprint))


class SignedNames(Names):
    """The names of a store as one signer vouches for them: a draft that was not published is not among them."""

    def __init__(self, backend: Backend, trust: Trust, fingerprint: Digest) -> None:
        super().__init__(backend)
        self.fingerprint = fingerprint
        self._url, self._trust = backend.url, trust
        self._asked_at_s = -_FRESH_S
        self._reason: StoreError | None = None

    def read(self, name: str, tag: str) -> NameRecord:
        """The signed images of a name; each architecture that was verified."""
        known = self._believed(f"taking {name}:{tag} as it", name, tag)
        images = {arch: digest for (_, _, arch), digest in known.items()}
        return NameRecord(name, tag, revision=int(bool(images)), images=images)

    def _believed(self, doing: str, *only: str) -> dict[Target, Digest]:
        """The names, or those of one, as they are signed now, or were when the store could last be believed."""
        reason, known = self.doubt(), self._trust.names()
        known = {target: digest for target, digest in known.items() if not only or target[:2] == only}
        if reason and not known:
            raise reason.with_traceback(None)  # it may be said again
        if reason:
            log.warning("%s; %s was verified before", reason, doing)
        return known

    def _known(self) -> list[str]:
        return sorted({f"{name}:{tag}" for name, tag, _ in self._trust.names()})

    def list(self, *, removed: bool = False, lenient: bool = False) -> Iterator[NameRecord]:
        """What is signed now, or was when the store could last be believed."""
        every: dict[tuple[str, str], dict[str, Digest]] = {}
        for (name, tag, architecture), digest in self._believed("showing what").items():
            every.setdefault((name, tag), {})[architecture] = digest
        for name_tag, images in sorted(every.items()):
            yield NameRecord(*name_tag, revision=1, images=images)

    def doubt(self) -> StoreError | None:
        if time.monotonic() - self._asked_at_s >= _FRESH_S:
            try:
                self._trust.refresh()
                self._reason = None
            except StoreError as error:  # of a mirror that is away each name would cost a minute
                self._reason = error
            self._asked_at_s = time.monotonic()
        return self._reason

    def _change(self, name: str, tag: str, change: Callable[[NameRecord], NameRecord]) -> NameRecord:
        hint = "push to the store itself, then `sf mirror publish`"
        raise Denied(f"the names of {self._url} are signed and cannot be changed from here", hint=hint)


def _explain(error: Exception, file: str, url: str) -> StoreError:
    """python-tuf's error as one of ours, in words. `file`: what was read last, which is what broke the rule."""
    role = file.removesuffix(".json").rpartition(".")[2]
    if isinstance(error, tuf.DownloadHTTPError) and role == "timestamp":
        return Denied(f"{url} is unsigned: it publishes no timestamp", hint="its owner: `sf mirror publish`")
    if isinstance(error, tuf.DownloadLengthMismatchError):
        return Corrupt(f"{url} answers with an endless {file}")
    if isinstance(error, tuf.DownloadError):
        cause = error.__cause__ or error
        return cause if isinstance(cause, StoreError) else Unavailable(f"{url}: {file}: {cause}")
    if isinstance(error, tuf.ExpiredMetadataError):
        if "timestamp" in str(error):
            hint = "somebody holds newer names back, or its owner's `sf mirror refresh` does not run"
            return Denied(f"{url} is frozen: its timestamp is past its date", hint=hint)
        return Denied(f"{url} has expired: {error}", hint="its owner has to sign anew")
    if isinstance(error, tuf.BadVersionNumberError):
        if role in ("timestamp", "root") or "targets.json" in str(error):
            return Denied(f"{url} was rolled back: {error}", hint="it shows older names than it did before")
        return Denied(f"{url} is mixed: {file} is not of the same publication: {error}")
    if isinstance(error, tuf.LengthOrHashMismatchError):
        return Denied(f"{url} is mixed: {file} is not the one that was signed for")
    if isinstance(error, tuf.UnsignedMetadataError):
        return Denied(f"{url} is signed by the wrong key: {file}: {error}")
    return Corrupt(f"{url}: {file}: {error}")


def signed_targets(backend: Backend, prefix: str = TUF.prefix) -> dict[Target, set[Digest]]:
    """What the newest targets of every tree (or one) in our own store name, unverified: who brought them checked."""
    found: dict[Target, set[Digest]] = {}
    for base, version in newest(backend, prefix, "targets").items():
        targets = read_metadata(backend, f"{base}{version}.targets.json").signed
        for target, digest in parse_targets(targets).items():
            found.setdefault(target, set()).add(digest)
    return found


def newest(backend: Backend, prefix: str, role: str) -> dict[str, int]:
    """By tree: the highest version of a role's metadata there, also of a publication that was interrupted."""
    found: dict[str, int] = {}
    for stat in backend.list(prefix):
        base, slash, file = stat.key.rpartition("/")
        version, _, rest = file.partition(".")
        ours = rest == f"{role}.json" and kind_of(stat.key) is TUF
        if ours and (number := decimal(version)) is not None:
            found[base + slash] = max(found.get(base + slash, 0), number)
    return found


def read_metadata(backend: Backend, key: str) -> Metadata[Any]:
    """Unverified. Raises NotFound, Corrupt."""
    try:
        return Metadata.from_bytes(backend.get(key).data)
    except (tuf.RepositoryError, ValueError) as error:
        raise Corrupt(f"{backend.url}/{key}: {error}") from error


def make_target(name: str, tag: str, architecture: str, digest: Digest, size_bytes: int) -> TargetFile:
    """The signed statement "this name is this manifest"."""
    return TargetFile(size_bytes, {HASH: digest.hex()}, target_path(name, tag, architecture))
