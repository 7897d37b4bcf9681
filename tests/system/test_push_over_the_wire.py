"""A laptop with a key and no bucket pushes to its namespace's own store; what is not its business is refused."""

import asyncio
import os
import random
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from compute.agent import link as remote
from compute.cluster.auth import create_namespace, hash_key
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, transact
from imagestore.cache.images import ImageCache
from imagestore.errors import Conflict, Denied, Invalid, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import PROVENANCE
from imagestore.formats.layout import Layout
from imagestore.formats.sealed import seal
from imagestore.gc import collect
from imagestore.mirror import bring, sources
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.leases import LEASE_S
from imagestore.store.names import NameRecord, name_key
from imagestore.store.open import open_store
from imagestore.store.store import Store
from imagestore.verify import verify_store
from tests import web
from tests.api_server import Running, running
from tests.drills import rounds, seed
from tests.faults.faulty import WAYS, Faulty, Killed
from tests.system.test_api_agents import listening
from tests.system.test_handed_stores import handed, register
from tests.system.test_login import Laptop, _config, _fingerprint, laptop  # noqa: F401
from tests.unit.imagestore.images import identical, make_raw


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    local = open_store((tmp_path / "images").as_uri(), create=True)
    images = ImageCache(tmp_path / "server/cache", {"local": local})
    with running(tmp_path / "server", resolver=images) as found:
        for name in ("shop", "rival", "friend"):
            body = {"namespace": name, "key_name": "k", "key": f"{name}-key"}
            assert found.call("POST", "/auth/namespaces", body).status == 200
            found.tokens[name] = found.login(name, f"{name}-key").body["access_token"]
        yield found


def url(server: Running, me: str = "shop", of: str = "shop", port: int = 0) -> str:
    parts = urllib.parse.urlsplit(server.url)
    return f"sf+http://{me}:{me}-key@127.0.0.1:{port or parts.port}/stores/{of}"


def test_a_laptop_pushes_lists_tags_pulls_and_boots_what_is_its_own(
    tmp_path: Path,
    laptop: Laptop,  # noqa: F811
) -> None:
    state, disk = tmp_path / "state", make_raw(tmp_path / "disk.raw")
    images = ImageCache(state / "cache", {"local": open_store((tmp_path / "images").as_uri(), create=True)})
    with running(state, resolver=images, config=_config(state)) as server:
        transact(server.services.store, lambda txn: create_namespace(txn, "shop", {"k": hash_key("kk")}))
        login = ("login", server.url, "--fingerprint", _fingerprint(state), "--namespace", "shop")
        laptop.sf(*login, "--name", "lab", key="kk")
        said = laptop.sf("image", "push", str(disk), "my/golden:1", "--input-format", "raw")
        assert f"to {server.url}/stores/shop" in said
        laptop.sf("image", "tag", "my/golden:1", "my/golden:new")
        # With a context a bare name means the same place, before any remote.
        laptop.sf("image", "tag", "golden:new", "bare:1")
        assert set(laptop.sf("image", "ls", "--format", "name").split()) == {
            "bare:1",
            "golden:1",
            "golden:new",
        }
        assert "stores/shop" in laptop.sf("image", "show", "bare:1")
        assert "server collects" in laptop.sf("image", "gc", code=2)
        laptop.sf("image", "ls", "--store", str(tmp_path / "nowhere"), code=3)
        laptop.sf("image", "rm", "bare:1")
        names = {"golden:1", "golden:new"}
        for words in (("my",), ("my/",), ("shop",)):
            assert set(laptop.sf("image", "ls", *words, "--format", "name").split()) == names
        assert "stores/shop" in laptop.sf("image", "show", "my/golden:1")
        laptop.sf("image", "pull", "my/golden:new", "-o", str(tmp_path / "out.qcow2"))
        assert identical(disk, "raw", tmp_path / "out.qcow2", "qcow2")
        laptop.sf("image", "rm", "my/golden:new")
        laptop.sf("image", "pull", "my/golden:new", "-o", str(tmp_path / "gone.raw"), code=3)
        laptop.sf("image", "undelete", "my/golden:new")
        laptop.sf("image", "history", "my/golden:new")
        laptop.sf("image", "push", str(disk), "nobodys/golden:1", "--input-format", "raw", code=3)
        store = server.services.namespaces.of("shop")
        assert verify_store(store, full=True).problems == []
        assert store.info.private
        laptop.sf("instance", "create", "web", "--image", "my/golden:1", "--memory", "256")
        made = Transaction(server.services.store).list(Instance)
        assert [(i.namespace, i.disks[0].store) for i in made] == [("shop", "shop")]


