"""What a stranger can send to the REST API, and what nobody else notices of it."""

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imagestore.formats.digest import Digest
from imagestore.formats.sealed import seal
from imagestore.store.names import name_key
from imagestore.store.open import open_store
from tests.api_server import KnownImages, Running, running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "state") as found:
        yield found


@pytest.mark.parametrize(
    "value",
    [b"NaN", b"Infinity", b"-1e999", b"1e999", rb'"\ud800"', b"[" * 200 + b"]" * 200, b"9" * 30, b'"\xff"'],
    ids=lambda value: repr(value[:12]),
)
def test_metadata_that_no_answer_could_carry_is_refused_and_lists_go_on(
    server: Running, value: bytes
) -> None:
    """E3."""
    server.network()
    answer = server.call("POST", "/networks/lan/metadata", b'{"key": "a", "value": ' + value + b"}")
    assert answer.status == 400, answer.body
    assert "body" in answer.body["error"]
    assert server.call("PUT", "/networks/lan/metadata/a", b'{"value": ' + value + b"}").status == 400
    assert [network["metadata"] for network in server.get("/networks")] == [{}]


def test_what_was_stored_before_the_edge_was_strict_is_still_shown(server: Running) -> None:
    """E3: 0.1.0 took NaN and wrote it as Python does."""
    uuid = server.network()["uuid"]
    store = server.services.store
    record = store.get(f"network/{uuid}")
    assert record is not None
    plain = json.loads(record.value)
    plain["metadata"] = {"a": float("nan"), "b": [float("inf")], "c": 1}
    store.commit({record.key: json.dumps(plain).encode()}, expect={record.key: record.revision})
    assert server.get("/networks")[0]["metadata"] == {"a": None, "b": [None], "c": 1}
    assert server.call("POST", "/networks/lan/metadata", {"key": "d", "value": 2}).status == 200


@pytest.mark.parametrize("text", ["é", "%%%", "YQ==\u20ac", "YQ"])
def test_user_data_that_is_not_base64_is_refused(server: Running, text: str) -> None:
    """E3."""
    answer = server.instance(user_data=text)
    assert answer.status == 400
    assert "base64" in answer.body["error"]
    assert server.instance(user_data=base64.b64encode(b"#!/bin/sh\n").decode()).status == 200


def test_a_key_of_a_megabyte_is_not_said_back(server: Running) -> None:
    answer = server.call("POST", "/networks", {"x" * 500_000: 1})
    assert answer.status == 400
    assert len(answer.body["error"]) < 200
    for path in ("/", "/instances/", "/networks/lan/dns/"):
        assert len(server.call("GET", path + "x" * 30_000).body["error"]) <= 1000


@pytest.mark.parametrize("length", [-2, 2**40, "²", 1e300])
def test_a_console_is_read_within_bounds(server: Running, length: Any) -> None:
    server.instance()
    assert server.call("GET", "/instances/web/consoledata", {"length": length}).status == 400


def test_one_store_with_a_nonsensical_name_hides_no_other_stores_images(tmp_path: Path) -> None:
    """E4."""
    resolver = KnownImages()
    resolver.stores = {name: open_store(str(tmp_path / name), create=True) for name in ("bad", "good")}
    body = {"name": "a", "tag": "b", "nonce": "", "revision": float("inf"), "images": {}, "removed": False}
    resolver.stores["bad"].backend.put(name_key("a", "b"), seal(body | {"history": []}))
    resolver.stores["good"].names.set("c", "d", "x86_64", Digest.of(b"gone"))
    with running(tmp_path / "state", resolver=resolver) as server:
        assert [(image["name"], image["store"]) for image in server.get("/artifacts")] == [
            ("c:d", resolver.stores["good"].url)
        ]
        assert server.call("GET", "/artifacts/a:b").status == 404


def test_a_name_for_dns_is_judged_at_once_and_the_server_goes_on(server: Running) -> None:
    """E2."""
    server.network()
    for name in ("a" * 42 + "!", "a" * 100_000, "a." * 400):
        answer = server.call("POST", "/networks/lan/dns", {"name": name, "value": "10.42.0.9"})
        assert answer.status == 400, answer.body
        assert server.call("DELETE", "/networks/lan/dns", {"name": name}).status == 400
    assert server.call("POST", "/networks/lan/dns", {"name": "db.x", "value": "10.42.0.9"}).status == 200
    assert server.get("/networks/lan")["dns"] == {"db.x": "10.42.0.9"}


