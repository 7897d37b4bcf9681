"""Guests of images that are not here yet: URLs, and names that only a source list knows. Upstreams are stand-ins."""

import hashlib
import http.server
import lzma
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.holding import Holds
from compute.cluster.images import bringing
from compute.config import Config
from compute.errors import NoSpace
from imagestore import ImageCache
from imagestore.backends.directory import Directory
from imagestore.store.store import Store
from tests import invariants, web
from tests.api_server import INSTALLATION, Running, running
from tests.system.test_tenants import tenant

DATA = bytes(510) + b"\x55\xaa" + b"x" * (1 << 20)
OTHER = DATA[:-1] + b"y"


@contextmanager
def serving(tmp_path: Path, **settings: Any) -> Iterator[Running]:
    place = tmp_path / "server/store"
    store = Store.open(Directory(place)) if place.exists() else Store.init(Directory(place))
    images = ImageCache(tmp_path / "server/cache", {"local": store})
    config = Config(state_dir=tmp_path / "server", node_name="node1", **settings)
    with running(tmp_path / "server", resolver=images, config=config) as found:
        yield found
        invariants.check(found.services.store)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "upstream"
    root.mkdir()
    with web.nginx(root, tmp_path / "nginx") as url:
        yield root, url


def asked(tmp_path: Path) -> list[str]:
    return [
        line.split(" bytes")[0].rstrip(" -")
        for line in (tmp_path / "nginx/access.log").read_text().splitlines()
    ]


def guest(server: Running, base: str, name: str = "web", **more: Any) -> Any:
    disk = {"base": base, "size": more.pop("size", None)}
    answer = server.instance(name, disk=[disk], **more)
    assert answer.status == 200, answer.body
    return answer.body


def artifact(server: Running, url: str, namespace: str = "system") -> Any:
    found = [a for a in server.get("/artifacts", namespace=namespace) if a["source_url"] == url]
    assert len(found) == 1, found
    return found[0]


def test_a_guest_of_a_url_waits_for_it_and_the_next_one_asks_only_whether_it_changed(
    tmp_path: Path, upstream: tuple[Path, str]
) -> None:
    root, url = upstream
    (root / "x.img.xz").write_bytes(lzma.compress(DATA))
    url += "/x.img.xz"
    with serving(tmp_path) as server:
        made = guest(server, url)
        assert made["state"] == "initial" and made["disks"][0]["digest"] is None
        first = server.wait_for("/instances/web", "created")
        assert first["disks"][0]["base"] == url and first["disks"][0]["size_bytes"] == len(DATA)
        kept = artifact(server, url)
        assert (kept["state"], kept["index"], list(kept["blobs"])) == ("created", 1, ["1"])
        blob = kept["blobs"]["1"]
        assert blob["digest"] == first["disks"][0]["digest"] and blob["instances"] == [made["uuid"]]
        guest(server, url, "again")
        assert server.wait_for("/instances/again", "created")["disks"] == first["disks"]
        assert artifact(server, url)["index"] == 1 and asked(tmp_path)[-1].startswith("GET /x.img.xz 304")
        (root / "x.img.xz").write_bytes(lzma.compress(OTHER))
        os.utime(root / "x.img.xz", (1, 1))  # its length is the same, and a web server looks at seconds
        guest(server, url, "newer")
        newer = server.wait_for("/instances/newer", "created")["disks"][0]["digest"]
        assert newer != blob["digest"] and artifact(server, url)["index"] == 2
        # Both versions stay, whatever becomes of names: the collector finds them.
        own = server.services.namespaces.of("system")
        Holds(server.services.store, INSTALLATION).reconcile({"my/system": own})
        held = {stat.key for stat in own.backend.list(f"refs/{INSTALLATION}-")}
        assert {f"refs/{INSTALLATION}-{b['uuid']}" for b in artifact(server, url)["blobs"].values()} <= held
        path = f"/artifacts/{kept['uuid']}"
        assert [v["index"] for v in server.get(f"{path}/versions")] == [1, 2]
        assert server.call("DELETE", f"{path}/versions/3").status == 404
        assert server.call("POST", f"{path}/versions", {"max_versions": 0}).status == 400
        left = server.call("POST", f"{path}/versions", {"max_versions": 1}).body
        assert (left["max_versions"], left["index"], list(left["blobs"])) == (1, 2, ["2"])
        gone = server.call("DELETE", f"{path}/versions/2").body
        assert (gone["index"], gone["blob_uuid"], gone["blobs"]) == (0, None, {})
        tenant(server, "shop")
        assert server.get("/artifacts", namespace="shop") == []
        assert server.call("POST", f"{path}/share", namespace="shop").status == 403
        assert server.call("POST", f"{path}/share").body["shared"]
        assert [a["uuid"] for a in server.get("/artifacts", namespace="shop")] == [kept["uuid"]]
        for verb, where in (
            ("POST", "/share"),
            ("POST", "/unshare"),
            ("DELETE", ""),
            ("DELETE", "/versions/1"),
        ):
            assert server.call(verb, path + where, namespace="shop").status == 403
        assert not server.call("POST", f"{path}/unshare").body["shared"]
        assert server.get(path, namespace="shop")["status"] == 404
        assert server.call("DELETE", path).body["state"] == "deleted"
        assert server.get("/artifacts") == [] and list(own.names.list()) == []
        Holds(server.services.store, INSTALLATION).reconcile({"my/system": own})
        held = {stat.key for stat in own.backend.list(f"refs/{INSTALLATION}-")}
        assert held == {f"refs/{INSTALLATION}-{i['uuid']}" for i in server.get("/instances")}
    assert not list((tmp_path / "server/downloads").iterdir())


