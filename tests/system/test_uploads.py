"""Uploads, blobs, labels, and guests made of them."""

import asyncio
import hashlib
import lzma
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, cast

import pytest

from compute.cluster.holding import Holds
from compute.cluster.images import bringing
from compute.cluster.images.bringing import Bringing
from imagestore.errors import Unavailable
from tests import drills
from tests.api_server import INSTALLATION, Running, running
from tests.ending import killed
from tests.system.test_images_on_demand import DATA, guest, serving
from tests.system.test_tenants import tenant

ODD = os.urandom(70_001)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    monkeypatch.setattr(bringing, "_LOOK_S", 0.2)


def ask(server: Running, verb: str, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
    answer = server.call(verb, path, body, **more)
    assert answer.status == status, answer
    return answer.body


def sent(server: Running, data: bytes, piece: int = 1 << 16, **more: Any) -> str:
    uuid: str = ask(server, "POST", "/upload", **more)["uuid"]
    for at in range(0, len(data), piece):
        size = ask(server, "POST", f"/upload/{uuid}", data[at : at + piece], **more)
        assert size == min(at + piece, len(data))
    return uuid


def kept(server: Running, name: str, data: bytes, namespace: str = "system", **more: Any) -> Any:
    uuid = sent(server, data, namespace=namespace)
    made = ask(
        server, "POST", f"/artifacts/upload/{name}", {"upload_uuid": uuid, **more}, namespace=namespace
    )
    assert made["state"] == "creating" and made["blob_uuid"]
    for _ in range(500):
        if (found := server.get(f"/artifacts/{made['uuid']}", namespace=namespace))["state"] != "creating":
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def data_of(server: Running, blob: str, query: str = "", **more: Any) -> bytes:
    answer = server.call("GET", f"/blobs/{blob}/data{query}", headers={"Accept": "*/*"}, **more)
    assert answer.status == 200 and answer.headers["content-type"] == "application/octet-stream"
    return answer.body if isinstance(answer.body, bytes) else b""


def swept(server: Running) -> list[str]:
    services = server.services
    Bringing(services.store, services.namespaces, services.resolver, services.config).sweep()
    state = services.config.state_dir
    return sorted(path.name for path in (*state.glob("uploads/*/*"), *state.glob("downloads/*")))


def test_an_upload_is_a_blob_of_exactly_its_bytes_with_its_sums(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        uuid = ask(server, "POST", "/upload")["uuid"]
        assert ask(server, "POST", f"/upload/{uuid}", ODD[:1000]) == 1000
        assert ask(server, "POST", f"/upload/{uuid}", ODD[:1000]) == 2000
        assert ask(server, "POST", f"/upload/{uuid}/truncate/1000") == 1000
        assert ask(server, "POST", f"/upload/{uuid}", ODD[1000:]) == len(ODD)
        ask(server, "POST", f"/upload/{uuid}/truncate/{len(ODD) + 1}", status=400)
        ask(server, "POST", f"/upload/{uuid}/truncate/-1", status=400)
        made = ask(server, "POST", "/artifacts/upload/odd", {"upload_uuid": uuid})
        server.call("POST", f"/upload/{uuid}", b"too late, and cut off")
        server.wait_for(f"/artifacts/{made['uuid']}", "created")
        ask(server, "POST", f"/upload/{uuid}", b"more", status=404)
        blob = server.get(f"/blobs/{made['blob_uuid']}")
        assert (blob["state"], blob["size"], blob["virtual size"]) == ("created", len(ODD), 0)
        assert blob["sha512"] == hashlib.sha512(ODD).hexdigest() and blob["sha256"]
        assert server.get(f"/blob_checksums/sha512/{blob['sha512'].upper()}")["uuid"] == blob["uuid"]
        assert server.get(f"/blob_checksums/sha512/{'0' * 128}") is None
        assert data_of(server, blob["uuid"]) == ODD
        assert data_of(server, blob["uuid"], "?offset=9&limit=65536") == ODD[9:65545]
        assert data_of(server, blob["uuid"], f"?offset={len(ODD)}") == b""
        ask(server, "GET", f"/blobs/{blob['uuid']}/data?offset=-1", status=400)
        assert [one["uuid"] for one in server.get("/blobs")] == [blob["uuid"]]
        assert "version 1 is blob" in server.get(f"/blobs/{blob['uuid']}/events")[0]["message"]
        assert swept(server) == []
        own = server.services.namespaces.of("system")
        Holds(server.services.store, INSTALLATION).reconcile({"my/system": own})
        assert [s.key for s in own.backend.list("refs/")] == [f"refs/{INSTALLATION}-{blob['uuid']}"]
        # The same bytes again are no second version; others are, and versions have an end.
        again = {"blob_uuid": blob["uuid"]}
        assert ask(server, "POST", "/artifacts/upload/odd", again)["index"] == 1
        for number in (2, 3, 4):
            assert kept(server, "odd", ODD[number:])["index"] == number
        assert list(server.get(f"/artifacts/{made['uuid']}")["blobs"]) == ["2", "3", "4"]
        ask(server, "GET", f"/blobs/{blob['uuid']}", status=404)


def test_a_guest_is_made_of_an_upload_a_blob_or_a_label_and_its_disk_is_made_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        made = kept(server, "packed", lzma.compress(DATA))
        uuid = made["blob_uuid"]
        assert made["blobs"]["1"]["virtual size"] == 0
        label = ask(server, "POST", "/label/golden", {"blob_uuid": uuid})
        assert (label["artifact_type"], label["source_url"]) == ("label", "sf://label/system/golden")
        assert server.get("/label/system/golden") == label
        first = guest(server, f"sf://blob/{uuid}")
        assert (first["state"], first["disks"][0]["digest"]) == ("initial", None)
        disk = server.wait_for("/instances/web", "created")["disks"][0]
        assert disk["size_bytes"] == len(DATA)
        bases = "label:golden", "sf://label/system/golden", "sf://upload/system/packed", f"sf://blob/{uuid}"
        for number, base in enumerate(bases):
            assert guest(server, base, f"web{number}")["disks"][0]["digest"] == disk["digest"]
        blob = server.get(f"/blobs/{uuid}")
        assert (blob["virtual size"], len(blob["instances"])) == (len(DATA), 1 + len(bases))
        assert data_of(server, uuid) == lzma.compress(DATA)
        # What is no disk is said by whoever wanted it, and stays what it is.
        bad = kept(server, "bad", lzma.compress(DATA)[:-9])["blob_uuid"]
        guest(server, f"sf://blob/{bad}", "never")
        assert "cut short" in server.wait_for("/instances/never", "error")["error_message"]
        assert server.get(f"/blobs/{bad}")["state"] == "created" and swept(server) == []
        for base in (
            "sf://blob/x",
            "label:none",
            "sf://label/x/golden",
            "sf://upload/system/golden",
            "sf://x/y",
            "sf://",
        ):
            assert server.instance("none", disk=[{"base": base}]).status == 404, base
        # A label moves, and its former blob is a version until it goes with it.
        other = kept(server, "other", ODD)["blob_uuid"]
        assert ask(server, "POST", "/label/golden", {"blob_uuid": other})["blob_uuid"] == other
        ask(server, "POST", "/label/golden", {"blob_uuid": "x"}, status=404)
        ask(server, "POST", "/label/golden", {"blob": "x"}, status=400)
        assert ask(server, "DELETE", "/label/golden")["state"] == "deleted"
        ask(server, "GET", "/label/golden", status=404)
        assert data_of(server, other) == ODD


def test_another_tenant_finds_nothing_of_an_upload_a_blob_or_a_label(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        for name in ("shop", "rival"):
            tenant(server, name)
        mine = sent(server, ODD, namespace="shop")
        made = kept(server, "mine", ODD, namespace="shop")
        blob, sums = made["blob_uuid"], made["blobs"]["1"]
        ask(server, "POST", "/label/golden", {"blob_uuid": blob}, namespace="shop")
        for verb, path, body in (
            ("POST", f"/upload/{mine}", b"x"),
            ("POST", f"/upload/{mine}/truncate/0", None),
            ("POST", "/upload/%2e%2e", b"x"),
            ("POST", f"/upload/..%2Fshop%2F{mine}", b"x"),
            ("POST", f"/upload/shop%2F{mine}", b"x"),
            ("POST", "/artifacts/upload/x", {"upload_uuid": mine}),
            ("POST", "/artifacts/upload/x", {"upload_uuid": f"../shop/{mine}"}),
            ("POST", "/artifacts/upload/x", {"upload_uuid": "../../sf.db"}),
            ("POST", "/artifacts/upload/x", {"upload_uuid": "../../auth/local-key"}),
            ("POST", "/artifacts/upload/x", {"upload_uuid": "/etc/passwd"}),
            ("POST", "/artifacts/upload/x", {"blob_uuid": blob}),
            ("POST", "/label/x", {"blob_uuid": blob}),
            ("GET", f"/blobs/{blob}", None),
            ("GET", f"/blobs/{blob}/data", None),
            ("GET", f"/blobs/{blob}/events", None),
            ("GET", f"/artifacts/{made['uuid']}", None),
            ("GET", "/label/shop/golden", None),
            ("DELETE", "/label/shop/golden", None),
        ):
            assert server.call(verb, path, body, namespace="rival").status == 404, path
        ask(server, "GET", "/blobs", status=403, namespace="shop")
        ask(server, "POST", "/label/shop/x", {"blob_uuid": blob}, status=403, namespace="rival")
        assert server.get(f"/blob_checksums/sha512/{sums['sha512']}", namespace="rival") is None
        assert server.get("/artifacts", namespace="rival") == []
        for base in (f"sf://blob/{blob}", "sf://label/shop/golden", "sf://upload/shop/mine", "label:golden"):
            assert server.instance("x", disk=[{"base": base}], as_namespace="rival").status == 404
        # The administrator may, and shares; then everybody reads, and nobody else changes.
        shared = {"blob_uuid": blob, "shared": True, "namespace": "shop"}
        ask(server, "POST", "/artifacts/upload/mine", shared, status=403, namespace="shop")
        ask(server, "POST", "/artifacts/upload/mine", shared)
        assert data_of(server, blob, namespace="rival") == ODD
        ask(server, "DELETE", f"/artifacts/{made['uuid']}", status=403, namespace="rival")
        # Nothing is inherited by who takes the name of a namespace that is gone.
        ask(server, "DELETE", "/auth/namespaces/shop")
        swept(server)
        server.tokens.clear()
        tenant(server, "shop")
        assert server.get("/artifacts", namespace="shop") == []


def test_uploads_are_bounded_in_number_bytes_and_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        tenant(server, "shop")
        with ThreadPoolExecutor(8) as pool:
            statuses = Counter(
                pool.map(lambda _: server.call("POST", "/upload", namespace="shop").status, range(50))
            )
        assert statuses == {200: 16, 507: 34}
        begun = [path.name for path in (server.services.config.state_dir / "uploads/shop").iterdir()]
        assert "16 uploads" in ask(server, "POST", "/upload", status=507, namespace="shop")["error"]
        ask(server, "POST", "/upload")
        empty = {"upload_uuid": begun[0]}
        ask(server, "POST", "/artifacts/upload/x", empty, status=400, namespace="shop")
        # Nobody calls an artifact what somebody else's label or upload is called.
        ask(
            server,
            "POST",
            "/artifacts/upload/x",
            {"blob_uuid": "x", "source_url": "sf://label/a/b"},
            status=400,
        )
        for odd in ({}, empty | {"blob_uuid": "x"}, {"upload_uuid": "x", "more": 1}, {"blob_uuid": 1}):
            ask(server, "POST", "/artifacts/upload/x", odd, status=400, namespace="shop")
        for url in (None, "https://example.org/x"):
            ask(
                server, "POST", "/artifacts/upload/a%20b",
                {"upload_uuid": sent(server, b"x"), "source_url": url}, status=400,
            )  # fmt: skip
        ask(server, "PUT", "/auth/namespaces/shop/quota", {"stored_gb": 0})
        said = ask(server, "POST", f"/upload/{begun[0]}", b"x" * 100, status=507, namespace="shop")
        assert "stored_gb" in said["error"]
        place = server.services.config.state_dir / "uploads/shop"
        assert sum(path.stat().st_size for path in place.iterdir()) == 0
        assert swept(server)[:1] and len(list(place.iterdir())) == 16
        for path in place.iterdir():
            os.utime(path, (1, 1))
        swept(server)
        assert not list(place.iterdir())
        for gone in (begun[0], "x" * 36, "x" * 300):  # the last one is longer than a file's name may be
            ask(server, "POST", f"/upload/{gone}", b"x", status=404, namespace="shop")


def test_a_kill_while_it_is_sent_or_stored_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    data, state, random_s = os.urandom(24 << 20), tmp_path / "state", random.Random(drills.seed())
    for number in range(drills.rounds(full=20)):
        argv = [sys.executable, "-m", "tests.api_server", str(state)]
        with killed(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)) as process:
            assert process.stdout
            url, key = process.stdout.readline().split()
            server = Running(url, key, *[cast(Any, None)] * 3)
            uuid = sent(server, data, 8 << 20)
            made = ask(server, "POST", f"/artifacts/upload/x{number}", {"upload_uuid": uuid})
            time.sleep(random_s.uniform(0, 0.3))
            process.kill()
        with running(state) as server:
            found = server.wait_for(f"/artifacts/{made['uuid']}", "created", 60)
            assert data_of(server, found["blob_uuid"]) == data
            assert swept(server) == []


def test_a_store_that_is_away_for_a_while_costs_nobody_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, push = [Unavailable("the bucket is away")], cast(Any, bringing).push

    def sometimes(*args: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return push(*args, **named)

    monkeypatch.setattr(bringing, "push", sometimes)
    with serving(tmp_path) as server:
        assert kept(server, "x", ODD)["state"] == "created" and not errors


def test_an_address_is_routed_to_the_only_guest_or_to_the_one_that_is_named(tmp_path: Path) -> None:
    with serving(tmp_path, floating_pool=IPv4Network("192.0.2.0/28")) as server:
        server.network()
        assert "0 guests" in ask(server, "POST", "/networks/lan/route", status=400)["error"]
        for number in (9, 10):
            link = [{"network_uuid": "lan", "address": f"10.42.0.{number}"}]
            assert server.instance(f"web{number}", link, disk=[{"size": 1}]).status == 200
            if number == 9:
                alone = ask(server, "POST", "/networks/lan/route")
        assert "2 guests" in ask(server, "POST", "/networks/lan/route", status=400)["error"]
        other = ask(server, "POST", "/networks/lan/route", {"next_hop": "10.42.0.10"})
        assert server.get("/networks/lan")["routed"] == {alone: "10.42.0.9", other: "10.42.0.10"}


def test_a_cd_rom_is_said_so_to_the_node_and_is_on_no_bus_that_has_none(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        kept(server, "install", DATA)
        cdrom = {"base": "sf://upload/system/install", "type": "cdrom"}
        for wrong in (cdrom | {"bus": "virtio"}, cdrom | {"type": "floppy"}, {"type": "cdrom"}):
            assert server.instance("web", disk=[{"size": 1}, wrong]).status == 400
        guest(server, "", "none", size=1)
        assert server.instance("web", disk=[{"size": 1}, cdrom]).status == 200
        disks = server.wait_for("/instances/web", "created")["disks"]
        assert [(disk["device"], disk["bus"]) for disk in disks] == [("vda", "virtio"), ("vdb", "sata")]
        assert server.agent.desired
        (spec,) = (one for one in server.agent.desired.instances if one.name == "web")
        assert [disk.cdrom for disk in spec.disks] == [False, True]
        assert server.call("POST", "/instances/web/snapshot").status == 200
        assert server.instance("only", disk=[cdrom]).status == 200
        server.wait_for("/instances/only", "created")
        assert "no disk that changes" in ask(server, "POST", "/instances/only/snapshot", status=409)["error"]


def test_what_was_sent_to_one_server_is_stored_by_that_one_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        services, feed = server.services, server.services.controller.feed
        elsewhere = replace(services.config, state_dir=tmp_path / "other")
        other = Bringing(services.store, services.namespaces, services.resolver, elsewhere)
        keeping = [
            asyncio.run_coroutine_threadsafe(other.keep(feed, sent=sent), server.loop)
            for sent in (False, True)
        ]
        here = Bringing(services.store, services.namespaces, services.resolver, services.config)
        stop = threading.Event()

        def sweep() -> int:
            rounds = 0
            while not stop.is_set():
                with suppress(OSError):  # it is taken over at that moment
                    here.sweep()
                rounds += 1
            return rounds

        with ThreadPoolExecutor(1) as pool:
            sweeping = pool.submit(sweep)
            for number in range(5):
                assert kept(server, f"x{number}", ODD[number:])["state"] == "created"
            stop.set()
            assert sweeping.result()
        for one in keeping:
            assert not one.done() and one.cancel()
