"""The attacks that The Update Framework names, each on the real `sf`: between its commands the mirror is altered.

Whoever holds the mirror, but no key that matters, wants a client to take `debian:1` or `fresh:1` for what it is not
(https://theupdateframework.github.io/specification/latest/#goals-for-specific-attacks).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Timestamp

from imagestore.backends.directory import Directory
from imagestore.formats.digest import Digest
from imagestore.formats.keys import MANIFESTS
from imagestore.mirror.signing import Keyring, Publisher, init
from imagestore.push import push
from imagestore.store.names import name_key
from imagestore.store.store import Store
from imagestore.store.trust import tree
from tests import web
from tests.imaged import Imaged
from tests.machines import Machine, machine, run


def stolen(keys: Keyring, role: str) -> list[CryptoSigner]:
    """Every key of a role, whether a root has it or not."""
    files = sorted(keys.directory.glob(f"{role}*.pem"))
    return [CryptoSigner(load_pem_private_key(path.read_bytes(), None)) for path in files]


@dataclass
class Scene:
    """A mirror behind nginx, its owner, and a client who trusts the owner and has pulled `debian:1`."""

    path: Path
    url: str = ""
    disks: dict[str, Path] = field(default_factory=dict)
    """What each name was last given."""
    digests: dict[str, Digest] = field(default_factory=dict)
    known: str = "debian"
    """Name in `disks` and `digests` of what the client verified last as debian:1."""

    def __post_init__(self) -> None:
        self.owner, self.client = machine(self.path / "owner"), machine(self.path / "client")
        self.root = self.owner.path / "state" / "store"
        self.store = Store.init(Directory(self.root))
        self.keys = Keyring(self.owner.path / "state" / "mirror" / "keys")
        self.fingerprint = init(self.store, self.keys)
        self.publisher = Publisher(self.store, self.keys)
        self.tuf = self.root / tree(self.fingerprint)

    def publish(self, name: str, seed: int = 0) -> None:
        """A new disk under `name`:1, signed."""
        disk = self.path / f"{name}-{seed}.raw"
        disk.write_bytes(np.random.default_rng([seed, *name.encode()]).bytes(512 << 10))
        label = f"{name}-{seed}" if seed else name
        self.disks[label] = disk
        self.digests[label] = push(self.store, disk, name, "1", architecture="x86_64", format_="raw").digest
        self.publisher.publish()

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.tuf.iterdir()}

    def restore(self, files: dict[Path, bytes]) -> None:
        shutil.rmtree(self.tuf)
        self.tuf.mkdir()
        for path, data in files.items():
            path.write_bytes(data)

    def sign(self, file: str, metadata: Metadata[Any], keys: Keyring | None = None) -> None:
        """Put metadata of the attacker's into the tree, signed by keys that were stolen or are their own."""
        metadata.signatures.clear()
        for signer in stolen(keys or self.keys, metadata.signed.type):
            metadata.sign(signer, append=True)
        (self.tuf / file).write_bytes(metadata.to_bytes())

    def thief(self) -> tuple[Store, Keyring]:
        """Somebody else who publishes a debian:1 with keys of their own."""
        store, keys = Store.init(Directory(self.path / "thief")), Keyring(self.path / "thief-keys")
        init(store, keys)
        disk = self.path / "thief.raw"
        disk.write_bytes(b"\1" * (512 << 10))
        push(store, disk, "debian", "1", architecture="x86_64", format_="raw")
        Publisher(store, keys).publish()
        return store, keys

    def pull(self, who: Machine, reference: str, code: int = 0) -> tuple[Path, str]:
        """(the file, what was said on standard error)."""
        out = self.path / f"{who.path.name}.raw"
        out.unlink(missing_ok=True)
        said = who.sf("-q", "image", "pull", reference, "-o", out, code=code).stderr
        assert out.exists() == (code == 0)
        return out, said

    def gets(self, who: Machine, reference: str, disk: str) -> str:
        """Pulls what it should; what was said."""
        out, said = self.pull(who, reference)
        run("cmp", out, self.disks[disk])
        return said

    def newcomer(self) -> Machine:
        """Trusts the owner as well and has seen nothing yet."""
        found = machine(self.path / "newcomer")
        found.faketime = self.client.faketime
        config = self.client.path / "config.toml"
        shutil.copy(config, found.path)
        return found


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    scene = Scene(tmp_path)
    scene.publish("debian")
    with web.nginx(scene.root, tmp_path / "nginx") as scene.url:
        scene.client.sf("remote", "add", "m", scene.url, "--fingerprint", str(scene.fingerprint))
        assert scene.gets(scene.client, "m/debian:1", "debian") == ""
        yield scene


def roll_back(scene: Scene) -> None:
    old = scene.files()
    scene.publish("debian", 2)
    scene.client.sf("image", "show", "m/debian:1")
    scene.known = "debian-2"
    scene.restore(old)


