"""The REST interface over real HTTP: ground rules, and a guest's life as a client sees it."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Network
from pathlib import Path
from typing import Any

import pytest

from net.plan import names
from tests.api_server import INSTALLATION, Running, running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "state") as found:
        yield found


def created(server: Running, name: str = "web", **more: Any) -> Any:
    answer = server.instance(name, **more)
    assert answer.status == 200, answer.body
    return server.wait_for(f"/instances/{answer.body['uuid']}", "created")


def test_an_instance_goes_from_created_to_deleted_and_gives_everything_back(server: Running) -> None:
    network = server.network()
    found = created(server, network="lan")
    assert found["interfaces"][0]["ipv4"] == "10.42.0.2"
    assert found["power_state"] == "on"
    assert found["disks"][0]["base"] == "debian:12"
    assert server.call("DELETE", "/networks/lan").status == 409
    assert server.call("DELETE", "/instances/web").body["uuid"] == found["uuid"]
    server.wait_for(f"/instances/{found['uuid']}", "deleted")
    assert server.get("/instances") == []
    assert [row["type"] for row in server.get("/networks/lan/addresses")] == ["gateway", "deletion-halo"]
    assert server.call("DELETE", "/networks/lan").status == 200
    store = server.services.store
    left = {record.key.split("/")[0] for record in store.list("") if not record.key.startswith("event/")}
    assert left == {"namespace", "secret", "epoch", "node", "claims", "instance", "network"}
    assert [r.key for r in store.list("secret/")] == ["secret/jwt-secret", "secret/site-secret"]
    assert b'"cpus":0,"memory_mib":0' in store.list("claims/")[0].value
    assert network["uuid"] == server.get(f"/networks/{network['uuid']}")["uuid"]


def test_a_failure_ends_in_error_with_its_reason(server: Running) -> None:
    server.agent.broken.add("web")
    uuid = server.instance().body["uuid"]
    found = server.wait_for(f"/instances/{uuid}", "error")
    assert found["error_message"] == "qemu would not start"
    messages = [e["message"] for e in server.get(f"/instances/{uuid}/events")]
    assert "state is creating-error: qemu would not start" in messages
    assert server.call("POST", "/instances/web/poweroff").status == 409
    server.call("DELETE", "/instances/web")
    server.wait_for(f"/instances/{uuid}", "deleted")


def test_power_verbs_reach_the_node(server: Running) -> None:
    uuid = created(server)["uuid"]
    server.call("POST", "/instances/web/poweroff")
    for _ in range(500):
        if server.get("/instances/web")["power_state"] == "off":
            break
    assert server.get("/instances/web")["power_state"] == "off"
    assert server.call("POST", "/instances/web/reboothard").status == 409
    for given in (-1, 86401, 1.5, "soon"):
        assert server.call("POST", "/instances/web/poweroff", {"timeout_s": given}).status == 400
    asked = server.call("POST", "/instances/web/poweroff", {"timeout_s": 60})
    said = [event["message"] for event in server.get(f"/instances/{uuid}/events")]
    assert asked.status == 200 and "poweroff asked for, 60 s after the guest was asked to end" in said
    server.call("POST", "/instances/web/poweron")
    assert server.call("POST", "/instances/web/reboothard").status == 200
    assert server.services.controller is not None
    assert server.get(f"/instances/{uuid}")["power"] == "on"


def test_a_verb_on_an_instance_that_is_not_there_yet_is_406(server: Running) -> None:
    server.agent.stalled.add("web")
    server.instance()
    assert server.call("POST", "/instances/web/pause").status == 406


def test_errors_have_the_interfaces_shape_and_a_request_id(server: Running) -> None:
    answer = server.call("GET", "/instances/nothing")
    assert answer.status == 404
    assert answer.body["status"] == 404
    assert "nothing" in answer.body["error"]
    assert answer.body["request_id"] == answer.headers["x-request-id"]
    assert answer.body["hint"]
    assert server.call("GET", "/no/such/path").body["status"] == 404


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"nme": "x"}, 400, "unknown key"),
        ({"name": "not a name"}, 400, "host name"),
        ({"name": "a.b"}, 400, "host name"),
        ({"name": "x" * 64}, 400, "host name"),
        ({"cpus": 0}, 400, "cpus"),
        ({"cpus": "many"}, 400, "cpus"),
        ({"memory": 1}, 400, "memory"),
        ({"memory": 10**6}, 507, "no room"),
        ({"disk": []}, 400, "disks"),
        ({"disk": [{"base": "plan9:4"}]}, 404, "no image"),
        ({"disk": [{"base": "debian:12", "size": 1}]}, 400, "smaller than its image"),
        ({"disk": [{"base": "ftp://blob/x"}]}, 400, "cannot boot"),
        ({"disk": [{"base": "sf://blob/x"}]}, 404, "not found"),
        ({"disk": [{}]}, 400, "neither"),
        ({"disk": [{"base": "debian:12", "bus": "floppy"}]}, 400, "bus"),
        ({"network": [{"network_uuid": "lan", "address": "10.9.9.9"}]}, 400, "not in"),
        ({"network": [{"network_uuid": "lan", "address": "10.42.0.1"}]}, 400, "router"),
        ({"network": [{"network_uuid": "lan", "address": "wrong"}]}, 400, "address"),
        ({"network": [{"network_uuid": "lan", "macaddress": "01:00:5e:00:00:01"}]}, 400, "MAC"),
        ({"network": [{"network_uuid": "lan", "float": True}]}, 507, "floating pool"),
        ({"network": [{"network_uuid": "wan"}]}, 404, "not found"),
        ({"placed_on": "mars"}, 404, "mars"),
        ({"namespace": "elsewhere"}, 404, "elsewhere"),
        ({"user_data": "%%%"}, 400, "base64"),
    ],
)
def test_wrong_input_is_refused_in_words_and_leaves_nothing(
    server: Running, change: dict[str, Any], status: int, word: str
) -> None:
    server.network()
    before = [r.key for r in server.services.store.list("")]
    answer = server.instance(**change)
    assert (answer.status, word in answer.body["error"]) == (status, True), answer.body
    assert [r.key for r in server.services.store.list("")] == before


def test_the_networks_own_macs_are_given_to_nobody(server: Running) -> None:
    """G1: an interface could take the gateway's MAC, and with it what its neighbours send to the router."""
    network = server.services.controller.store  # the record knows the VNI
    uuid = server.network()["uuid"]
    vni = json.loads(next(r.value for r in network.list("network/") if uuid in r.key))["vni"]
    created(server)
    for mac in (
        names.router_mac(INSTALLATION, vni),
        names.bridge_mac(INSTALLATION, vni, server.agent.node).upper(),
    ):
        wanted = {"network_uuid": "lan", "macaddress": mac}
        assert server.instance("thief", network=[wanted]).status == 409
        answer = server.call("POST", "/instances/web/interfaces", {"network": wanted})
        assert answer.status == 409 and "network itself" in answer.body["error"]