def test_what_cannot_be_had_is_said_and_the_guest_can_be_deleted(
    tmp_path: Path, upstream: tuple[Path, str]
) -> None:
    root, url = upstream
    (root / "text").write_text("hello\n" * 1000)
    (root / "disk").write_bytes(DATA)
    (root / "disk.sha256").write_text("0" * 64)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", root / "large", "2G"], check=True)
    with serving(tmp_path) as server:
        for file_name, said, size in (
            ("nothing", "404", 0),
            ("text", "no disk image", 0),
            ("disk", "sha256 is not the published one", 0),
            ("large", "smaller than its image", 1),
        ):
            uuid = guest(server, f"{url}/{file_name}", size=size or None)["uuid"]
            failed = server.wait_for(f"/instances/{uuid}", "error", 60)
            assert said in failed["error_message"], failed
            if not size:
                assert said in artifact(server, f"{url}/{file_name}")["error_message"]
            assert server.call("DELETE", f"/instances/{uuid}").status == 200
            server.wait_for(f"/instances/{uuid}", "deleted")
        assert server.get("/artifacts/nothing").get("status") == 404
        for wrong in ("https://", "http:///x", "https://h/" + "x" * 3000, "ftp://h/x", "file:///etc/passwd"):
            assert server.instance("web", disk=[{"base": wrong}]).status == 400
            assert server.call("POST", "/artifacts", {"url": wrong}).status in (400, 404)


def test_a_tenants_url_never_leads_to_a_private_address(tmp_path: Path, upstream: tuple[Path, str]) -> None:
    root, url = upstream
    (root / "x").write_bytes(DATA)
    with serving(tmp_path) as server:
        tenant(server, "shop")
        uuid = guest(server, f"{url}/x", as_namespace="shop")["uuid"]
        failed = server.wait_for(f"/instances/{uuid}", "error")
        assert "no public address" in failed["error_message"]
        body = {"namespace": "shop", "url": f"{url}/x"}
        assert server.call("POST", "/artifacts", body).status == 200  # by the administrator, and yet theirs
        deadline = time.monotonic() + 20
        while (found := artifact(server, f"{url}/x"))["state"] != "error" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "no public address" in found["error_message"] and asked(tmp_path) == []
        trust = {"external_namespace": "shop"}
        assert server.call("POST", "/auth/namespaces/system/trust", trust).status == 200
        body = {"namespace": "system", "url": f"{url}/x"}
        assert server.call("POST", "/artifacts", body, namespace="shop").status == 403
        refused = server.instance("b", disk=[{"base": f"{url}/x"}], namespace="system", as_namespace="shop")
        assert refused.status == 403 and asked(tmp_path) == []
        assert (
            server.call("POST", "/artifacts", {"url": f"{url}/x", "shared": True}, namespace="shop").status
            == 403
        )