def roll_back_with_the_timestamps_key(scene: Scene) -> None:
    scene.publish("debian", 2)
    scene.client.sf("image", "show", "m/debian:1")
    scene.known = "debian-2"
    stamp = Metadata[Timestamp].from_bytes((scene.tuf / "timestamp.json").read_bytes())
    stamp.signed.version += 1
    stamp.signed.snapshot_meta = MetaFile(version=1)
    scene.sign("timestamp.json", stamp)


def roll_back_with_all_keys_that_are_online(scene: Scene) -> None:
    scene.publish("debian", 2)
    scene.client.sf("image", "show", "m/debian:1")
    scene.known = "debian-2"
    snapshot = Metadata[Snapshot].from_bytes((scene.tuf / "2.snapshot.json").read_bytes())
    snapshot.signed.version = 3
    snapshot.signed.meta["targets.json"] = MetaFile(version=1)
    scene.sign("3.snapshot.json", snapshot)
    stamp = Metadata[Timestamp].from_bytes((scene.tuf / "timestamp.json").read_bytes())
    stamp.signed.version += 1
    stamp.signed.snapshot_meta = MetaFile(version=3)
    scene.sign("timestamp.json", stamp)


def freeze(scene: Scene) -> None:
    old = scene.files()
    scene.publish("fresh")
    scene.restore(old)
    scene.client.faketime = "+8d"


def freeze_for_two_years(scene: Scene) -> None:
    scene.client.faketime = "+800d"


def mix_targets_of_two_publications(scene: Scene) -> None:
    scene.publish("fresh")
    (scene.tuf / "2.targets.json").write_bytes((scene.tuf / "1.targets.json").read_bytes())


def mix_snapshots_of_two_publications(scene: Scene) -> None:
    scene.publish("fresh")
    (scene.tuf / "2.snapshot.json").write_bytes((scene.tuf / "1.snapshot.json").read_bytes())


def send_without_end(scene: Scene) -> None:
    scene.publish("fresh")
    os.truncate(scene.tuf / "timestamp.json", 1 << 30)


def send_a_root_without_end(scene: Scene) -> None:
    scene.publish("fresh")
    with (scene.tuf / "2.root.json").open("wb") as file:
        file.truncate(1 << 30)


def sign_with_other_keys(scene: Scene) -> None:
    store, keys = scene.thief()
    theirs = Path(store.url.removeprefix("file://")) / tree(keys.fingerprint)
    for file in ("timestamp.json", "1.snapshot.json", "1.targets.json"):
        shutil.copy(theirs / file, scene.tuf / file)


def appoint_oneself(scene: Scene) -> None:
    _, keys = scene.thief()
    root = Metadata[Root].from_bytes((scene.tuf / "1.root.json").read_bytes())
    root.signed.version = 2
    root.signed.roles["root"].keyids.clear()
    (own,) = stolen(keys, "root")
    root.signed.add_key(own.public_key, "root")
    scene.sign("2.root.json", root, keys)


def name_another_image(scene: Scene) -> None:
    scene.publish("fresh")
    file = scene.tuf / "2.targets.json"
    body = json.loads(file.read_bytes())
    targets = body["signed"]["targets"]
    targets["names/fresh/1/x86_64"] = targets["names/debian/1/x86_64"]
    file.write_text(json.dumps(body))


def stop_signing(scene: Scene) -> None:
    scene.publish("fresh")
    (scene.tuf / "timestamp.json").unlink()


@dataclass(frozen=True)
class Attack:
    do: Callable[[Scene], None]
    says: str
    code: int = 4
    newcomers: bool = True
    """Whether who has seen nothing yet is safe from it, too."""


