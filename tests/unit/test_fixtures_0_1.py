"""What version 0.1.0 wrote to disk is read by today's code; tests/fixtures/README.md says how it was made."""

import asyncio
import gzip
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from cli.settings import access
from compute import config
from compute.agent import link as remote
from compute.agent.guest.record import Course, DisksHeld, Journal, Phase, TapsHeld
from compute.cluster.auth import Authority
from compute.cluster.certificates import certificate
from compute.cluster.desired import spec
from compute.cluster.images.artifacts import Artifact
from compute.cluster.liveness import Liveness
from compute.cluster.records.addresses import Ipam
from compute.cluster.records.instances import Instance, finish_delete
from compute.cluster.records.interfaces import Interface
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node, check_identity
from compute.cluster.records.taken import Claims, Secret, Taken, secret
from compute.cluster.records.transaction import Event, Stored, Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.serve import installation_id
from compute.wire.spec import InstanceSpec, InstanceState, Power
from imagestore import Options, Settings
from imagestore.backends.directory import Directory
from imagestore.cache.images import ImageCache, list_images
from imagestore.cache.partial import PartialImage
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TRACES
from imagestore.formats.manifest import Manifest
from imagestore.formats.trace import Trace
from imagestore.mirror.signing import Keyring, Publisher
from imagestore.pull import pull
from imagestore.store.leases import Condemned
from imagestore.store.open import open_store
from imagestore.store.roots import held
from imagestore.store.store import Store
from imagestore.store.trust import open_signed
from imagestore.verify import verify_store
from tests import invariants

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "0.1"

DEBIAN = Digest.parse("b3:485549fec0cde3e21de24c197839b41c09ab0ce1557ac48a203145e1ffc7d6bf")
DEBIAN_BEFORE = Digest.parse("b3:3642d2b198c9b9e49e686f453cb0b48c4490d44c8985629a1577d98c767975a2")
ALPINE = Digest.parse("b3:adec699d61b87b82289ce494e9968ba5ebcec57c9deb5a7f3750a834b4cb4df4")
OLD = Digest.parse("b3:860d67cbb1832bd76e0f346db7bebb2f432003a8bf85a08176ffce12eba6b5af")
TRASH = Digest.parse("b3:45a70614ec4d48c5873e5860fbd1b9a444d0b946cfaf06d6edc41057c6c01713")
SHA256 = {
    DEBIAN: "1a96e7a496bed71d2cae5c084ec4b50462f4cb46549b74ddb0ba5b3b3a382d1a",
    DEBIAN_BEFORE: "dd9b4ba04b9bf0feebdd6c3d2a709b4c22e273730b1ae4f20c4a2df5283708ff",
    ALPINE: "8bed222f9cc31141f071f25e9b608e7fb82dbf9fc11f52c865db046e9b22b471",
    OLD: "7e180affa59acfe25f7bf548c697c6f66182b7d70c3aaaf50b337a8e26326980",
}
SIGNER = Digest.parse("b3:a9a8639cde0310fa1fc70c4a630b519ced19516a245a6bec730832dc7f2b4f17")
WHOLE = Digest.parse("b3:ca946cd5ffd4d58bd8d18a6ab0023c49eb169b17cc20aa21970b8cb0844dc5c7")
LAZY = Digest.parse("b3:7b6acb0a7f1ac5f42170bdb85fbf266278f3bd294efd95d746a69a1f50953f2d")


def copied(name: str, to: Path) -> Path:
    """A copy that may be written to."""
    shutil.copytree(FIXTURES / name, to / name)
    return to / name


def sha256_of(store: Store, digest: Digest, directory: Path) -> str:
    pull(store, digest, directory / "out.raw", format_="raw", durable=False)
    return hashlib.sha256((directory / "out.raw").read_bytes()).hexdigest()


# Stores


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(copied("store", tmp_path).as_uri())
    yield opened
    opened.backend.close()


def test_a_store_verifies_byte_for_byte(store: Store) -> None:
    report = verify_store(store, full=True)
    assert (report.problems, report.images, report.packs) == ([], 5, 6)
    assert store.info.id == "14ed91400a142389e0ba3ff00a160d5c"


