"""The publisher's side of signed names (the client's is `imagestore.trust`).

Four roles, each with its own Ed25519 keys, as TUF has them: root says whose keys count and may be kept offline,
targets signs the names, snapshot the set of metadata, timestamp that it is the newest. Written in that order:
a publisher killed at any moment leaves the former publication in force, for readers enter by the timestamp.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from imagestore.backend import Backend
from imagestore.digest import Digest
from imagestore.errors import Conflict, Corrupt, Invalid, NotFound
from imagestore.store import Store, manifest_key
from imagestore.trust import PREFIX, Target, make_target, newest_version, parse_targets

ROLES = ("root", "targets", "snapshot", "timestamp")
LIFETIMES = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
}
_TIMESTAMP = f"{PREFIX}timestamp.json"


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication changed."""

    version: int
    added: tuple[Target, ...] = ()
    changed: tuple[Target, ...] = ()
    removed: tuple[Target, ...] = ()


class Keyring:
    """Private keys in a directory of mode 0700: `ROLE.pem`, and `ROLE-2.pem` … where a role has several."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self, role: str) -> CryptoSigner:
        """Make one more key for a role, in a file that only its owner may read."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        signer = CryptoSigner.generate_ed25519()
        number = 1
        while (path := self.directory / (f"{role}-{number}.pem" if number > 1 else f"{role}.pem")).exists():
            number += 1
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(signer.private_bytes)
            os.fsync(file.fileno())
        return signer

    def signers(self, role: str, root: Root) -> list[CryptoSigner]:
        """The keys here that `root` accepts for a role. Raises NotFound when they are fewer than its threshold."""
        found = [signer for signer in self._all(role) if signer.public_key.keyid in root.roles[role].keyids]
        if len(found) < root.roles[role].threshold:
            hint = "give the directory that has them with --keys"
            raise NotFound(f"{self.directory} has not enough keys of the role {role}", hint=hint)
        return found

    def _all(self, role: str) -> list[CryptoSigner]:
        signers = []
        for path in sorted(self.directory.glob(f"{role}*.pem")):
            try:
                key = load_pem_private_key(path.read_bytes(), None)
                signers.append(CryptoSigner(key))
            except (ValueError, TypeError, UnsupportedAlgorithm) as error:
                raise Invalid(f"{path} is no private key: {error}") from error
        return signers


def _expiry(role: str) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + LIFETIMES[role]