def test_a_url_goes_to_a_store_over_the_wire_and_is_known_there_by_its_etag(
    server: Running, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    make_raw(tmp_path / "root/x")
    with web.nginx(tmp_path / "root", tmp_path / "nginx") as upstream:
        store, source = open_store(url(server)), sources.of_url(f"{upstream}/x", "x", "1", "x86_64")
        results = [bring(store, source, "x86_64", tmp_path / "work", trusted=True).result for _ in range(2)]
        assert results == ["new", "unchanged"]
    assert "GET /x 304" in (tmp_path / "nginx/access.log").read_text()
    digest = store.names.get("x", "1").digest("x86_64")
    with pytest.raises(Invalid):
        store.backend.put(PROVENANCE.key(digest), bytes(5 << 20))


def test_no_route_leads_a_tenant_to_what_another_keeps(server: Running, tmp_path: Path) -> None:
    mine = open_store(url(server))
    first = push(mine, make_raw(tmp_path / "a.raw"), "golden", "1", format_="raw")
    keys_of = [stat.key for stat in mine.backend.list("")]
    assert {key.partition("/")[0] for key in keys_of} == {
        *("store.json", "packs", "index", "hooks", "manifests", "layouts", "groups", "names")
    }
    for me in ("rival", "friend"):
        with pytest.raises(NotFound) as missing:
            open_store(url(server, me, "nobody"))
        with pytest.raises(NotFound) as refused:
            open_store(url(server, me, "shop"))
        assert str(refused.value).replace("shop", "nobody") == str(missing.value)
    theirs = open_store(url(server, "rival", "rival"))
    for key in set(keys_of) - {"store.json"}:
        with pytest.raises(NotFound):
            theirs.backend.get(key)
    # The same disk is sent whole: nothing tells that somebody else has it.
    again = push(theirs, tmp_path / "a.raw", "golden", "1", format_="raw")
    assert replace(again, written_bytes=0) == replace(first, written_bytes=0)
    assert again.written_bytes > 0 and again.new_bytes == first.new_bytes
    trust = {"external_namespace": "friend"}
    assert server.call("POST", "/auth/namespaces/shop/trust", trust, namespace="shop").status == 200
    friend = open_store(url(server, "friend", "shop"))
    pull(friend, first.digest, tmp_path / "out.raw", format_="raw", durable=False)
    with pytest.raises(Denied, match="key of its own"):
        friend.names.remove("golden", "1")
    with pytest.raises(Denied):
        open_store(url(server).replace("shop-key", "guess"))
    for store in (mine, theirs, friend):
        store.backend.close()


def test_a_key_is_good_for_what_a_push_puts_and_that_is_checked(server: Running, tmp_path: Path) -> None:
    store = open_store(url(server))
    wire, disk = store.backend, make_raw(tmp_path / "a.raw")
    digest = push(store, disk, "golden", "1", format_="raw").digest
    inner = server.services.namespaces.of("shop").backend
    before = {stat.key: stat.etag for stat in inner.list("")}
    some = {stat.key.partition("/")[0]: stat.key for stat in inner.list("")}
    inner.put("leases/" + "0" * 32, b"x"), inner.put("refs/0123abcd-x", b"x")
    for key in ("refs/0123abcd-x", "leases/" + "0" * 32):
        with pytest.raises(NotFound):
            wire.get(key)
    assert not {stat.key for tree in ("", "refs/", "leases/") for stat in wire.list(tree)} - set(before)
    for key in (
        "store.json",
        "hooks/all",
        "gc/condemned",
        "refs/0123abcd-y",
        "tuf/x/root.json",
        "x/y",
        "probe",
    ):
        with pytest.raises(Invalid):
            wire.put(key, b"{}")
    for key in (*some.values(), "refs/0123abcd-x", "gc/condemned"):
        with pytest.raises(Invalid):
            wire.delete(key)
    pack, layout = wire.get(some["packs"]).data, wire.get(some["layouts"]).data
    flipped = bytearray(pack)
    flipped[7] ^= 1
    other = f"packs/ab/ab{'0' * 62}"
    wrong: list[tuple[str, bytes, type[StoreError]]] = [
        (some["packs"], bytes(flipped), Invalid),
        (some["packs"], pack[:-1], Invalid),
        (other, pack, Invalid),
        (other, b"", Invalid),
        (some["manifests"], b"sf-manifest", Invalid),
        (some["index"], pack, Invalid),
        (some["layouts"], layout[:-1], Invalid),
        (some["names"], b"{}", Invalid),
        ("leases/" + "1" * 32, b"{}", Invalid),
        ("leases/" + "1" * 32, _lease(LEASE_S * 10), Invalid),
        ("leases/" + "1" * 32, b" " * (5 << 20), Invalid),
    ]
    for key, data, kind in wrong:
        with pytest.raises(kind):
            wire.put(key, data)
    known = Layout.decode(layout, digest)
    lost = Layout(digest, (Digest.of(b"nowhere"),), known.frames, known.chunk_frames, known.chunk_offsets)
    with pytest.raises(Invalid, match="not in this store"):
        wire.put(some["layouts"], lost.encode())
    nowhere = NameRecord("new", "1", 1, "n", {"x86_64": Digest.of(b"nowhere")}).encode()
    with pytest.raises(Invalid, match="cannot be read"):
        wire.put("names/new/1", nowhere, if_none_match=True)
    golden = wire.get(name_key("golden", "1"))
    with pytest.raises(Invalid):
        wire.put("names/new/1", golden.data, if_none_match=True)
    with pytest.raises(Invalid, match="compare-and-swap"):
        wire.put(name_key("golden", "1"), golden.data)
    with pytest.raises(Conflict):
        wire.put(name_key("golden", "1"), golden.data, if_match="old")
    inner.delete("leases/" + "0" * 32), inner.delete("refs/0123abcd-x")
    assert {stat.key: stat.etag for stat in inner.list("")} == before
    wire.put("leases/" + "1" * 32, _lease(LEASE_S))
    wire.delete("leases/" + "1" * 32)
    store.backend.close()


def _lease(duration_s: float) -> bytes:
    return seal({"what": "push", "duration_s": duration_s, "packs": [], "images": []})


def test_nonsense_on_the_routes_of_objects_is_refused_and_changes_nothing(
    server: Running, tmp_path: Path
) -> None:
    """Wrong names, orders, half bodies, tokens of others: an answer below 500 or a closed connection, and no trace."""
    store = open_store(url(server))
    push(store, make_raw(tmp_path / "a.raw"), "golden", "1", format_="raw")
    store.backend.close()
    inner = server.services.namespaces.of("shop").backend
    before = {stat.key: stat.etag for stat in inner.list("")}
    rng, port = random.Random(7), urllib.parse.urlsplit(server.url).port
    paths = [
        *before,
        "names/golden/1",
        "",
        "../../sf.db",
        "%2e%2e/x",
        "packs//x",
        "names/golden/1%00",
        "?prefix=",
        "é",
    ]
    paths += ["?prefix=../&after=" + "x" * 2000, "leases/" + "a" * 32, "packs/" + "a" * 3000, "gc/condemned"]
    tokens = [f"Bearer {server.tokens[name]}" for name in ("shop", "shop", "shop", "rival", "friend")] + [
        "",
        "Bearer x",
        "Basic x",
    ]
    statuses: set[int] = set()
    for _ in range(400):
        verb = rng.choice(["GET", "HEAD", "PUT", "PUT", "DELETE", "POST", "PATCH", "OPTIONS", "XYZZY"])
        namespace = rng.choice(["shop", "shop", "rival", "nobody", "shop%2F..", ""])
        path, body = rng.choice(paths), rng.randbytes(rng.choice([0, 1, 100, 70_000]))
        if (verb, namespace, path) == ("DELETE", "shop", "leases/" + "a" * 32):
            continue
        length = rng.choice([len(body), len(body), len(body) + 10, -1, 10**30, "x"])
        headers = [f"Content-Length: {length}", f"Authorization: {rng.choice(tokens)}"]
        headers += rng.sample(
            ['If-Match: "x"', "If-None-Match: *", "Range: bytes=9-1", "Range: bytes=-" + "9" * 30], 1
        )
        head = f"{verb} /stores/{namespace}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        with socket.create_connection(("127.0.0.1", port), 20) as wire, suppress(OSError):
            wire.sendall((head + "\r\n".join(headers) + "\r\n\r\n").encode() + body)
            wire.shutdown(socket.SHUT_WR)
            answer = wire.recv(64)
            statuses |= {int(answer.split(b" ")[1])} if answer else set()
    assert {200, 400, 401, 404} <= statuses and not [s for s in statuses if s >= 500 and s not in (501, 503)]
    assert {stat.key: stat.etag for stat in inner.list("")} == before
    assert not [*(tmp_path / "server").glob("tmp*")]


class Link:
    """The way to a server: counts requests and bytes up, and is cut once after so many."""

    def __init__(self, port: int, cut_at: int = 0) -> None:
        self._to, self.cut_at, self.sent, self.requests = port, cut_at, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._up, args=(client, far), daemon=True).start()
                threading.Thread(target=self._down, args=(far, client), daemon=True).start()

    def _up(self, client: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.sent += len(data)
                self.requests += data.startswith((b"GET ", b"PUT ", b"HEAD ", b"DELETE "))
                if self.cut_at and self.sent > self.cut_at:
                    self.cut_at = 0
                    for end in (client, far):
                        end.shutdown(socket.SHUT_RDWR)
                    return
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)

    def _down(self, far: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


def test_a_push_costs_what_it_costs_a_bucket_and_a_cut_what_was_in_flight(
    server: Running, tmp_path: Path, moto: object
) -> None:
    """Over the wire at most 1.05 of the bytes that an S3 store is sent, and 8 requests for what is there already."""
    size = 48 << 20
    a = make_raw(tmp_path / "a.raw", seed=1, size_bytes=size)
    b = tmp_path / "b.raw"
    b.write_bytes(a.read_bytes())
    change = make_raw(tmp_path / "c.raw", seed=2, size_bytes=size // 4).read_bytes()
    with b.open("r+b") as file:
        file.seek(size // 3)
        file.write(change)
    port = urllib.parse.urlsplit(server.url).port
    assert port is not None
    bucket: str = moto.url("sf")  # type: ignore[attr-defined]
    s3 = int(
        urllib.parse.urlsplit(
            urllib.parse.parse_qs(urllib.parse.urlsplit(bucket).query)["endpoint_url"][0]
        ).port
    )  # type: ignore[arg-type]
    figures: dict[str, tuple[int, int, int]] = {}
    for kind, to in (("s3", s3), ("wire", port)):
        link = Link(to)
        at = bucket.replace(f"%3A{s3}", f"%3A{link.port}") if kind == "s3" else url(server, port=link.port)
        store = open_store(at, create=kind == "s3")
        push(store, a, "golden", "1", format_="raw", cache=tmp_path / kind)
        before = link.sent
        push(store, b, "golden", "2", format_="raw", cache=tmp_path / kind)
        sent, before = link.sent - before, link.requests
        again = push(store, b, "golden", "2", format_="raw", cache=tmp_path / kind)
        assert again.written_bytes == 0 and not again.changed
        figures[kind] = sent, link.requests - before, 0
        store.backend.close(), link.close()
    print("bytes up for B after A, requests for B again:", figures)
    assert figures["wire"][0] <= 1.05 * figures["s3"][0]
    assert figures["wire"][1] <= 8
    # Cut in the middle of a third disk: what was in flight is sent again, nothing else.
    third = make_raw(tmp_path / "third.raw", seed=3, size_bytes=size)
    whole = Link(port)
    store = open_store(url(server, "rival", "rival", whole.port))
    push(store, third, "golden", "1", format_="raw", cache=tmp_path / "whole")
    store.backend.close(), whole.close()
    cut = Link(port, cut_at=whole.sent // 2)
    store = open_store(url(server, "friend", "friend", cut.port))
    push(store, third, "golden", "1", format_="raw", cache=tmp_path / "cut")
    largest = max(stat.size_bytes for stat in store.backend.list("packs/"))
    print("bytes up whole, cut in the middle, largest pack:", whole.sent, cut.sent, largest)
    assert cut.cut_at == 0
    assert cut.sent <= whole.sent + largest + (1 << 16)
    store.backend.close(), cut.close()


def test_a_node_pushes_into_the_stores_of_its_guests_namespaces_and_renames_nothing(
    server: Running, tmp_path: Path
) -> None:
    laptops = open_store(url(server))
    push(laptops, make_raw(tmp_path / "a.raw"), "golden", "1", format_="raw")
    config = replace(server.services.config, agent_listen="127.0.0.1:1")
    object.__setattr__(server.services, "config", config)
    token = server.call("POST", "/nodes/token").body["token"]
    with listening(server) as (host, port):
        identity = asyncio.run(remote.join(tmp_path / "n", f"https://{host}:{port}", token, "node2"))
        register(server)
        made = server.instance(disk=[{"base": "my/golden:1"}], as_namespace="shop", placed_on="node2")
        assert made.status == 200, made.body
        store = open_store(handed(identity, tmp_path)["my/shop"])
        disk = make_raw(tmp_path / "b.raw", seed=2)
        done = push(store, disk, "web-20261128", "1", format_="raw")
        assert laptops.names.get("web-20261128", "1").digest(os.uname().machine) == done.digest
        with pytest.raises(Invalid, match="not by a node"):
            push(store, disk, "golden", "1", format_="raw")
        with pytest.raises(Invalid, match="not by a node"):
            store.names.remove("golden", "1")
        rivals = handed(identity, tmp_path)["my/shop"].replace("shop", "rival")
        with pytest.raises(NotFound):
            open_store(rivals)
        store.backend.close()
    laptops.backend.close()


@pytest.mark.drill
def test_a_push_that_ends_at_any_request_leaves_a_store_that_verifies_and_the_rerun_succeeds(
    server: Running, tmp_path: Path
) -> None:
    """Request after request lost, its answer lost, or the laptop gone: what has a name can be read."""
    raw = make_raw(tmp_path / "a.raw", size_bytes=2 << 20)
    total, number = 1, 0
    cases = [(at, way) for at in range(40) for way in WAYS if way != "torn"]
    for at, way in random.Random(seed()).sample(cases, max(6, rounds(60))):
        name, number = f"n{number}", number + 1
        store = open_store(url(server))
        faulty = Faulty(store.backend, at, way)
        with suppress(StoreError, Killed):
            push(Store(faulty, store.info), raw, name, "1", format_="raw", cache=tmp_path / name)
        total = max(total, faulty.requests)
        own = server.services.namespaces.of("shop")
        assert verify_store(own, full=True).problems == [], (at, way)
        push(store, raw, name, "1", format_="raw", cache=tmp_path / name)
        assert verify_store(own, full=True).problems == [], (at, way)
        assert own.names.get(name, "1")
        store.names.remove(name, "1")
        collect(own, grace_s=-5.0)
        store.backend.close()
    assert total > 10
