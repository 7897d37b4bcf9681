"""The publisher's side of signed names (the client's is `imagestore.store.trust`).

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
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from imagestore.backends.directory import Directory
from imagestore.backends.wrappers import replace
from imagestore.durable import sync
from imagestore.errors import Conflict, Invalid, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import MANIFESTS, PACKS
from imagestore.store.store import Store
from imagestore.store.trust import Target, make_target, newest, parse_targets, read_metadata, tree
from imagestore.updates.making import make_update
from imagestore.updates.using import read_steps

LIFETIMES = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
}
ROLES = tuple(LIFETIMES)


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

    @property
    def fingerprint(self) -> Digest:
        """Digest of the first root that these keys belong to. Raises NotFound."""
        try:
            return Digest.parse((self.directory / "fingerprint").read_text().strip())
        except FileNotFoundError as error:
            raise NotFound(f"no keys in {self.directory}", hint="`sf mirror init` makes them") from error

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
        sync(self.directory)
        return signer

    def signers(self, role: str, root: Root) -> list[CryptoSigner]:
        """The keys here that `root` accepts for a role. Raises NotFound when they are fewer than its threshold."""
        found = []
        for path in sorted(self.directory.glob(f"{role}*.pem")):
            try:
                signer = CryptoSigner(load_pem_private_key(path.read_bytes(), None))
            except (ValueError, TypeError, UnsupportedAlgorithm) as error:
                raise Invalid(f"{path} is no private key: {error}") from error
            if signer.public_key.keyid in root.roles[role].keyids:
                found.append(signer)
        if len(found) < root.roles[role].threshold:
            hint = "give the directory that has them with --keys or --root-keys"
            raise NotFound(f"{self.directory} has not enough keys of the role {role}", hint=hint)
        return found


def init(store: Store, keys: Keyring, *, root_keys: int = 1, threshold: int = 1) -> Digest:
    """Make keys and the first root; returns its digest, which clients compare. Raises Conflict if there is one."""
    store.check_writable()
    store.check_public()
    if not 1 <= threshold <= root_keys:
        raise Invalid(f"a threshold of {threshold} of {root_keys} root keys cannot be")
    if (keys.directory / "fingerprint").exists():
        raise Conflict(f"{keys.directory} has keys already", hint="`sf mirror rotate` changes them")
    root = Root(expires=_expiry("root"), consistent_snapshot=True)
    made = {role: [keys.create(role) for _ in range(root_keys if role == "root" else 1)] for role in ROLES}
    for role, signers in made.items():
        for signer in signers:
            root.add_key(signer.public_key, role)
    root.roles["root"].threshold = threshold
    data = _sign(Metadata(root), made["root"])
    fingerprint = Digest.of(data)
    store.backend.put(f"{tree(fingerprint)}1.root.json", data)
    # Last: without this file the keys are nobody's, and the next `init` makes others.
    Directory(keys.directory).put("fingerprint", f"{fingerprint}\n".encode())
    return fingerprint


class Publisher:
    """Signs the names of one store with one set of keys. root_keys: where the root's are, if elsewhere."""

    def __init__(self, store: Store, keys: Keyring, root_keys: Keyring | None = None) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = keys
        self._root_keys = root_keys or keys
        self._base = tree(keys.fingerprint)

    def rotate(self, role: str) -> int:
        """Give a role new keys, as many as it had, and take its old ones away; returns the new root's version.

        A root is signed by the old root's keys and by the new ones, so that clients of any age follow.
        """
        self._store.check_writable()
        metadata = self._root()
        old = self._root_keys.signers("root", metadata.signed)
        fresh = []
        for keyid in list(metadata.signed.roles[role].keyids):
            metadata.signed.revoke_key(keyid, role)
            fresh.append((self._root_keys if role == "root" else self._keys).create(role))
            metadata.signed.add_key(fresh[-1].public_key, role)
        metadata.signed.version += 1
        metadata.signed.expires = _expiry("root")
        data = _sign(metadata, [*old, *fresh] if role == "root" else old)
        self._write(f"{metadata.signed.version}.root.json", data)
        return metadata.signed.version

    def publish(self, images: Mapping[Target, Digest] | None = None) -> Published:
        """Sign the store's names (or exactly `images`) as they are now, with updates from what was signed before.

        Raises NotFound for an image whose manifest, layout or packs are not all there; Conflict when another
        publisher was quicker.
        """
        self._store.check_writable()
        root = self._root().signed
        signers = {role: self._keys.signers(role, root) for role in ROLES[1:]}
        self._update(self._store.names.images() if images is None else images)  # meanwhile others may sign
        images = self._store.names.images() if images is None else images
        sizes = check_complete(self._store, set(images.values()))
        stamp, etag = self._timestamp()
        before = parse_targets(self._targets(stamp)) if stamp else {}
        changed = tuple(sorted(key for key in images if before.get(key, images[key]) != images[key]))
        targets = Targets(version=self._newest("targets") + 1, expires=_expiry("targets"))
        for (name, tag, architecture), digest in images.items():
            target = make_target(name, tag, architecture, digest, sizes[digest])
            targets.targets[target.path] = target
        data = _sign(Metadata(targets), signers["targets"])
        self._write(f"{targets.version}.targets.json", data)
        self._stamp(signers, stamp, etag, targets.version)
        added, removed = (tuple(sorted(set(a) - set(b))) for a, b in ((images, before), (before, images)))
        return Published(targets.version, added, changed, removed)

    def _update(self, images: Mapping[Target, Digest]) -> None:
        for key, former in self.published()[0].items():
            digest = images.get(key, former)
            with suppress(StoreError, OSError):  # who holds the former one fetches frames
                if digest != former and former not in read_steps(self._store, digest):
                    make_update(self._store, former, digest)

    def refresh(self) -> datetime:
        """Renew the timestamp, and the snapshot when half its life is over; returns the new date of expiry."""
        self._store.check_writable()
        root = self._root().signed
        stamp, etag = self._timestamp()
        if stamp is None:
            hint = "`sf mirror publish` comes first"
            raise NotFound(f"{self._store.url} has published nothing yet", hint=hint)
        signers = {"timestamp": self._keys.signers("timestamp", root)}
        with suppress(NotFound):  # the snapshot's key may be elsewhere: the timestamp alone does for a while
            signers["snapshot"] = self._keys.signers("snapshot", root)
        snapshot = self._read(f"{stamp.signed.snapshot_meta.version}.snapshot.json")
        young = snapshot.signed.expires - datetime.now(UTC) > LIFETIMES["snapshot"] / 2
        valid = root.get_verification_result("snapshot", snapshot.signed_bytes, snapshot.signatures).verified
        renew = "snapshot" in signers and not (young and valid)
        return self._stamp(signers, stamp, etag, snapshot.signed.meta["targets.json"].version if renew else 0)

    def published(self) -> tuple[dict[Target, Digest], datetime | None]:
        """The names in force, unverified (it is our own store), and when the timestamp expires."""
        stamp, _ = self._timestamp()
        return (parse_targets(self._targets(stamp)), stamp.signed.expires) if stamp else ({}, None)

    def _stamp(
        self,
        signers: Mapping[str, list[CryptoSigner]],
        old: Metadata[Timestamp] | None,
        etag: str | None,
        targets_version: int,
    ) -> datetime:
        """Write a snapshot that names this version of the targets (0: keep the snapshot), then the timestamp."""
        version = old.signed.snapshot_meta.version if old else 0
        if targets_version:
            version = self._newest("snapshot") + 1
            snapshot = Snapshot(version=version, expires=_expiry("snapshot"))
            snapshot.meta["targets.json"] = MetaFile(version=targets_version)
            self._write(f"{version}.snapshot.json", _sign(Metadata(snapshot), signers["snapshot"]))
        number = old.signed.version + 1 if old else 1
        stamp = Timestamp(number, expires=_expiry("timestamp"), snapshot_meta=MetaFile(version=version))
        self._write("timestamp.json", _sign(Metadata(stamp), signers["timestamp"]), etag)
        return stamp.expires

    def _write(self, file: str, data: bytes, etag: str | None = None) -> None:
        """What nobody else has written meanwhile: a version is of one publisher. Raises Conflict."""
        try:
            replace(self._backend, self._base + file, data, etag)
        except Conflict as error:
            raise Conflict("another publisher was quicker", hint="publish again") from error

    def _root(self) -> Metadata[Root]:
        return self._read(f"{self._newest('root')}.root.json")

    def _targets(self, stamp: Metadata[Timestamp]) -> Targets:
        snapshot = self._read(f"{stamp.signed.snapshot_meta.version}.snapshot.json").signed
        targets: Targets = self._read(f"{snapshot.meta['targets.json'].version}.targets.json").signed
        return targets

    def _timestamp(self) -> tuple[Metadata[Timestamp] | None, str | None]:
        try:
            etag = self._backend.stat(f"{self._base}timestamp.json").etag
            return self._read("timestamp.json"), etag
        except NotFound:
            return None, None

    def _read(self, file: str) -> Metadata[Any]:
        return read_metadata(self._backend, self._base + file)

    def _newest(self, role: str) -> int:
        return newest(self._backend, self._base, role).get(self._base, 0)


def _expiry(role: str) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + LIFETIMES[role]


def _sign(metadata: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def check_complete(store: Store, digests: set[Digest]) -> dict[Digest, int]:
    """Size of each manifest in bytes, after seeing that its layout and packs are there. Raises NotFound."""
    packs = {stat.key[-64:] for stat in store.objects(PACKS)}
    sizes = {}
    for digest in digests:
        layout = store.layout(digest)
        missing = [pack for pack in layout.packs if pack.hex() not in packs]
        if missing:
            hint = "`sf store verify --repair-from URL` may bring it back"
            raise NotFound(f"{store.url}: {digest} lacks {len(missing)} of its packs", hint=hint)
        sizes[digest] = store.backend.stat(MANIFESTS.key(digest)).size_bytes
    return sizes
