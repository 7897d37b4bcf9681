"""What a signed store's client refuses, each with its own words, and what still resolves when the store goes bad."""

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tuf.api.metadata import Metadata

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import ObjectStat
from imagestore.errors import Conflict, Corrupt, Denied, NotFound, Unavailable
from imagestore.formats.chunking import ChunkerParams
from imagestore.formats.columns import FRAME
from imagestore.formats.digest import Digest
from imagestore.formats.keys import INFO, LAYOUTS, MANIFESTS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.mirror import signing
from imagestore.mirror.replicate import copy_tree
from imagestore.mirror.signing import Publisher
from imagestore.store.resolve import resolve
from imagestore.store.store import Store
from imagestore.store.trust import SignedNames, Trust, open_signed, signed_targets, tree, trusted_until
from tests.memory import Memory

EMPTY_U4 = np.zeros(0, np.uint32)
NO_IDS = np.zeros((0, 32), np.uint8)


def add_image(store: Store, name: str, size_bytes: int, tag: str = "latest") -> Digest:
    """An image of zeros: a manifest and a layout, no pack."""
    manifest = Manifest(
        size_bytes=size_bytes,
        architecture="x86_64",
        chunker=ChunkerParams(),
        disk_id=Digest.of(b""),
        run_offsets=np.zeros(0, np.uint64),
        run_chunks=EMPTY_U4,
        lengths=EMPTY_U4,
        ids=NO_IDS,
    )
    digest = manifest.digest
    layout = Layout(digest, (), np.zeros(0, FRAME), EMPTY_U4, EMPTY_U4)
    store.backend.put(LAYOUTS.key(digest), layout.encode())
    store.backend.put(MANIFESTS.key(digest), manifest.encode())
    store.names.set(name, tag, "x86_64", digest)
    return digest


class Resolved(NamedTuple):
    digest: Digest
    warning: str


class Mirror:
    """A signed store in a directory, and one client of it."""

    def __init__(self, path: Path) -> None:
        self.backend = Directory(path / "store")
        self.store = Store.init(self.backend)
        self.keys = signing.Keyring(path / "keys")
        self.fingerprint = signing.init(self.store, self.keys)
        self.client = Trust.bootstrap(self.backend, path / "client", self.fingerprint)
        self.publisher = Publisher(self.store, self.keys)
        self.base = tree(self.fingerprint)
        self.path = path

    def resolve(self, name: str, client: Trust | None = None) -> "Resolved":
        """What a client that has just started finds under a name, and what it warns of."""
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("imagestore.store.trust")
        logger.addHandler(handler)
        try:
            names = SignedNames(self.backend, client or self.client, self.fingerprint)
            return Resolved(names.get(name).digest("amd64"), " ".join(said))
        finally:
            logger.removeHandler(handler)

    def files(self) -> dict[str, bytes]:
        return {stat.key: self.backend.get(stat.key).data for stat in self.backend.list("tuf/")}

    def restore(self, files: dict[str, bytes]) -> None:
        for key, data in files.items():
            self.backend.put(key, data)


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path)


def test_a_published_name_resolves_and_a_draft_does_not(mirror: Mirror) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    published = mirror.publisher.publish()
    assert published.added == (("debian", "latest", "x86_64"),)
    draft = add_image(mirror.store, "debian", 2 << 20)
    signed = mirror.resolve("debian")
    assert (signed.digest, signed.warning) == (debian, "")
    assert mirror.publisher.publish().changed == (("debian", "latest", "x86_64"),)
    assert mirror.resolve("debian").digest == draft
    with pytest.raises(NotFound, match="ubuntu:latest"):
        mirror.resolve("ubuntu")


def test_a_name_without_its_layout_is_not_published(mirror: Mirror) -> None:
    digest = add_image(mirror.store, "debian", 1 << 20)
    mirror.backend.delete(LAYOUTS.key(digest))
    with pytest.raises(NotFound):
        mirror.publisher.publish()
    with pytest.raises(Denied, match="unsigned"):
        mirror.resolve("debian")