def test_names_that_differ_in_case_alone_do_not_meet_on_a_network_with_dns(server: Running) -> None:
    """G3: `Twin` and `twin` shared a DNS name."""
    server.network()
    server.call("POST", "/networks", {"name": "mute", "netblock": "10.43.0.0/24", "provide_dns": False})
    created(server, "Twin", network="lan")
    answer = server.instance("twin", network="lan")
    assert answer.status == 409 and "DNS" in answer.body["error"]
    created(server, "twin", network="mute")
    plug = {"network": {"network_uuid": "lan"}}
    assert server.call("POST", "/instances/twin/interfaces", plug).status == 409
    assert server.call("POST", "/instances/Twin/interfaces", plug).status == 200


def test_a_taken_instance_name_is_a_conflict_until_it_is_deleted(server: Running) -> None:
    uuid = created(server)["uuid"]
    assert server.instance().status == 409
    server.call("DELETE", f"/instances/{uuid}")
    server.wait_for(f"/instances/{uuid}", "deleted")
    assert server.instance().status == 200


@pytest.mark.parametrize(
    "netblock", ["10.0.0.0/30", "10.0.0.1/24", "10.0.0.0/7", "nonsense", "127.0.0.0/24", "fd00::/64"]
)
def test_a_bad_netblock_is_refused(server: Running, netblock: str) -> None:
    assert server.call("POST", "/networks", {"name": "x", "netblock": netblock}).status == 400
    assert server.get("/networks") == []


def test_a_full_network_is_507_and_a_fixed_address_is_given(server: Running) -> None:
    server.network("tiny", "10.1.0.0/29")
    first = server.instance("a0", network=[{"network_uuid": "tiny", "address": "10.1.0.5"}]).body
    assert first["interfaces"][0]["ipv4"] == "10.1.0.5"
    assert server.instance("x", network=[{"network_uuid": "tiny", "address": "10.1.0.5"}]).status == 409
    for number in range(1, 5):
        assert server.instance(f"a{number}", network=[{"network_uuid": "tiny"}]).status == 200
    answer = server.instance("a5", network=[{"network_uuid": "tiny"}])
    assert (answer.status, "no address is free" in answer.body["error"]) == (507, True)


def test_hot_plug_gives_the_instance_one_more_interface_and_takes_it_back(server: Running) -> None:
    server.network()
    uuid = created(server, network="lan")["uuid"]
    plug = {"network": {"network_uuid": "lan", "macaddress": None, "model": "virtio", "float": False}}
    made = server.call("POST", "/instances/web/interfaces", plug).body
    assert (made["order"], made["ipv4"]) == (1, "10.42.0.3")
    assert len(server.get(f"/instances/{uuid}/interfaces")) == 2
    assert server.call("DELETE", f"/interfaces/{made['uuid']}").status == 200
    assert len(server.get(f"/instances/{uuid}/interfaces")) == 1