def test_what_a_url_brings_counts_for_the_quotas(tmp_path: Path, upstream: tuple[Path, str]) -> None:
    root, url = upstream
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", root / "two", "2G"], check=True)
    (root / "x").write_bytes(DATA)
    with serving(tmp_path) as server:
        for limits, file in (({"disk_gb": 1}, "two"), ({"disk_gb": 9, "stored_gb": 0}, "x")):
            assert server.call("PUT", "/auth/namespaces/system/quota", limits).status == 200
            uuid = guest(server, f"{url}/{file}")["uuid"]
            said = server.wait_for(f"/instances/{uuid}", "error")["error_message"]
            assert f"{list(limits)[-1]} " in said and "at most" in said, said
            assert artifact(server, f"{url}/{file}")["state"] == "error"
            server.call("DELETE", f"/instances/{uuid}")
            server.wait_for(f"/instances/{uuid}", "deleted")
        server.call("PUT", "/auth/namespaces/system/quota", {"stored_gb": 9, "disk_gb": 9})
        guest(server, f"{url}/x")
        server.wait_for("/instances/web", "created")


def test_many_guests_of_one_url_at_once_cost_one_download(tmp_path: Path, upstream: tuple[Path, str]) -> None:
    root, url = upstream
    (root / "x").write_bytes(DATA)
    with serving(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        guest(server, f"{url}/x", "web")
        made = list(pool.map(lambda n: guest(server, f"{url}/x", f"web{n}", memory=16)["uuid"], range(20)))
        for uuid in made:
            server.wait_for(f"/instances/{uuid}", "created")
    fetched = [line for line in asked(tmp_path) if line.startswith("GET /x 200")]
    assert len(fetched) == 1


def test_a_namespace_has_three_on_their_way_and_keeps_no_other_waiting(tmp_path: Path) -> None:
    stop = threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:5000])
        stop.wait(30)
        handler.wfile.write(DATA[5000:])

    answers = {f"/{n}": slow for n in range(4)} | {"/quick": web.body(DATA)}
    with web.misbehaving(answers) as url, serving(tmp_path) as server:
        for n in range(3):
            guest(server, f"{url}/{n}", f"web{n}")
        refused = server.instance("web3", disk=[{"base": f"{url}/3"}])
        assert refused.status == 507 and "3 at a time" in refused.body["hint"]
        assert len(server.get("/instances")) == 3
        guest(server, f"{url}/0", "same")  # waits for the same
        server.call("DELETE", "/instances/web1")
        stop.set()
        for name in ("web0", "web2", "same"):
            server.wait_for(f"/instances/{name}", "created")
        guest(server, f"{url}/quick", "quick")
        server.wait_for("/instances/quick", "created")


def test_downloads_that_hang_hold_a_few_threads_of_one_namespace_though_they_are_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "_MOST", 6)
    monkeypatch.setattr(bringing, "_OF_ONE", 5)
    monkeypatch.setattr("imagestore.backends.web.is_public", lambda address: True)
    stop, hanging = threading.Event(), list[str]()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        hanging.append(handler.path)
        stop.wait(30)

    answers = {f"/{n}": hang for n in range(8)} | {"/quick": web.body(DATA)}
    with web.misbehaving(answers) as url, serving(tmp_path) as server:
        tenant(server, "shop")
        for n in range(8):
            made = server.call("POST", "/artifacts", {"url": f"{url}/{n}"}, namespace="shop").body
            until = time.monotonic() + (2 if n < 5 else 0.1)
            while len(hanging) <= n and time.monotonic() < until:
                time.sleep(0.01)
            assert server.call("DELETE", f"/artifacts/{made['uuid']}", namespace="shop").status == 200
        guest(server, f"{url}/quick", "quick")
        server.wait_for("/instances/quick", "created")
        assert len(hanging) == 5
        stop.set()