def test_another_root_than_the_one_that_was_expected_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    other = Digest.of(b"x")
    with pytest.raises(Denied, match="not signed by"):
        Trust.bootstrap(mirror.backend, tmp_path / "other", other)
    mirror.backend.put(tree(other) + "1.root.json", mirror.backend.get(mirror.base + "1.root.json").data)
    with pytest.raises(Denied, match="the root of"):
        Trust.bootstrap(mirror.backend, tmp_path / "other", other)
    mirror.backend.put(tree(Digest.of(b"{}")) + "1.root.json", b"{}")
    none = Trust.bootstrap(mirror.backend, tmp_path / "other", Digest.of(b"{}"))
    with pytest.raises(Corrupt, match=r"1\.root\.json"):
        none.refresh()
    assert none.names() == {}


def test_a_rollback_is_refused_and_what_was_verified_still_resolves(mirror: Mirror) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    old = mirror.files()
    newer = add_image(mirror.store, "debian", 2 << 20)
    mirror.publisher.publish()
    assert mirror.resolve("debian").digest == newer
    mirror.restore(old)
    with pytest.raises(Denied, match="rolled back"):
        mirror.client.refresh()
    signed = mirror.resolve("debian")
    assert signed.digest == newer and "rolled back" in signed.warning
    with pytest.raises(Denied, match="rolled back"):
        mirror.resolve("ubuntu")