def test_ports_are_published_once_where_nothing_listens_and_low_ones_by_the_administrator(
    server: Running,
) -> None:
    server.network()
    link = created(server, network="lan")["interfaces"][0]["uuid"]
    second = created(server, "b", network="lan")
    gone, other = second["uuid"], second["interfaces"][0]["uuid"]

    def publish(uuid: str, ports: str, verb: str = "POST", **named: str) -> Any:
        return server.call(verb, f"/interfaces/{uuid}/publish", {"ports": ports}, **named)

    assert publish(link, "8080:80").body["published"] == ["8080:80/tcp"]
    assert publish(link, "8080:80").status == 200
    assert publish(link, "8080-8081:80-81/udp").status == 200
    assert publish(link, "53:53/udp").status == 200
    shown = server.get(f"/interfaces/{link}")["published"]
    assert shown == ["8080:80/tcp", "8080-8081:80-81/udp", "53:53/udp"]
    for wrong in ("8080", "0:80", "80:0", "65535-65536:1-2", "9-8:9-8", "1-3:1-4", "１:80", "8080:80/icmp"):
        assert publish(other, wrong).status == 400, wrong
    assert (publish(other, "8080:80").status, publish(other, "8081:80/udp").status) == (409, 409)
    answer = publish(other, "9999:80")
    assert (answer.status, "a server of the router's node listens" in answer.body["error"]) == (409, True)
    assert publish(other, "4789:4789/udp").status == 409
    assert publish(link, "8080:81", "DELETE").status == 404
    assert publish(link, "8080:80", "DELETE").status == 200
    assert publish(other, "8080:80").status == 200
    server.call("DELETE", "/instances/b")
    server.wait_for(f"/instances/{gone}", "deleted")
    assert publish(link, "8080:80").status == 200
    server.call("POST", "/auth/namespaces", {"namespace": "ci", "key_name": "k", "key": "secret-of-ci"})
    ours = {"namespace": "ci", "key": "secret-of-ci"}
    assert publish(link, "9000:80", **ours).status == 404
    server.call("POST", "/networks", {"name": "own", "netblock": "10.9.0.0/24"}, **ours)
    body = {"name": "c", "cpus": 1, "memory": 64, "disk": [{"size": 1}], "network": [{"network_uuid": "own"}]}
    own = server.call("POST", "/instances", body, **ours).body["interfaces"][0]["uuid"]
    assert [publish(own, ports, **ours).status for ports in ("80:80", "9000:80")] == [403, 200]


def test_metadata_is_kept_under_every_object(server: Running) -> None:
    network = server.network()
    made = created(server, network="lan")
    paths = [
        "/instances/web",
        "/networks/lan",
        f"/interfaces/{made['interfaces'][0]['uuid']}",
        "/nodes/node1",
        "/auth/namespaces/system",
    ]
    for path in paths:
        assert server.call("POST", f"{path}/metadata", {"key": "colour", "value": "red"}).status == 200
        assert server.call("PUT", f"{path}/metadata/colour", {"value": ["blue"]}).status == 200
        assert server.get(f"{path}/metadata") == {"colour": ["blue"]}
        assert server.get(path)["metadata"] == {"colour": ["blue"]}
        assert server.call("DELETE", f"{path}/metadata/colour").status == 200
        assert server.call("DELETE", f"{path}/metadata/colour").status == 404
    assert network["metadata"] == {}


def test_metadata_is_limited(server: Running) -> None:
    server.network()
    answer = server.call("PUT", "/networks/lan/metadata/a", {"value": "x" * 2**16})
    assert (answer.status, "65536 bytes" in answer.body["error"]) == (400, True)


def test_console_data_is_raw_bytes_and_can_be_cleared(server: Running) -> None:
    created(server)
    assert server.get("/instances/web/consoledata", {"length": 6}) == b"READY\n"
    assert server.get("/instances/web/consoledata", {"length": -1}) == b"SF-GUEST-READY\n"
    assert server.call("DELETE", "/instances/web/consoledata").body is None
    assert server.get("/instances/web/consoledata") == b""


def test_ping_answers_with_lists_of_lines(server: Running) -> None:
    server.network()
    assert server.get("/networks/lan/ping/10.42.0.2")["stdout"][0] == "PING 10.42.0.2"
    assert server.call("GET", "/networks/lan/ping/10.43.0.2").status == 400


def test_the_doctor_tells_what_concerns_the_network_and_its_nodes(server: Running) -> None:
    server.network()
    found = server.get("/networks/lan/doctor")
    assert [(f["node"], f["problem"]) for f in found] == [
        ("node1", "the bridge is missing"),
        ("node1", "ufw drops"),
    ]