ATTACKS = [
    Attack(roll_back, "was rolled back: New timestamp version 1 must be >= 2", newcomers=False),
    Attack(
        roll_back_with_the_timestamps_key,
        "was rolled back: New snapshot version must be >= 2",
        newcomers=False,
    ),
    Attack(
        roll_back_with_all_keys_that_are_online,
        "was rolled back: Expected targets.json version",
        newcomers=False,
    ),
    Attack(freeze, "is frozen: its timestamp is past its date"),
    Attack(freeze_for_two_years, "has expired: Final root.json is expired"),
    Attack(mix_targets_of_two_publications, "is mixed: 2.targets.json is not of the same publication"),
    Attack(mix_snapshots_of_two_publications, "is mixed: 2.snapshot.json is not of the same publication"),
    Attack(send_without_end, "answers with an endless timestamp.json", code=1),
    Attack(send_a_root_without_end, "answers with an endless 2.root.json", code=1),
    Attack(sign_with_other_keys, "is signed by the wrong key: timestamp.json"),
    Attack(appoint_oneself, "is signed by the wrong key: 2.root.json"),
    Attack(name_another_image, "is signed by the wrong key: 2.targets.json"),
    Attack(stop_signing, "is unsigned: it publishes no timestamp"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.do.__name__)
def test_an_attack_is_told_by_its_name_and_what_was_verified_before_still_works(
    scene: Scene, attack: Attack
) -> None:
    attack.do(scene)
    _, said = scene.pull(scene.client, "m/fresh:1", code=attack.code)
    assert attack.says in said
    said = scene.gets(scene.client, "m/debian:1", scene.known)
    assert attack.says in said and "as it was verified before" in said
    said = scene.gets(scene.client, f"m/debian:1@{scene.digests[scene.known]}", scene.known)
    assert attack.says in said and "needs no name" in said
    listed = scene.client.sf("image", "ls", "--store", f"{scene.url}#{scene.fingerprint}")
    assert "debian:1" in listed.stdout and "fresh" not in listed.stdout
    assert attack.says in listed.stderr and "showing what was verified before" in listed.stderr
    if attack.newcomers:
        _, said = scene.pull(scene.newcomer(), "m/debian:1", code=attack.code)
        assert attack.says in said


def test_a_manifest_or_a_pack_of_the_attackers_is_never_taken_for_what_was_signed(scene: Scene) -> None:
    scene.publish("fresh")
    manifest = scene.root / MANIFESTS.key(scene.digests["fresh"])
    good = manifest.read_bytes()
    manifest.write_bytes((scene.root / MANIFESTS.key(scene.digests["debian"])).read_bytes())
    for reference in ("m/fresh:1", f"m/fresh:1@{scene.digests['fresh']}"):
        _, said = scene.pull(scene.client, reference, code=1)
        assert "does not match" in said or "do not match" in said
    manifest.write_bytes(good)
    packs = {path: path.read_bytes() for path in (scene.root / "packs").glob("*/*")}
    for path, data in packs.items():
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    _, said = scene.pull(scene.client, "m/fresh:1", code=1)
    assert "do not match their hash" in said
    for path, data in packs.items():
        path.write_bytes(data)
    assert scene.gets(scene.client, "m/fresh:1", "fresh") == ""


def test_a_draft_that_nobody_signed_changes_nothing(scene: Scene) -> None:
    scene.publish("fresh")
    draft = scene.root / name_key("debian", "1")
    draft.write_bytes((scene.root / name_key("fresh", "1")).read_bytes())
    assert scene.gets(scene.client, "m/debian:1", "debian") == ""


def test_keys_are_rotated_and_clients_follow_without_a_word(scene: Scene) -> None:
    fromfile = machine(scene.path / "from-file")
    fromfile.sf("remote", "add", "m", scene.url, "--root", scene.tuf / "1.root.json")
    assert scene.gets(fromfile, "m/debian:1", "debian") == ""
    for role in ("timestamp", "snapshot", "targets", "root"):
        scene.owner.sf("mirror", "rotate", role)
    scene.publish("fresh")
    for who in (scene.client, fromfile, scene.newcomer()):
        assert scene.gets(who, "m/fresh:1", "fresh") == ""
        assert scene.gets(who, "m/debian:1", "debian") == ""


def test_a_client_that_was_away_for_two_years_follows_the_roots_that_came_meanwhile(scene: Scene) -> None:
    scene.owner.faketime = "+300d"
    scene.owner.sf("mirror", "rotate", "root")
    scene.owner.sf("mirror", "rotate", "targets")
    scene.publish("fresh")
    scene.owner.faketime = scene.client.faketime = "+800d"
    _, said = scene.pull(scene.client, "m/fresh:1", code=4)
    assert "is frozen" in said
    scene.owner.sf("mirror", "rotate", "root")
    scene.owner.sf("mirror", "rotate", "timestamp")
    for who in (scene.client, scene.newcomer()):
        assert scene.gets(who, "m/fresh:1", "fresh") == ""


def test_a_cached_image_is_used_while_the_mirror_is_under_attack(scene: Scene) -> None:
    url = f"{scene.url}#{scene.fingerprint}"
    environment = {key: value for key, value in scene.client.environment.items() if key.startswith("SF_")}
    with Imaged(scene.client.path / "state", url, **environment | {"SF_STORE": url}) as service:
        scene.client.sf("cache", "prefetch", "m/debian:1")
        service.wait_complete(scene.digests["debian"])
        sign_with_other_keys(scene)
        shutil.rmtree(scene.root / "packs")
        pinned = scene.client.sf("cache", "pin", "m/debian:1")
        assert "is signed by the wrong key" in pinned.stderr and "as it was verified before" in pinned.stderr
        assert service.row(scene.digests["debian"])["pinned"]
        assert "1 images, every byte is right" in scene.client.sf("cache", "verify").stdout