def test_a_freeze_is_noticed_when_the_timestamp_expires(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    mirror.client.refresh()
    with monkeypatch.context() as patch:
        patch.setitem(signing.LIFETIMES, "timestamp", timedelta(seconds=-1))
        mirror.publisher.refresh()
    with pytest.raises(Denied, match="frozen"):
        mirror.client.refresh()
    assert "frozen" in mirror.resolve("debian").warning
    assert mirror.resolve("debian").digest == debian
    mirror.publisher.refresh()
    assert mirror.resolve("debian").warning == ""


def test_expired_targets_are_refused(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    monkeypatch.setitem(signing.LIFETIMES, "targets", timedelta(seconds=-1))
    mirror.publisher.publish()
    with pytest.raises(Denied, match=r"expired.*targets"):
        mirror.resolve("debian")


def test_metadata_of_different_publications_do_not_mix(mirror: Mirror) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    files = mirror.files()
    add_image(mirror.store, "debian", 2 << 20)
    mirror.publisher.publish()
    mirror.backend.put(mirror.base + "2.targets.json", files[mirror.base + "1.targets.json"])
    with pytest.raises(Denied, match="mixed"):
        mirror.client.refresh()


def test_a_wrong_key_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    thief_store = Store.init(Directory(tmp_path / "thief"))
    thief_keys = signing.Keyring(tmp_path / "thief-keys")
    theirs = tree(signing.init(thief_store, thief_keys))
    add_image(thief_store, "debian", 3 << 20)
    Publisher(thief_store, thief_keys).publish()
    for stat in thief_store.backend.list(theirs):
        if "root" not in stat.key:
            data = thief_store.backend.get(stat.key).data
            mirror.backend.put(mirror.base + stat.key.removeprefix(theirs), data)
    with pytest.raises(Denied, match="wrong key"):
        mirror.resolve("debian")


def test_endless_metadata_is_cut_off(mirror: Mirror) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    mirror.backend.put(mirror.base + "timestamp.json", b" " * (1 << 20))
    with pytest.raises(Corrupt, match="endless"):
        mirror.client.refresh()


def test_nonsense_is_an_error_of_ours(mirror: Mirror) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    for nonsense in (b"", b"{", b"[]", b'{"signed": {}}'):
        mirror.backend.put(mirror.base + "timestamp.json", nonsense)
        with pytest.raises((Corrupt, Denied)):
            mirror.client.refresh()


def test_every_role_can_be_rotated_and_a_client_of_any_age_follows(mirror: Mirror) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    for role in (*signing.ROLES, "root"):
        mirror.publisher.rotate(role)
    mirror.publisher.publish()
    assert mirror.resolve("debian").digest == debian


def test_a_rotated_timestamp_key_is_taken_up_by_refresh(mirror: Mirror) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    mirror.publisher.rotate("timestamp")
    mirror.publisher.rotate("snapshot")
    with pytest.raises(Denied, match="wrong key"):
        mirror.client.refresh()
    mirror.publisher.refresh()
    assert mirror.resolve("debian").digest == debian


def test_root_keys_can_be_kept_elsewhere_and_are_only_needed_to_rotate(mirror: Mirror) -> None:
    offline = mirror.path / "safe"
    offline.mkdir()
    (mirror.keys.directory / "root.pem").rename(offline / "root.pem")
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    with pytest.raises(NotFound, match="root"):
        mirror.publisher.rotate("targets")
    assert Publisher(mirror.store, mirror.keys, signing.Keyring(offline)).rotate("targets") == 2


def test_a_publisher_that_was_overtaken_says_so(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    seen = mirror.publisher._timestamp()
    mirror.publisher.refresh()
    monkeypatch.setattr(mirror.publisher, "_timestamp", lambda: seen)
    with pytest.raises(Conflict, match="quicker"):
        mirror.publisher.publish()


def test_a_publisher_that_was_overtaken_replaces_nothing_of_the_quicker_one(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    add_image(mirror.store, "ubuntu", 2 << 20)
    Publisher(mirror.store, mirror.keys).publish()
    published = mirror.files()
    for seen in ({"root": 1, "targets": 1}, {"root": 1, "targets": 5, "snapshot": 1}):
        monkeypatch.setattr(mirror.publisher, "_newest", seen.__getitem__)
        with pytest.raises(Conflict, match="quicker"):
            mirror.publisher.publish({})
    assert published.items() <= mirror.files().items()


def test_a_rotation_whose_answer_was_lost_is_one(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Directory.put

    def twice(self: Directory, *what: Any, **conditions: Any) -> ObjectStat:
        put(self, *what, **conditions)
        return put(self, *what, **conditions)

    monkeypatch.setattr(Directory, "put", twice)
    assert mirror.publisher.rotate("targets") == 2


def test_an_older_copy_of_a_publication_replaces_no_newer_one(mirror: Mirror, tmp_path: Path) -> None:
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    copy = Directory(tmp_path / "copy")
    copy_tree(mirror.backend, copy, mirror.fingerprint)
    newer = add_image(mirror.store, "debian", 2 << 20)
    mirror.publisher.publish()
    assert mirror.resolve("debian").digest == newer
    copy_tree(copy, mirror.backend, mirror.fingerprint)
    assert mirror.resolve("debian") == (newer, "")
    copy_tree(mirror.backend, copy, mirror.fingerprint)
    assert signed_targets(copy)["debian", "latest", "x86_64"] == {newer}


@pytest.mark.parametrize("file", ["1.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_what_nobody_signed_comes_into_no_mirror_of_a_mirror(
    mirror: Mirror, tmp_path: Path, file: str
) -> None:
    """It would stay there: what has a later version is replaced by nothing that the signer publishes."""
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    shown, copy = mirror.backend.get(mirror.base + file).data, Directory(tmp_path / "copy")
    forged = Metadata[Any].from_bytes(shown)
    forged.signed.version = 10**6
    other = {"timestamp.json": "1.targets.json"}.get(file, "timestamp.json")
    for data in (forged.to_bytes(), b"{", b"", mirror.backend.get(mirror.base + other).data):
        mirror.backend.put(mirror.base + file, data)
        with pytest.raises(Corrupt):
            copy_tree(mirror.backend, copy, mirror.fingerprint)
        assert list(copy.list("")) == []
    mirror.backend.put(mirror.base + file, shown)
    copy_tree(mirror.backend, copy, mirror.fingerprint)
    assert {stat.key: copy.get(stat.key).data for stat in copy.list("")} == mirror.files()


def test_a_mirror_that_is_away_is_not_asked_again_for_each_name(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    debian, asked = add_image(mirror.store, "debian", 1 << 20), list[str]()
    mirror.publisher.publish()
    mirror.resolve("debian")
    refresh = Trust.refresh

    def away(trust: Trust) -> None:
        asked.append("away")
        raise Unavailable("the mirror is away")

    monkeypatch.setattr(Trust, "refresh", away)
    names = SignedNames(mirror.backend, mirror.client, mirror.fingerprint)
    for _ in range(3):
        assert names.get("debian").digest("x86_64") == debian
        assert isinstance(names.doubt(), Unavailable)
    assert asked == ["away"] and caplog.text.count("the mirror is away") == 3
    monkeypatch.setattr(Trust, "refresh", refresh)
    monkeypatch.setattr(names, "_asked_at_s", -60.0)
    assert names.doubt() is None and names.doubt() is None


def test_two_signers_live_side_by_side_in_one_store(mirror: Mirror, tmp_path: Path) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    keys = signing.Keyring(tmp_path / "adopter")
    fingerprint = signing.init(mirror.store, keys)
    Publisher(mirror.store, keys).publish()
    other = Trust.bootstrap(mirror.backend, tmp_path / "other", fingerprint)
    assert mirror.resolve("debian", other).digest == debian
    assert mirror.resolve("debian").digest == debian
    assert signed_targets(mirror.backend) == {("debian", "latest", "x86_64"): {debian}}


def test_private_keys_are_for_their_owner_alone(mirror: Mirror) -> None:
    assert {path.stat().st_mode & 0o777 for path in mirror.keys.directory.glob("*.pem")} == {0o600}


def test_when_the_store_is_away_verified_names_resolve_with_a_warning(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    mirror.client.refresh()

    def away(key: str) -> None:
        raise Unavailable("the store does not answer")

    monkeypatch.setattr(mirror.backend, "stat", away)
    signed = mirror.resolve("debian")
    assert signed.digest == debian and "does not answer" in signed.warning
    with pytest.raises(Unavailable):
        mirror.resolve("ubuntu")


def test_what_was_verified_is_on_the_disk_before_anybody_relies_on_it(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.rotate("timestamp")
    mirror.publisher.publish()
    monkeypatch.setattr(os, "fsync", noting)
    mirror.client.refresh()
    kept = [
        path
        for path in (mirror.path / "client").rglob("*")
        if path.name not in (".tmp", ".tuf.lock", ".lock")
    ]
    assert {"timestamp.json", "snapshot.json", "targets.json", "2.root.json"} <= {path.name for path in kept}
    anchor = mirror.path / "client" / "anchor.json"  # of an earlier run
    assert [path.name for path in kept if path.stat().st_ino not in synced | {anchor.stat().st_ino}] == []


def test_a_memory_that_was_never_finished_is_begun_again(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_TRUST_DIR", str(tmp_path / "memory"))
    debian = add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    put = Directory.put

    def dies(self: Directory, key: str, *rest: object, **more: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(Directory, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            open_signed(mirror.backend, mirror.fingerprint)
        monkeypatch.setattr(Directory, "put", put)
        store = open_signed(mirror.backend, mirror.fingerprint)
        assert store.names.get("debian").digest("amd64") == debian
        next((tmp_path / "memory").rglob("store.json")).unlink()


def test_who_hides_a_signed_store_does_not_make_the_next_one_choose_the_image(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian, other = add_image(mirror.store, "debian", 1 << 20), Store.init(Memory())
    add_image(other, "debian", 2 << 20)
    mirror.publisher.publish()
    data = mirror.backend.get(INFO.tree).data
    mirror.backend.delete(INFO.tree)
    stores = {"signed": lambda: open_signed(mirror.backend, mirror.fingerprint), "next": other}
    monkeypatch.setenv("SF_TRUST_DIR", str(tmp_path / "memory"))
    with pytest.raises(Denied):
        resolve("debian", "x86_64", stores)
    mirror.backend.put(INFO.tree, data)
    assert resolve("debian", "x86_64", stores).digest == debian
    mirror.backend.delete(INFO.tree)
    assert resolve("debian", "x86_64", stores).digest == debian


def test_a_memory_that_was_damaged_is_an_error_of_ours(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_TRUST_DIR", str(tmp_path / "memory"))
    assert trusted_until(mirror.fingerprint) is None
    add_image(mirror.store, "debian", 1 << 20)
    mirror.publisher.publish()
    open_signed(mirror.backend, mirror.fingerprint).names.get("debian")
    assert trusted_until(mirror.fingerprint) == mirror.publisher.published()[1]
    for name in ("timestamp.json", "store.json"):
        next((tmp_path / "memory").rglob(name)).write_bytes(b"{")
    open_signed(mirror.backend, mirror.fingerprint)
    with pytest.raises(Corrupt):
        trusted_until(mirror.fingerprint)


def test_a_root_of_several_keys_keeps_their_number_and_threshold_when_it_is_rotated(tmp_path: Path) -> None:
    store, keys = Store.init(Directory(tmp_path / "store")), signing.Keyring(tmp_path / "keys")
    fingerprint = signing.init(store, keys, root_keys=3, threshold=2)
    debian = add_image(store, "debian", 1 << 20)
    publisher = Publisher(store, keys)
    assert publisher.rotate("root") == 2
    role = publisher._root().signed.roles["root"]
    assert (len(role.keyids), role.threshold) == (3, 2)
    publisher.publish()
    client = Trust.bootstrap(store.backend, tmp_path / "client", fingerprint)
    client.refresh()
    assert set(client.names().values()) == {debian}