def test_a_nodes_cache_is_the_administrators_to_see_and_to_fill(server: Running) -> None:
    image = server.call("POST", "/nodes/node1/cache", {"image": "debian:12"})
    assert image.status == 200 and server.agent.fetched == [image.body[0]["digest"]]
    assert [one["digest"] for one in server.get("/nodes/node1/cache")] == server.agent.fetched
    assert server.call("POST", "/nodes/node1/cache", {"image": "nothing:1"}).status == 404
    assert server.call("GET", "/nodes/node2/cache").status == 404
    server.call("POST", "/auth/namespaces", {"namespace": "lab", "key_name": "k", "key": "k" * 20})
    for verb in ("GET", "POST"):
        body = {"image": "debian:12"} if verb == "POST" else None
        assert server.call(verb, "/nodes/node1/cache", body, namespace="lab", key="k" * 20).status == 403
    assert len(server.agent.fetched) == 1


def test_events_are_newest_first_and_filtered(server: Running) -> None:
    created(server)
    found = server.get("/instances/web/events")
    assert [e["timestamp"] for e in found] == sorted((e["timestamp"] for e in found), reverse=True)
    assert {e["type"] for e in server.get("/instances/web/events", {"event_type": "audit"})} == {"audit"}
    assert len(server.get("/instances/web/events", {"limit": 1})) == 1
    assert set(found[0]) == {"timestamp", "type", "fqdn", "duration", "message", "extra", "by", "from"}


def test_an_entity_tag_guards_against_a_change_in_between(server: Running) -> None:
    server.network()
    first = server.call("GET", "/networks/lan")
    tag = first.headers["etag"]
    assert server.call("GET", "/networks/lan", headers={"If-None-Match": tag}).status == 304
    server.call("PUT", "/networks/lan/metadata/a", {"value": 1})
    assert server.call("DELETE", "/networks/lan", headers={"If-Match": tag}).status == 412
    assert server.call("DELETE", "/networks/lan", headers={"If-Match": "*"}).status == 200


def test_an_idempotency_key_makes_a_repeat_harmless(server: Running) -> None:
    headers = {"Idempotency-Key": "k1"}
    body = {"name": "lan", "netblock": "10.42.0.0/24"}
    first = server.call("POST", "/networks", body, headers=headers)
    again = server.call("POST", "/networks", body, headers=headers)
    assert first.body["uuid"] == again.body["uuid"]
    other = server.call("POST", "/networks", {**body, "name": "other"}, headers=headers)
    assert other.status == 409


def test_a_body_over_the_limit_is_refused(server: Running) -> None:
    answer = server.call("POST", "/networks", b'{"name": "' + b"x" * 2**20 + b'"}')
    assert answer.status == 413


def test_a_body_that_is_no_json_is_400(server: Running) -> None:
    assert server.call("POST", "/networks", b"{").status == 400


def test_the_page_at_the_root_lists_capabilities_without_a_token(server: Running) -> None:
    page = server.call("GET", "/", namespace="").body.decode()
    assert "hot-plug-interface" in page
    for absent in ("blob-metadata", "cluster-cacert", "network-delete-async", "vdi-console-proxy"):
        assert absent not in page


def test_machines_get_metrics_liveness_and_readiness(server: Running) -> None:
    server.network()
    text = server.call("GET", "/metrics").body.decode()
    assert 'sf_objects{kind="network",state="created"} 1.0' in text
    assert 'route="/networks"' in text
    assert server.call("GET", "/livez", namespace="").status == 200
    assert server.call("GET", "/readyz", namespace="").status == 200
    assert "/instances/{ref}" in server.call("GET", "/openapi.json", namespace="").body["paths"]


def test_a_namespace_sees_its_own_objects_and_those_of_who_trusts_it(server: Running) -> None:
    for name in ("shop", "lab"):
        body = {"namespace": name, "key_name": "first", "key": f"key-{name}"}
        assert server.call("POST", "/auth/namespaces", body).status == 200
        server.tokens[name] = server.login(name, f"key-{name}").body["access_token"]
    mine = server.call("POST", "/networks", {"name": "lan", "netblock": "10.1.0.0/24"}, namespace="shop").body
    assert mine["namespace"] == "shop"
    assert server.get("/networks", namespace="lab") == []
    assert server.call("GET", f"/networks/{mine['uuid']}", namespace="lab").status == 404
    assert server.call("DELETE", f"/networks/{mine['uuid']}", namespace="lab").status == 404
    assert [n["name"] for n in server.get("/networks")] == ["lan"]
    assert server.call("DELETE", "/auth/namespaces/shop").status == 400
    elsewhere = {"name": "b", "netblock": "10.1.0.0/24", "namespace": "shop"}
    assert server.call("POST", "/networks", elsewhere, namespace="lab").status == 403
    assert server.call("GET", "/auth/namespaces/shop", namespace="lab").status == 404
    assert [n["name"] for n in server.get("/auth/namespaces", namespace="lab")] == ["lab"]
    server.call("POST", "/auth/namespaces/shop/trust", {"external_namespace": "lab"}, namespace="shop")
    assert server.get("/networks", namespace="lab") == []
    assert [n["name"] for n in server.get("/networks", {"namespace": "shop"}, namespace="lab")] == ["lan"]
    assert server.call("DELETE", "/auth/namespaces/shop/trust/lab", namespace="shop").status == 200
    assert server.get("/networks", {"namespace": "shop"}, namespace="lab") == []
    for verb, path in (
        ("POST", "/auth/namespaces"),
        ("DELETE", "/auth/namespaces/shop"),
        ("GET", "/admin/locks"),
    ):
        assert (
            server.call(verb, path, {"namespace": "x"} if verb == "POST" else None, namespace="lab").status
            == 403
        )