def test_a_server_that_starts_again_goes_on_with_what_was_asked_for(
    tmp_path: Path, upstream: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = upstream
    (root / "x").write_bytes(DATA)
    with monkeypatch.context() as patched, serving(tmp_path) as server:
        patched.setattr(bringing.Bringing, "_run", lambda self, one: None)  # it ends before it began
        guest(server, f"{url}/x")
        assert artifact(server, f"{url}/x")["state"] == "initial"
    with serving(tmp_path) as server:
        server.wait_for("/instances/web", "created")
        assert artifact(server, f"{url}/x")["state"] == "created"


def listing(root: Path, url: str, twelve: bytes = DATA, form: str = "raw") -> Path:
    """A source list of Debian 12 and 13, in the directory that `url` serves."""
    entries = []
    for release, word, data in (("13", "trixie", OTHER), ("12", "bookworm", twelve)):
        (root / word / "20261101-1").mkdir(parents=True)
        (root / word / "20261101-1/disk.raw").write_bytes(data)
        digest = hashlib.sha512(data).hexdigest()
        (root / word / "20261101-1/SHA512SUMS").write_text(f"{digest}  disk.raw\n")
        entries.append(
            f'[[source]]\nname = "debian"\ntags = ["{release}", "{word}"]\nformat = "{form}"\n'
            f'url = "{url}/{word}/{{build}}/disk.raw"\nchecksums = "{url}/{word}/{{build}}/SHA512SUMS"\n'
            f"build = {{ page = \"{url}/{word}/\", pattern = '(\\d{{8}}-\\d+)/' }}\n"
        )
    (root / "list.toml").write_text("\n".join(entries))
    return root / "list.toml"


def test_a_name_that_only_a_source_list_knows_is_fetched_where_the_administrator_says_so(
    tmp_path: Path, upstream: tuple[Path, str]
) -> None:
    lists = str(listing(*upstream))
    with serving(tmp_path, sources=lists) as server:
        tenant(server, "shop")
        for namespace, hint in (
            ("system", "--sync fetches it from 127.0.0.1"),
            ("shop", "the administrator can"),
        ):
            answer = server.instance("web", disk=[{"base": "debian:12"}], as_namespace=namespace)
            assert answer.status == 404 and answer.body["hint"].startswith(hint)
        assert (
            server.instance("web", disk=[{"base": "debian:12"}], sync=True, as_namespace="shop").status == 404
        )
        assert server.instance("web", disk=[{"base": "debian:11"}], sync=True).status == 404
        assert server.instance("web", disk=[{"base": "other/debian:12"}], sync=True).status == 404
        assert asked(tmp_path) == []
        assert guest(server, "debian:12", sync=True)["state"] == "initial"
        made = server.wait_for("/instances/web", "created")["disks"][0]
        assert made["size_bytes"] == len(DATA) and artifact(server, "debian:12")["store"]
        assert artifact(server, "debian:bookworm")["blobs"] != {}
        # By now it is a name like any other, for everybody; `debian` is the newest that the list knows.
        assert (
            guest(server, "debian:12", "theirs", as_namespace="shop")["disks"][0]["digest"] == made["digest"]
        )
        guest(server, "debian", "newest", sync=True)
        newest = server.wait_for("/instances/newest", "created")["disks"][0]["digest"]
        tags = {a["name"]: a["blobs"]["1"]["digest"] for a in server.get("/artifacts")}
        assert tags["debian:latest"] == tags["debian:13"] == newest != tags["debian:12"]
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other", sources=lists, sync_names=True) as server:
        tenant(server, "shop")
        guest(server, "debian:13", as_namespace="shop")
        deadline = time.monotonic() + 20
        while server.get("/instances/web", namespace="shop")["state"] != "created":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_end_that_cannot_be_written_down_is_told_later_and_nothing_is_fetched_again(
    tmp_path: Path, upstream: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = upstream
    (root / "x").write_bytes(DATA)
    pieces, full = bringing.pieces, [NoSpace("the disk is full")] * 3

    def later(*args: Any) -> None:
        if full:
            raise full.pop()
        pieces(*args)

    monkeypatch.setattr(bringing, "pieces", later)
    monkeypatch.setattr(bringing, "_LOOK_S", 0.2)
    with serving(tmp_path) as server:
        guest(server, f"{url}/x")
        server.wait_for("/instances/web", "created")
    assert not full and len([line for line in asked(tmp_path) if line.startswith("GET /x 200")]) == 1


def test_a_guest_that_begins_to_wait_at_the_very_end_is_not_forgotten(
    tmp_path: Path, upstream: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = upstream
    (root / "x").write_bytes(DATA)
    end, waiting, late = bringing._end, bringing._waiting, ["late"]
    with serving(tmp_path) as server:

        def listed(*args: Any) -> Any:
            found = waiting(*args)
            if late:
                guest(server, f"{url}/x", late.pop())
            return found

        def ending(*args: Any) -> Any:
            with monkeypatch.context() as inside:
                inside.setattr(bringing, "_waiting", listed)
                return end(*args)

        monkeypatch.setattr(bringing, "_end", ending)
        guest(server, f"{url}/x")
        for name in ("web", "late"):
            server.wait_for(f"/instances/{name}", "created")