def _sign(metadata: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def current_root(backend: Backend) -> Metadata[Root]:
    """The newest root in the store. Raises NotFound where it was never signed."""
    version = newest_version(backend, "root")
    if not version:
        raise NotFound(f"{backend.url} has no keys yet", hint="`sf mirror init` makes them")
    return _read(backend, f"{PREFIX}{version}.root.json")


def _read(backend: Backend, key: str) -> Metadata[Any]:
    try:
        return Metadata.from_bytes(backend.get(key).data)
    except (RepositoryError, ValueError) as error:
        raise Corrupt(f"{backend.url}/{key}: {error}") from error


def init(store: Store, keys: Keyring, *, root_keys: int = 1, threshold: int = 1) -> Digest:
    """Make keys and the first root; returns its digest, which clients compare. Raises Conflict if there is one."""
    store.check_writable()
    if not 1 <= threshold <= root_keys:
        raise Invalid(f"a threshold of {threshold} of {root_keys} root keys cannot be")
    if newest_version(store.backend, "root"):
        raise Conflict(f"{store.url} has a root already", hint="`sf mirror rotate` changes its keys")
    root = Root(expires=_expiry("root"), consistent_snapshot=True)
    made = {role: [keys.create(role) for _ in range(root_keys if role == "root" else 1)] for role in ROLES}
    for role, signers in made.items():
        for signer in signers:
            root.add_key(signer.public_key, role)
    root.roles["root"].threshold = threshold
    data = _sign(Metadata(root), made["root"])
    store.backend.put(f"{PREFIX}1.root.json", data, if_none_match=store.backend.conditional)
    return Digest.of(data)


def rotate(store: Store, keys: Keyring, role: str, root_keys: Keyring | None = None) -> int:
    """Give a role a new key and take its old ones away; returns the new root's version.

    A root is signed by the old root's keys and by the new ones, so that clients of any age follow.
    """
    store.check_writable()
    metadata = current_root(store.backend)
    keeper = root_keys or keys
    old = keeper.signers("root", metadata.signed)
    fresh = (keeper if role == "root" else keys).create(role)
    for keyid in list(metadata.signed.roles[role].keyids):
        metadata.signed.revoke_key(keyid, role)
    metadata.signed.add_key(fresh.public_key, role)
    if role == "root":
        metadata.signed.roles[role].threshold = 1
    metadata.signed.version += 1
    metadata.signed.expires = _expiry("root")
    data = _sign(metadata, [*old, fresh] if role == "root" else old)
    key = f"{PREFIX}{metadata.signed.version}.root.json"
    store.backend.put(key, data, if_none_match=store.backend.conditional)
    return metadata.signed.version


def publish(store: Store, keys: Keyring, images: Mapping[Target, Digest] | None = None) -> Published:
    """Sign the store's names (or exactly `images`) as they are now. Names without all their bytes stay out.

    Raises NotFound for an image whose manifest, layout or packs are not all there; Conflict when another
    publisher was quicker.
    """
    store.check_writable()
    backend = store.backend
    root = current_root(backend).signed
    signers = {role: keys.signers(role, root) for role in ROLES[1:]}
    if images is None:
        images = {
            (record.name, record.tag, architecture): digest
            for record in store.names.list()
            for architecture, digest in record.images.items()
        }
    sizes = check_complete(store, set(images.values()))
    stamp, etag = _timestamp(backend)
    before = parse_targets(_targets(backend, stamp).signed) if stamp else {}
    targets = Targets(version=newest_version(backend, "targets") + 1, expires=_expiry("targets"))
    for (name, tag, architecture), digest in images.items():
        target = make_target(name, tag, architecture, digest, sizes[digest])
        targets.targets[target.path] = target
    backend.put(f"{PREFIX}{targets.version}.targets.json", _sign(Metadata(targets), signers["targets"]))
    _stamp(backend, signers, stamp, etag, targets.version)
    return Published(
        targets.version,
        tuple(sorted(set(images) - set(before))),
        tuple(sorted(key for key in images if key in before and before[key] != images[key])),
        tuple(sorted(set(before) - set(images))),
    )


def refresh(store: Store, keys: Keyring) -> datetime:
    """Renew the timestamp, and the snapshot when half its life is over; returns the new date of expiry."""
    store.check_writable()
    root = current_root(store.backend).signed
    stamp, etag = _timestamp(store.backend)
    if stamp is None:
        raise NotFound(f"{store.url} has published nothing yet", hint="`sf mirror publish` comes first")
    signers = {"timestamp": keys.signers("timestamp", root)}
    with suppress(NotFound):  # the snapshot key may be elsewhere: the timestamp alone lives 7 days more
        signers["snapshot"] = keys.signers("snapshot", root)
    snapshot = _read(store.backend, f"{PREFIX}{stamp.signed.snapshot_meta.version}.snapshot.json").signed
    # A key that was rotated signs anew whatever its age.
    renew = "snapshot" in signers and (
        snapshot.expires - datetime.now(UTC) < LIFETIMES["snapshot"] / 2
        or not _signed_by(
            store.backend, f"{stamp.signed.snapshot_meta.version}.snapshot.json", root, "snapshot"
        )
    )
    return _stamp(store.backend, signers, stamp, etag, snapshot.meta["targets.json"].version if renew else 0)


def _signed_by(backend: Backend, file: str, root: Root, role: str) -> bool:
    metadata = _read(backend, PREFIX + file)
    return bool(root.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


def _stamp(
    backend: Backend,
    signers: Mapping[str, list[CryptoSigner]],
    old: Metadata[Timestamp] | None,
    etag: str | None,
    targets_version: int,
) -> datetime:
    """Write a snapshot that names this version of the targets (0: keep the snapshot), then the timestamp."""
    if targets_version:
        version = newest_version(backend, "snapshot") + 1
        snapshot = Snapshot(version=version, expires=_expiry("snapshot"))
        snapshot.meta["targets.json"] = MetaFile(version=targets_version)
        backend.put(f"{PREFIX}{version}.snapshot.json", _sign(Metadata(snapshot), signers["snapshot"]))
        meta = MetaFile(version=version)
    elif old is not None:
        meta = old.signed.snapshot_meta
    stamp = Timestamp(
        version=old.signed.version + 1 if old else 1, expires=_expiry("timestamp"), snapshot_meta=meta
    )
    data = _sign(Metadata(stamp), signers["timestamp"])
    if not backend.conditional:
        backend.put(_TIMESTAMP, data)
        return stamp.expires
    try:
        backend.put(_TIMESTAMP, data, if_match=etag, if_none_match=etag is None)
    except Conflict as error:
        # The repeat of a put whose answer was lost meets its own bytes.
        if backend.get(_TIMESTAMP).data != data:
            raise Conflict("another publisher was quicker", hint="publish again") from error
    return stamp.expires


def _timestamp(backend: Backend) -> tuple[Metadata[Timestamp] | None, str | None]:
    try:
        found = backend.get(_TIMESTAMP)
        return Metadata.from_bytes(found.data), found.stat.etag
    except NotFound:
        return None, None
    except (RepositoryError, ValueError) as error:
        raise Corrupt(f"{backend.url}/{_TIMESTAMP}: {error}") from error


def _targets(backend: Backend, stamp: Metadata[Timestamp]) -> Metadata[Targets]:
    snapshot = _read(backend, f"{PREFIX}{stamp.signed.snapshot_meta.version}.snapshot.json")
    return _read(backend, f"{PREFIX}{snapshot.signed.meta['targets.json'].version}.targets.json")


def published(store: Store) -> tuple[dict[Target, Digest], datetime | None]:
    """The names in force, unverified (the publisher's own store), and when the timestamp expires."""
    stamp, _ = _timestamp(store.backend)
    if stamp is None:
        return {}, None
    return parse_targets(_targets(store.backend, stamp).signed), stamp.signed.expires


def check_complete(store: Store, digests: set[Digest]) -> dict[Digest, int]:
    """Size of each manifest in bytes, after seeing that its layout and packs are there. Raises NotFound."""
    packs = {stat.key.rpartition("/")[2] for stat in store.backend.list("packs/")}
    sizes = {}
    for digest in digests:
        layout = store.layout(digest)
        missing = [pack for pack in layout.packs if pack.hex() not in packs]
        if missing:
            hint = "`sf store verify --repair` may bring it back"
            raise NotFound(f"{store.url}: {digest} lacks {len(missing)} of its packs", hint=hint)
        sizes[digest] = store.backend.stat(manifest_key(digest)).size_bytes
    return sizes