def test_its_names_resolve_with_their_history_and_tombstone(store: Store) -> None:
    assert store.names.get("debian", "12").digest("x86_64") == DEBIAN
    assert store.names.get("alpine", "3").digest("x86_64") == ALPINE
    assert {(r.name, r.tag, r.revision, r.removed) for r in store.names.list(removed=True)} == {
        ("debian", "12", 2, False),
        ("alpine", "3", 1, False),
        ("old", "1", 2, True),
    }
    assert [change.images["x86_64"] for change in store.names.get("debian", "12").history] == [DEBIAN_BEFORE]
    assert store.names.undelete("old", "1").digest("x86_64") == OLD


@pytest.mark.parametrize("digest", SHA256, ids=lambda digest: digest.hex()[:8])
def test_its_images_are_pulled_as_they_were_pushed(store: Store, digest: Digest, tmp_path: Path) -> None:
    """alpine's layout is one that a repack wrote."""
    assert sha256_of(store, digest, tmp_path) == SHA256[digest]


def test_its_manifests_say_what_was_said_at_the_push(store: Store) -> None:
    alpine = store.manifest(ALPINE)
    assert (dict(alpine.labels), dict(alpine.source)) == (
        {"kernel": "6.1"},
        {"url": "https://up.example/a"},
    )
    assert (store.manifest(DEBIAN).os, alpine.architecture, alpine.size_bytes) == (
        "Debian 12",
        "x86_64",
        2 << 20,
    )


def test_what_its_collector_and_its_guests_left_is_understood(store: Store) -> None:
    assert set(held(store)) == {DEBIAN}
    condemned = "cad13b154851fc46233eeaa4c1cce2dade043a19d04253d90b542d23d6a3093a"
    assert [pack.hex() for pack in Condemned.read(store).packs] == [condemned]
    assert store.manifest(TRASH).size_bytes == 4 << 20


def test_a_boot_trace_in_it_is_read(store: Store) -> None:
    trace = Trace.decode(store.backend.get(TRACES.key(DEBIAN)).data)
    assert (trace.boots, trace.chunks(store.manifest(DEBIAN).ids)) == (1, [3, 4, 0, 1, 7, 8])


# Signed mirrors