def test_a_network_without_dns_takes_no_names(server: Running) -> None:
    """F: accepted and ignored."""
    server.network(provide_dns=False)
    answer = server.call("POST", "/networks/lan/dns", {"name": "db", "value": "10.42.0.9"})
    assert answer.status == 406
    assert "no DNS" in answer.body["error"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"configdrive": "iso9660"}, "configdrive"),
        ({"configdrive": "none", "user_data": "YQ=="}, "config drive"),
        ({"configdrive": "none", "ssh_key": "ssh-rsa x"}, "config drive"),
        ({"video": {"model": "voodoo"}}, "video.model"),
        ({"video": {"model": "cirrus", "memory": 12345}}, "memory"),
        ({"video": {"model": "cirrus", "memory": 65536}}, "memory"),
        ({"video": {"model": "none", "vdi": "vnc"}}, "none"),
        ({"video": {"vdi": "teletype"}}, "vdi"),
        ({"video": {"heads": 2}}, "unknown key"),
        ({"side_channels": ["sf-agent3"]}, "side channel"),
        ({"side_channels": ["sf-agent2", "org.spice.0"]}, "side channel"),
        ({"disk": [{"base": "debian:12", "bus": "nvme"}]}, "bus"),
    ],
)
def test_what_a_guest_cannot_have_is_refused_and_not_forgotten(
    server: Running, change: dict[str, Any], word: str
) -> None:
    """F8, F9, F10, F12."""
    answer = server.instance(**change)
    assert answer.status == 400, answer.body
    assert word in answer.body["error"]
    assert "nvme" not in answer.body.get("hint", "")
    assert server.get("/instances") == []


def test_what_is_shown_of_a_guest_is_what_its_node_gives_it(server: Running) -> None:
    """F8, F9, F10."""
    agent = "org.qemu.guest_agent.0"
    plain = {"model": "none", "memory": 0, "vdi": None}
    cirrus = {"model": "cirrus", "memory": 16384, "vdi": None}
    for name, asked, video, channels, drive in (
        ("a", {}, plain, [agent], "openstack-disk"),
        ("b", {"video": {"model": "cirrus", "memory": 16384}}, cirrus, [agent], "openstack-disk"),
        ("c", {"video": {"memory": "16384"}, "side_channels": [agent]}, cirrus, [agent], "openstack-disk"),
        (
            "d",
            {"video": {"model": "virtio", "vdi": "vnc"}},
            {**plain, "model": "virtio", "vdi": "vnc"},
            [agent],
            "",
        ),
        ("e", {"configdrive": "none", "side_channels": []}, plain, [], "none"),
    ):
        uuid = server.instance(name, **asked).body["uuid"]
        shown = server.wait_for(f"/instances/{uuid}", "created")
        shown_channels = [*channels, "sf-agent2"] if channels else []  # as Shaken Fist's clients call it
        assert (shown["video"], shown["side_channels"]) == (video, shown_channels), name
        assert shown["configdrive"] == (drive or "openstack-disk")
        assert server.agent.desired
        (spec,) = [spec for spec in server.agent.desired.instances if spec.name == name]
        assert (spec.video or "none", spec.video_kib, spec.vdi or None) == tuple(video.values()), name
        assert (spec.agent, spec.config_drive) == (bool(channels), drive != "none")


def test_an_ide_disk_is_shown_as_what_it_is(server: Running) -> None:
    shown = server.instance(disk=[{"base": "debian:12", "bus": "ide"}]).body
    assert (shown["disks"][0]["bus"], shown["disk_spec"][0]["bus"]) == ("sata", "ide")


def test_artifacts_of_a_node_are_those_that_it_holds_and_no_namespace_has_any_but_system(
    tmp_path: Path,
) -> None:
    """F, of its kind: `node` and `namespace` were taken and ignored."""
    resolver = KnownImages()
    resolver.stores = {"local": open_store(str(tmp_path / "store"), create=True)}
    resolver.stores["local"].names.set("c", "d", "x86_64", Digest.of(b"gone"))
    with running(tmp_path / "state", resolver=resolver) as server:
        assert [image["name"] for image in server.get("/artifacts", {"namespace": "system"})] == ["c:d"]
        assert server.get("/artifacts", {"namespace": "shop"}) == []
        assert server.get("/artifacts", {"node": "node1"}) == []
        assert server.call("GET", "/artifacts", {"node": "mars"}).status == 404


def test_every_change_of_an_object_heeds_if_match(server: Running) -> None:
    server.network()
    server.instance(network="lan")
    stale = {"If-Match": '"1"'}
    for verb, path, body in (
        ("POST", "/instances/web/poweroff", None),
        ("POST", "/networks/lan/dns", {"name": "db", "value": "10.42.0.9"}),
        ("DELETE", "/networks/lan/dns", {"name": "db"}),
        ("DELETE", "/instances/web", None),
    ):
        assert server.call(verb, path, body, headers=stale).status == 412, path


class Away(KnownImages):
    """A resolver whose store does not answer before `back` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.back = threading.Semaphore(0), threading.Event()

    def resolve(self, text: str, architecture: str) -> Any:
        self.asked.release()
        assert self.back.wait(60)
        return super().resolve(text, architecture)


def test_requests_that_wait_for_a_store_hold_up_no_other(tmp_path: Path) -> None:
    """E, of its whole kind: sixty are more than the API has threads."""
    resolver = Away()
    with running(tmp_path / "state", resolver=resolver) as server, ThreadPoolExecutor(60) as pool:
        server.get("/networks")
        made = [pool.submit(server.instance, f"i{n}", memory=16) for n in range(60)]
        for _ in range(16):
            assert resolver.asked.acquire(timeout=60)
        assert server.get("/networks") == []
        assert server.call("POST", "/networks", {"name": "lan", "netblock": "10.42.0.0/24"}).status == 200
        assert server.login("system", server.key).status == 200
        resolver.back.set()
        assert {one.result(60).status for one in made} <= {200, 507}