def test_a_taken_network_name_is_a_conflict_in_its_namespace_alone(server: Running) -> None:
    server.call("POST", "/auth/namespaces", {"namespace": "shop"})
    server.network("lan")
    server.network("lan", namespace="shop")
    assert server.call("GET", "/networks/lan", {"namespace": "shop"}).body["namespace"] == "shop"
    assert server.call("POST", "/networks", {"name": "lan", "netblock": "10.9.0.0/24"}).status == 409


def test_wrong_keys_tokens_and_namespaces_have_their_statuses(server: Running) -> None:
    assert server.login("system", "wrong").status == 401
    assert server.login("nowhere", "x").status == 401
    assert server.call("POST", "/auth", {"namespace": "system"}, namespace="").status == 400
    good = server.login("system", server.key).body
    assert (good["token_type"], good["expires_in"]) == ("Bearer", 900)
    assert server.call("GET", "/instances", namespace="").status == 401
    head, body, signature = good["access_token"].split(".")
    server.tokens["forged"] = f"{head}.{body}.{signature[::-1]}"
    assert server.call("GET", "/instances", namespace="forged").status == 401


def test_a_changed_key_ends_its_tokens_at_once(server: Running) -> None:
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "one"})
    server.tokens["shop"] = server.login("shop", "one").body["access_token"]
    assert server.call("GET", "/instances", namespace="shop").status == 200
    assert server.call("PUT", "/auth/namespaces/shop/keys/k", {"key": "two"}).status == 200
    assert server.call("GET", "/instances", namespace="shop").status == 401
    assert (server.login("shop", "one").status, server.login("shop", "two").status) == (401, 200)
    assert server.call("POST", "/auth/namespaces/shop/keys", {"key_name": "k", "key": "x"}).status == 409
    assert server.call("PUT", "/auth/namespaces/shop/keys/none", {"key": "x"}).status == 404


def test_a_stream_of_events_goes_on_and_resumes_where_it_was_left(server: Running) -> None:
    server.network()
    server.get("/networks")
    headers = {"Authorization": f"Bearer {server.tokens['system']}"}

    def read(count: int, **more: str) -> list[tuple[str, str]]:
        request = urllib.request.Request(
            f"{server.url}/networks/lan/events?follow=true", headers=headers | more
        )
        found = []
        with urllib.request.urlopen(request, timeout=30) as stream:
            while len(found) < count:
                line = stream.readline().decode()
                if line.startswith("id: "):
                    event = json.loads(stream.readline().decode().removeprefix("data: "))
                    found.append((line[4:].strip(), event["message"]))
        return found

    first = read(1)
    assert "created as 10.42.0.0/24" in first[0][1]
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, 1, **{"Last-Event-ID": first[0][0]})
        server.call("PUT", "/networks/lan/metadata/a", {"value": 1})
        assert following.result(30)[0][1] == "metadata a changed"