def test_a_signed_mirror_opens_with_its_fingerprint_and_shows_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata is valid for a hundred years, so that only signatures and formats are tried here."""
    monkeypatch.setenv("SF_TRUST_DIR", str(tmp_path / "trust"))
    mirror = open_signed(Directory(copied("mirror", tmp_path) / "store"), SIGNER)
    assert mirror.names.doubt() is None
    assert [(r.name, r.tag) for r in mirror.names.list()] == [("debian", "12"), ("debian", "13")]
    digest = mirror.names.get("debian", "13").digest("x86_64")
    assert sha256_of(mirror, digest, tmp_path) == SHA256[DEBIAN_BEFORE]


def test_its_keys_sign_the_next_publication(tmp_path: Path) -> None:
    directory = copied("mirror", tmp_path)
    keys = Keyring(directory / "keys")
    assert keys.fingerprint == SIGNER
    published = Publisher(Store.open(Directory(directory / "store")), keys).publish()
    assert (published.version, published.added) == (3, (("draft", "1", "x86_64"),))


# A server's state


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = copied("server", tmp_path)
    (directory / "sf.db").write_bytes(gzip.decompress((directory / "sf.db.gz").read_bytes()))
    return directory


@pytest.fixture
def db(state: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(state / "sf.db")
    yield opened
    opened.close()


def test_sf_db_has_its_instances_in_their_states(db: SqliteStore) -> None:
    found = {i.name: i for i in Transaction(db).list(Instance)}
    assert {name: (i.state, i.node, i.namespace) for name, i in found.items()} == {
        "web": (InstanceState.CREATED, "node1", "system"),
        "broken": (InstanceState.ERROR, "node1", "system"),
        "away": (InstanceState.DELETED, "node1", "system"),
        "till": (InstanceState.INITIAL, "node2", "shop"),
    }
    web = found["web"]
    assert [(d.device, d.image, d.size_bytes) for d in web.disks] == [
        ("vda", str(DEBIAN), 2 << 20),
        ("vdb", "", 1 << 30),
    ]
    assert (web.cpus, web.memory_mib, web.power, web.metadata) == (1, 256, Power.OFF, {"tier": "front"})
    assert (web.ssh_key, web.user_data) == ("ssh-ed25519 AAAA nobody", b"#cloud-config\n")
    assert web.accel == "tcg (no kvm)"
    assert found["broken"].error_message == "qemu would not start"


def test_sf_db_has_its_networks_interfaces_and_addresses(db: SqliteStore) -> None:
    txn = Transaction(db)
    networks = {n.name: n for n in txn.list(Network)}
    lan, gone = networks["lan"], networks["gone"]
    assert (lan.netblock, lan.vni, lan.state, lan.router_node) == (
        "10.42.0.0/24",
        789738,
        "created",
        "node1",
    )
    assert (lan.router_floating, lan.dns_entries, lan.metadata) == (
        "192.0.2.2",
        {"db": "10.42.0.9"},
        {"purpose": "tests"},
    )
    assert (gone.state, gone.provide_nat) == ("deleted", False)
    assert {(i.address, i.floating) for i in txn.list(Interface)} == {
        ("10.42.0.17", "192.0.2.3"),
        ("10.42.0.2", ""),
    }
    web = next(i for i in txn.list(Interface) if i.floating)
    assert (web.mac, web.network_uuid) == ("02:00:00:00:00:17", lan.uuid)
    floating = txn.get(Ipam, "floating").pool
    assert floating.netblock == IPv4Network("192.0.2.0/28")
    assert floating.held[IPv4Address("192.0.2.3")] == web.uuid
    assert set(txn.get(Ipam, lan.uuid).pool.quarantined) == {IPv4Address("10.42.0.3")}


def test_sf_db_has_its_nodes_claims_unique_things_events_and_artifacts(db: SqliteStore) -> None:
    txn = Transaction(db)
    nodes = {n.name: (n.drained, bool(n.identity), n.facts["cpus"]) for n in txn.list(Node)}
    assert nodes == {"node1": (False, False, 4), "node2": (True, True, 8)}
    assert {c.name: (c.cpus, c.memory_mib) for c in txn.list(Claims)} == {
        "node1": (2, 512),
        "node2": (1, 256),
    }
    lan = next(n for n in txn.list(Network) if n.name == "lan")
    taken = {t.name: t.owner for t in txn.list(Taken)}
    assert taken["network/system/lan"] == taken["vni/789738"] == lan.uuid
    assert {"instance/system/web", "instance/shop/till", "jwt-secret", "site-secret"} <= taken.keys()
    assert "instance/system/away" not in taken
    assert [a.metadata for a in txn.list(Artifact)] == [{"approved": True}]
    assert len(txn.list(Event)) == 34
    assert [e.message for e in txn.list(Event, "node/node2/")][:1] == ["the node joined"]


def test_sf_db_lets_in_who_had_a_key(db: SqliteStore, state: Path) -> None:
    shop = Transaction(db).get(Namespace, "shop")
    assert (sorted(shop.keys), shop.trust) == (["ci", "laptop"], ("system",))
    assert shop.metadata == {"owner": {"mail": "shop@example.org"}}
    authority = Authority(db)
    assert authority.login("shop", "not-a-secret")["access_token"]
    assert authority.login("system", (state / "auth/local-key").read_text().strip())["access_token"]


KINDS = (
    Artifact,
    Event,
    Interface,
    Ipam,
    Network,
    Node,
    Taken,
)  # namespaces have cheap hashes now, instances cards


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_record_that_has_not_changed_its_form_is_written_back_word_for_word(
    db: SqliteStore, kind: type[Stored]
) -> None:
    """Fields that came later stand beside the old ones."""
    records = db.list(f"{kind.KIND}/")
    assert records
    for record in records:
        old, now = json.loads(record.value), json.loads(kind.decode(record.value, record.revision).encode())
        assert _old(old, now) == old


def _old(old: Any, now: Any) -> Any:
    """Without the fields that came later."""
    return {name: _old(old[name], now[name]) for name in old} if isinstance(old, dict) else now


def test_guests_of_0_1_are_shown_with_what_they_have_and_keep_it(db: SqliteStore) -> None:
    """What was asked for stood there; what there was is a virtio card with a graphical console, and none without."""
    guests = Transaction(db).list(Instance)
    assert guests
    for guest in guests:
        made = spec(guest, (), "0badcafe")
        assert guest.video == {
            "model": "virtio" if made.vdi else "none",
            "memory": 0,
            "vdi": made.vdi or None,
        }
        assert (made.agent, made.config_drive, made.video_kib) == (True, True, 0)
        assert Instance.decode(guest.encode(), guest.revision) == guest


def test_a_secret_that_was_the_owner_of_a_unique_thing_stays_the_same_secret(db: SqliteStore) -> None:
    """Tokens given out by 0.1 still hold, and nodes go on knowing each other."""
    before = {t.name: t.owner for t in Transaction(db).list(Taken) if t.name.endswith("-secret")}
    assert set(before) == {"jwt-secret", "site-secret"}
    for name, value in before.items():
        assert transact(db, lambda txn, name=name: secret(txn, name)) == value  # type: ignore[misc]
    assert [t.name for t in Transaction(db).list(Taken) if t.name.endswith("-secret")] == []
    assert {s.name: s.value for s in Transaction(db).list(Secret)} == before
    assert transact(db, lambda txn: secret(txn, "site-secret", renew=True)) != before["site-secret"]
    assert "value" not in repr(Transaction(db).list(Secret)[0])


def test_what_instances_hold_of_a_node_is_given_back_to_sums_that_named_every_instance(
    db: SqliteStore,
) -> None:
    web = next(i for i in Transaction(db).list(Instance) if i.name == "web")
    transact(db, lambda txn: finish_delete(txn, txn.get(Instance, web.uuid)))
    assert Transaction(db).get(Claims, "node1") == Claims(name="node1", cpus=1, memory_mib=256)
    invariants.check(db)


def test_a_node_that_was_alive_under_0_1_renews_with_a_lease_that_others_can_read(db: SqliteStore) -> None:
    nodes = Liveness(db, "node1")
    assert nodes.alive("node2")
    nodes.renew("node2")
    number = db.get("alive/node2")
    nodes.renew("node2")
    assert number == db.get("alive/node2") and number is not None and number.value.isdigit()


def test_sf_db_is_written_on(db: SqliteStore) -> None:
    before = db.revision()
    transact(db, lambda txn: txn.create(Claims(name="node3")))
    assert db.revision() == before + 1


def test_a_joined_node_is_known_by_its_agent_json(db: SqliteStore, state: Path) -> None:
    identity = remote.load(state)
    assert identity is not None
    assert (identity.node, identity.installation) == ("node2", "0123abcd")
    check_identity(Transaction(db), identity.node, identity.secret)
    cert, _, _ = certificate(state / "auth")
    assert cert.read_text() == identity.certificate
    assert installation_id(state) == "d8388b7a"


# A node's state


@pytest.mark.parametrize(
    ("name", "served", "moved"),
    [("complete", (), ()), ("lazy", ("vda",), ()), ("moved", (), ("vda",))],
)
def test_a_guests_record_is_taken_up_and_written_as_it_was(
    name: str, served: tuple[str, ...], moved: tuple[str, ...], tmp_path: Path
) -> None:
    written = (FIXTURES / "node/instances" / f"{name}.json").read_text()
    (tmp_path / "record.json").write_text(written)
    journal = Journal(tmp_path, asyncio.to_thread)
    course = journal.part(Course(InstanceSpec("", "", "", 1, 16, ())))
    taps, disks = journal.part(TapsHeld()), journal.part(DisksHeld())
    journal.load()
    record, held = course.now, disks.now
    assert (record.spec.name, record.phase, record.created) == (name, Phase.UP, True)
    assert (held.served, held.moved, held.moving, taps.now.taps) == (served, moved, "", ())
    assert (record.spec.memory_mib, record.spec.power) == (32, Power.ON)
    assert len(record.vdi_password) == 8
    if name == "lazy":
        assert record.spec.disks[0].image == str(LAZY)
        assert held.arrived["vda"]["present_bytes"] == 659456
    asyncio.run(disks.save())
    before, now = json.loads(written), json.loads((tmp_path / "record.json").read_text())
    now["spec"] = {name: now["spec"][name] for name in before["spec"]}  # what is new there has its default
    pairs = zip(now["spec"]["disks"], before["spec"]["disks"], strict=True)
    now["spec"]["disks"] = [{name: disk[name] for name in old} for disk, old in pairs]
    assert {name: now[name] for name in before} == before


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURES / "node/cache.tar.gz") as packed:
        packed.extractall(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_node_cache_lists_its_images_and_the_complete_one_verifies(cache: Path) -> None:
    rows = {row["digest"]: (row["complete"], row["size_bytes"]) for row in list_images(cache)}
    assert rows == {str(WHOLE): (True, 1 << 20), str(LAZY): (False, 3 << 20)}
    images = ImageCache(cache, {})
    assert images.digests() == [WHOLE]
    images.verify(WHOLE)


@pytest.mark.parametrize("rebooted", [False, True], ids=["same-boot", "after-a-reboot"])
def test_a_partial_image_is_opened_with_the_chunks_that_it_had(
    cache: Path, rebooted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.decode((cache / f"{LAZY.hex()}.manifest").read_bytes())
    have = cache / f"{LAZY.hex()}.have"
    (cache / "boot_id").write_text("another" if rebooted else have.read_bytes()[10:46].decode())
    monkeypatch.setattr("imagestore.cache.partial.BOOT_ID", cache / "boot_id")
    partial = PartialImage(cache / f"{LAZY.hex()}.part", LAZY, manifest)
    try:
        assert bytes(partial.present) == b"\1" * 19 + b"\0" * 37
        assert (partial.present_bytes, partial.complete) == (659456, False)
    finally:
        partial.close()


def test_a_nodes_own_boot_trace_is_read(cache: Path) -> None:
    manifest = Manifest.decode((cache / f"{LAZY.hex()}.manifest").read_bytes())
    assert Trace.decode((cache / "traces" / LAZY.hex()).read_bytes()).chunks(manifest.ids) == [0]


# Settings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both files, of which the user's is the one that SF_CONFIG names."""
    for name in [name for name in os.environ if name.startswith(("SF_", "SHAKENFIST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return copied("settings", tmp_path)


def test_the_servers_file_is_read_by_the_server(files: Path) -> None:
    assert config.load(Settings(environment={"SF_CONFIG": str(files / "etc-config.toml")})) == config.Config(
        state_dir=Path("/srv/sf"),
        stores=(
            ("local", "s3://images/sf?endpoint_url=https://s3.example&region=home"),
            ("office", "https://images.example/"),
            ("lab", f"https://lab.example/#{SIGNER}"),
        ),
        host="::1",
        port=13100,
        node_name="node1",
        libvirt_uri="qemu:///session",
        mesh_address=IPv4Address("192.0.2.1"),
        agent_listen="192.0.2.1:13001",
        floating_pool=IPv4Network("198.51.100.0/28"),
        uplink="eth1",
        resolvers=(IPv4Address("192.0.2.53"), IPv4Address("192.0.2.54")),
        excluded=(IPv4Network("10.0.0.0/16"), IPv4Network("172.16.0.0/12")),
        fill="idle",
        read_timeout_s=30.5,
        images=Options(fill_bytes_s=20 << 20, cache_bytes=50 << 30),
        peer_port=13102,
        cpu_ratio=4.5,
        memory_reserve_mib=1024,
        architecture="aarch64",
        instance_dir=Path("/srv/sf/instances"),
    )


def test_the_servers_file_is_read_by_the_command_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_CONFIG", str(files / "etc-config.toml"))
    settings = Settings()
    assert settings.store_url == "s3://images/sf?endpoint_url=https://s3.example&region=home"
    assert settings.state_dir == Path("/srv/sf")
    assert (settings.cache_dir, settings.get("accel")) == (Path("/var/cache/sf"), "tcg")
    assert list(settings.remotes) == ["office", "lab"]
    assert access(settings) == ("http://[::1]:13100", "system", "")


def test_the_users_file_is_read_by_both(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_CONFIG", str(files / "user-config.toml"))
    settings = Settings()
    assert access(settings) == ("https://sf.example:13000", "shop", "not-a-secret")
    urls = {"official": "https://images.example/", "signed": f"https://signed.example/#{SIGNER}"}
    assert settings.remotes == urls
    assert dict(config.load(settings).stores[1:]) == urls