def test_readers_of_one_objects_events_keep_no_thread_waiting_and_what_is_used_is_told_again(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch of etcd takes 0.2 s to say that there is nothing, and every reader looks at each change anywhere."""
    server.network()
    uuid = created(server, network="lan")["uuid"]
    store, usage = server.services.store, server.services.controller.usage
    watch = store.watch

    def watched(prefix: str, after: int, timeout_s: float) -> Any:
        assert timeout_s or not prefix.startswith("event/"), prefix
        return watch(prefix, after, timeout_s)

    monkeypatch.setattr(store, "watch", watched)
    monkeypatch.setattr(usage, "of", lambda item: {"cpu": item.KIND})
    headers = {"Authorization": f"Bearer {server.tokens['system']}", "Content-Type": "application/json"}
    assert server.call("GET", "/networks/lan/events", {"event_type": ""}).body
    for event_type in ("audit", "usage"):
        asked = urllib.request.Request(
            f"{server.url}/instances/{uuid}/events?follow=true", headers=headers, method="GET"
        )
        asked.data = json.dumps({"event_type": event_type}).encode()
        with urllib.request.urlopen(asked, timeout=10) as stream:
            assert json.loads(next(line for line in stream if line[:5] == b"data:")[5:])["type"] == event_type


def test_all_that_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    with running(tmp_path / "state") as first:
        first.network()
        uuid = created(first, network="lan")["uuid"]
        key, token = first.key, first.tokens["system"]
        revision = first.services.store.revision()
    with running(tmp_path / "state") as second:
        assert second.key == key
        second.tokens["system"] = token
        found = second.get(f"/instances/{uuid}")
        assert (found["state"], found["interfaces"][0]["ipv4"]) == ("created", "10.42.0.2")
        assert second.services.store.revision() >= revision
        assert (tmp_path / "state/auth/local-key").stat().st_mode & 0o777 == 0o600
        second.call("DELETE", "/instances/web")
        second.wait_for(f"/instances/{uuid}", "deleted")


def test_many_creations_at_once_get_different_addresses_and_all_room_is_accounted(server: Running) -> None:
    server.network()
    server.get("/networks")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: server.instance(f"vm{n}", network="lan"), range(40)))
    made = [a.body for a in answers if a.status == 200]
    assert {a.status for a in answers} == {200, 507}
    assert len(made) == (8192 - 512) // 256
    addresses = [m["interfaces"][0]["ipv4"] for m in made]
    assert len(set(addresses)) == len(addresses)
    server.call("DELETE", "/instances", {"confirm": True})
    for one in made:
        server.wait_for(f"/instances/{one['uuid']}", "deleted")
    assert server.instance("again", memory=7680).status == 200


def test_a_network_on_the_lan_is_the_administrators_and_its_addresses_are_the_lans(server: Running) -> None:
    lan = server.network("home", "", bridge="br0")
    assert (lan["bridge"], lan["netblock"], lan["router_node"]) == ("br0", None, "")
    link = created(server, network="home")["interfaces"][0]
    assert (link["ipv4"], link["floating"]) == (None, None)
    fixed = [{"network_uuid": "home", "address": "192.168.7.9"}]
    assert server.instance("b", network=fixed).body["interfaces"][0]["ipv4"] == "192.168.7.9"
    for address, status in (("192.168.7.9", 409), ("0.0.0.3", 400), ("224.0.0.1", 400)):
        wanted = [{"network_uuid": "home", "address": address}]
        assert server.instance("c", network=wanted).status == status, address
    specs = {i.name: i.interfaces[0].address for i in server.agent.desired.instances}  # type: ignore[union-attr]
    assert specs == {"web": "0.0.0.2", "b": "192.168.7.9"}
    assert server.call("DELETE", "/networks/home").status == 409
    assert server.call("POST", f"/interfaces/{link['uuid']}/publish", {"ports": "8080:80"}).status == 409
    assert server.call("POST", f"/interfaces/{link['uuid']}/float").status == 409
    ranged = server.network("office", "192.168.8.0/24", bridge="br1", range="192.168.8.200-192.168.8.201")
    assert (ranged["gateway"], ranged["provide_dhcp"], ranged["provide_nat"]) == ("192.168.8.1", False, False)
    given = [server.instance(name, network="office").body["interfaces"][0]["ipv4"] for name in "de"]
    assert given == ["192.168.8.200", "192.168.8.201"]
    assert server.instance("f", network="office").status == 507
    for wrong in (
        {"bridge": "../x"},
        {"bridge": "br0", "netblock": "10.0.0.0/24"},
        {"bridge": "br0", "netblock": "10.0.0.0/24", "range": "10.0.1.2-10.0.1.3"},
        {"bridge": "br0", "netblock": "10.0.0.0/24", "range": "10.0.0.9-10.0.0.3"},
        {"netblock": "10.0.0.0/24", "range": "10.0.0.3-10.0.0.9"},
    ):
        assert server.call("POST", "/networks", {"name": "wrong", **wrong}).status == 400, wrong
    server.call("POST", "/auth/namespaces", {"namespace": "ci", "key_name": "k", "key": "secret-of-ci"})
    ours = {"namespace": "ci", "key": "secret-of-ci"}
    assert server.call("POST", "/networks", {"name": "mine", "bridge": "br0"}, **ours).status == 403
    server.call("POST", "/auth/namespaces/system/trust", {"external_namespace": "ci"})
    body = {
        "name": "t",
        "cpus": 1,
        "memory": 64,
        "disk": [{"size": 1}],
        "network": [{"network_uuid": lan["uuid"]}],
    }
    for claim in (
        {"address": "192.168.7.1"},
        {"macaddress": "02:00:00:00:00:01"},
    ):  # the LAN's router's, perhaps
        claims = {**body, "network": [{"network_uuid": lan["uuid"], **claim}]}
        assert server.call("POST", "/instances", claims, **ours).status == 403, claim
    assert server.call("POST", "/instances", body, **ours).status == 200


def test_a_network_with_ipv6_gives_an_address_of_each_kind_and_chosen_prefixes_are_the_administrators(
    server: Running,
) -> None:
    auto = server.network(ipv6="auto")
    block = IPv6Network(auto["netblock6"])
    assert block.prefixlen == 64 and block.subnet_of(IPv6Network("fd00::/8"))
    link = created(server, network=[{"network_uuid": "lan", "address": "10.42.0.17"}])["interfaces"][0]
    assert (link["ipv4"], link["ipv6"]) == ("10.42.0.17", str(block[17]))
    assert server.get(f"/interfaces/{link['uuid']}")["ipv6"] == str(block[17])
    (network,) = server.agent.desired.networks.networks  # type: ignore[union-attr]
    assert (network.netblock6, network.address6(network.ports[0].address)) == (block, block[17])
    assert server.call("GET", f"/networks/lan/ping/{block[17]}").status == 200
    for wrong in ("2001:db8::1", "fe80::1", f"{block[17]}%25eth0", "x"):
        assert server.call("GET", f"/networks/lan/ping/{wrong}").status == 400, wrong
    plain = server.network("plain", "10.43.0.0/24")
    assert (plain["netblock6"], plain["slaac"], auto["slaac"]) == (None, False, False)
    assert server.network("chosen", "10.47.0.0/24", ipv6="auto", slaac=True)["slaac"]
    created(server, "chooser", network="chosen")
    slaac = {n.name: n.slaac for n in server.agent.desired.networks.networks}  # type: ignore[union-attr]
    assert slaac["chosen"] and not slaac["lan"]
    for wrong in ({}, {"ipv6": "auto", "provide_dhcp": False}):
        body = {"name": "x", "netblock": "10.48.0.0/24", "slaac": True, **wrong}
        assert server.call("POST", "/networks", body).status == 400, wrong
    assert server.call("GET", f"/networks/plain/ping/{block[17]}").status == 400
    routed = {"name": "routed", "netblock": "10.44.0.0/24", "ipv6": "2001:db8:1:2::/64"}
    assert server.network(**routed)["netblock6"] == routed["ipv6"]
    assert server.call("POST", "/networks", {**routed, "name": "again"}).status == 409
    assert server.call("DELETE", "/networks/routed").status == 200
    assert server.call("POST", "/networks", {**routed, "name": "again"}).status == 200
    for wrong in (
        "2001:db8::/48",
        "fe80::/64",
        "ff02::/64",
        "::/64",
        "2001:db8::%x/64",
        "2001:db8::1/64",
        "no",
        "10.0.0.0/24",
    ):
        assert server.call("POST", "/networks", {**routed, "name": "x", "ipv6": wrong}).status == 400, wrong
    assert server.call("POST", "/networks", {"name": "x", "bridge": "br0", "ipv6": "auto"}).status == 400
    server.call("POST", "/auth/namespaces", {"namespace": "ci", "key_name": "k", "key": "secret-of-ci"})
    ours = {"namespace": "ci", "key": "secret-of-ci"}
    for chosen, status in (("2001:db8:1:3::/64", 403), ("fd00::/64", 403), ("auto", 200)):
        assert server.call("POST", "/networks", {**routed, "ipv6": chosen}, **ours).status == status, chosen


def test_a_network_of_ipv6_alone_gives_addresses_of_that_kind_and_nothing_that_needs_the_other(
    server: Running,
) -> None:
    six = server.network("six", "", ipv6="auto")
    block = IPv6Network(six["netblock6"])
    assert (six["netblock"], six["gateway"], six["floating_gateway"]) == (None, None, None)
    link = created(server, network="six")["interfaces"][0]
    assert (link["ipv4"], link["ipv6"]) == (None, str(block[2]))
    chosen = [{"network_uuid": "six", "address": str(block[0x10009])}]
    assert server.instance("b", network=chosen).body["interfaces"][0]["ipv6"] == str(block[0x10009])
    for address, status, said in (
        (str(block[0x10009]), 409, f"{block[0x10009]} is in use"),
        (str(block[1]), 400, f"{block[1]} is the network's router"),
        (str(block[0]), 400, "broadcast"),
        (str(block[1 << 24]), 400, f"the last one is {block[(1 << 24) - 2]}"),
        ("2001:db8::1", 400, f"no address of {block}"),
        (f"{block[9]}%eth0", 400, "no address of"),
        ("10.0.0.1", 400, "no address of"),
        ("0.0.0.9", 400, "no address of"),
    ):
        wanted = [{"network_uuid": "six", "address": address}]
        refused = server.instance("c", network=wanted)
        assert refused.status == status and said in str(refused.body), (address, refused.body)
    rows = server.get("/networks/six/addresses")
    assert {row["address6"] for row in rows} == {str(block[n]) for n in (1, 2, 0x10009)}
    assert not any("0.0.0." in str(event) for event in server.get("/networks/six/events"))
    uuid = link["uuid"]
    assert server.call("GET", f"/networks/six/ping/{block[2]}").status == 200
    for path in ("/networks/six/ping/0.0.0.2", "/networks/six/ping/127.0.0.1"):
        assert server.call("GET", path).status == 400
    assert server.call("POST", f"/interfaces/{uuid}/float").status == 409
    assert server.call("POST", "/networks/six/route", {"next_hop": "0.0.0.2"}).status == 409
    assert server.call("POST", f"/interfaces/{uuid}/publish", {"ports": "8080:80"}).status == 200
    rules = server.call("POST", "/rules", {"name": "r", "allow": ["tcp:22@six"]}).body
    assert rules["allow"] == [f"tcp:22@{block}"]
    named = {"name": "db", "value": str(block[9]).upper()}
    assert server.call("POST", "/networks/six/dns", named).status == 200
    for wrong in ("fe80::1%eth0", "x", ""):
        assert server.call("POST", "/networks/six/dns", {"name": "x", "value": wrong}).status == 400
    assert server.get("/networks/six")["dns"] == {"db": str(block[9])}
    (network,) = server.agent.desired.networks.networks  # type: ignore[union-attr]
    assert not network.four and network.dns_entries == (("db", block[9]),)
    assert {network.address6(port.address) for port in network.ports} == {block[2], block[0x10009]}
    for known in server.get("/instances"):
        server.call("DELETE", f"/instances/{known['uuid']}")
        server.wait_for(f"/instances/{known['uuid']}", "deleted")
    assert server.call("DELETE", "/networks/six").status == 200
    for wrong in ({"netblock": "0.0.0.0/8", "ipv6": "auto"}, {"netblock": ""}):
        assert server.call("POST", "/networks", {"name": "x", **wrong}).status == 400, wrong


def test_rules_are_made_attached_changed_and_kept_while_they_are_used(server: Running) -> None:
    server.network()
    server.network("quiet", "10.43.0.0/24", isolated=True)
    six = server.network("six", "10.44.0.0/24", ipv6="auto")["netblock6"]
    both = ["tcp:22@six", "tcp:80@2001:db8::/32", "any@::/0", "any@0.0.0.0/0"]
    both = server.call("POST", "/rules", {"name": "both", "allow": both}).body["allow"]
    assert both == ["tcp:22@10.44.0.0/24", "tcp:80@2001:db8::/32", "any@::/0", "any", f"tcp:22@{six}"]
    assert server.get("/rules/both")["allow"] == both
    server.call("DELETE", "/rules/both")
    lines = [
        "tcp:443,80,8000-8010",
        "tcp:22@192.0.2.0/24",
        "udp:53@quiet",
        "icmp",
        "any@10.9.0.0/16",
    ]
    made = server.call("POST", "/rules", {"name": "web", "allow": lines})
    shown = [
        "tcp:80,443,8000-8010",
        "tcp:22@192.0.2.0/24",
        "udp:53@10.43.0.0/24",
        "icmp",
        "any@10.9.0.0/16",
    ]
    assert made.body["allow"] == shown
    assert server.get("/rules/web")["allow"] == shown
    assert server.call("POST", "/rules", {"name": "web", "allow": []}).status == 409
    for wrong in (
        "tcp:",
        "tcp:0",
        "tcp:70000",
        "tcp:9-8",
        "icmp:8",
        "gre",
        "tcp:80@nowhere",
        "tcp:80@fe80::%x/64",
        "tcp:80@2001:db8::1/32",
        "tcp:١",
    ):
        assert server.call("POST", "/rules", {"name": "x", "allow": [wrong]}).status == 400, wrong
    first = created(server, network=[{"network_uuid": "lan", "rules": "web"}, {"network_uuid": "quiet"}])
    link, other = (each["uuid"] for each in first["interfaces"])
    ports = lambda: {  # noqa: E731
        port.uuid: port.allowed and tuple(map(str, port.allowed))
        for network in server.agent.desired.networks.networks  # type: ignore[union-attr]
        for port in network.ports
    }
    assert ports() == {link: tuple(shown), other: ()}
    assert server.call("DELETE", "/rules/web").status == 409
    assert server.call("PUT", "/rules/web", {"allow": ["icmp"]}).body["allow"] == ["icmp"]
    assert server.call("POST", f"/interfaces/{other}/rules", {"rules": "web"}).status == 200
    assert server.call("DELETE", f"/interfaces/{link}/rules", {"rules": "web"}).body["rules"] == []
    last = created(server, "b", network="lan")["interfaces"][0]["uuid"]
    assert ports() == {link: None, other: ("icmp",), last: None}
    limits = {"bytes_in": 10_000_000, "packets_out": 500}
    assert server.call("PUT", f"/interfaces/{link}/limits", limits).body["limits"]["packets_out"] == 500
    assert server.call("PUT", f"/interfaces/{link}/limits", {"bytes_in": -1}).status == 400
    assert server.get(f"/interfaces/{link}")["limits"]["bytes_in"] == 10_000_000
    server.call("DELETE", f"/interfaces/{other}/rules", {"rules": "web"})
    server.call("POST", "/auth/namespaces", {"namespace": "ci", "key_name": "k", "key": "secret-of-ci"})
    ours = {"namespace": "ci", "key": "secret-of-ci"}
    assert server.call("GET", "/rules/system%2Fweb", **ours).status == 404
    assert server.call("POST", "/rules", {"name": "x", "allow": ["any@lan"]}, **ours).status == 400
    assert server.call("POST", f"/interfaces/{link}/rules", {"rules": "web"}, **ours).status == 404
    assert server.call("DELETE", "/rules/web").status == 200
    assert server.get("/rules") == []
