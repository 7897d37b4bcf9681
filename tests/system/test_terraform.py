"""What Shaken Fist's Terraform provider does with a server, call by call, and what it has then.

Its calls, in the order in which `terraform apply`, `plan` and `destroy` make them, are those of the provider's
`resource_*.go` over shakenfist/client-go, for the configuration of the provider's own acceptance test. Neither can be
installed here; what Go makes of the answers is checked instead: a field of another type ends its decoder.
"""

import base64
import http.client
import json
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from compute.config import Config
from tests.api_server import Running, running

DISK = {"base": str, "size": int, "bus": str, "type": str}
VIDEO = {"model": str, "memory": int}
NETWORK = {"uuid": str, "name": str, "netblock": str, "provide_dhcp": bool, "provide_nat": bool, "state": str}
NETWORK |= {"floating_gateway": str}
INTERFACE = {
    "uuid": str,
    "network_uuid": str,
    "instance_uuid": str,
    "macaddr": str,
    "ipv4": str,
    "order": int,
}
INTERFACE |= {"floating": str, "state": str, "model": str}
INSTANCE: dict[str, Any] = {
    "uuid": str,
    "name": str,
    "cpus": int,
    "memory": int,
    "disk_spec": [DISK],
    "state": str,
}
INSTANCE |= {
    "video": VIDEO,
    "ssh_key": str,
    "node": str,
    "console_port": int,
    "vdi_port": int,
    "user_data": str,
}
"""The structs of client-go, by the names of their JSON."""

USER_DATA = base64.b64encode(b"#cloud-config\n{}\n").decode()


def decoded(kind: Any, found: Any) -> Any:
    """What Go has after it decoded JSON into a struct: null and what is missing are the type's zero."""
    if isinstance(kind, list):
        assert found is None or isinstance(found, list), found
        return [decoded(kind[0], one) for one in found or []]
    if isinstance(kind, Mapping):
        assert isinstance(found, dict), found
        lower = {name.lower(): value for name, value in found.items()}
        return {name: decoded(one, lower.get(name)) for name, one in kind.items()}
    assert found is None or type(found) is kind, (kind, found)
    return kind() if found is None else found


class Provider:
    """A client as client-go is: JSON's content type on every call, a body only where it has one."""

    def __init__(self, server: Running, namespace: str, key: str) -> None:
        self.at, self.calls, self.token = urlsplit(server.url), list[str](), ""
        given = {"namespace": namespace, "key": key}
        self.token = self.ask("POST", "auth", given)["access_token"]

    def ask(self, verb: str, path: str, body: Any = None, status: int = 200) -> Any:
        self.calls.append(f"{verb} {path}")
        headers = {"User-Agent": "Go-http-client/1.1", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connection = http.client.HTTPConnection(str(self.at.hostname), self.at.port, timeout=30)
        connection.request(verb, f"/{path}", json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        assert answer.status == status, (verb, path, answer.status, raw)
        return json.loads(raw) if raw else None

    def metadata(self, of: str, wanted: Mapping[str, str], gone: tuple[str, ...] = ()) -> None:
        for key, value in wanted.items():
            self.ask("PUT", f"{of}/metadata/{key}", {"value": value})
        for key in gone:
            self.ask("DELETE", f"{of}/metadata/{key}")

    def read_network(self, uuid: str) -> dict[str, Any]:
        """resourceReadNetwork: what Terraform's state has of it."""
        found = decoded(NETWORK, self.ask("GET", f"networks/{uuid}"))
        return {**found, "metadata": self.ask("GET", f"networks/{uuid}/metadata")}

    def read_instance(self, uuid: str) -> dict[str, Any]:
        """resourceReadInstance."""
        found = decoded(INSTANCE, self.ask("GET", f"instances/{uuid}"))
        links = decoded([INTERFACE], self.ask("GET", f"instances/{uuid}/interfaces"))
        links.sort(key=lambda link: link["order"])
        return {**found, "network": links, "metadata": self.ask("GET", f"instances/{uuid}/metadata")}

    def exists(self, kind: str, uuid: str) -> bool:
        """resourceExists…: "not found" in the error, or the state deleted."""
        return bool(decoded({"state": str}, self.ask("GET", f"{kind}/{uuid}"))["state"] != "deleted")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    state = tmp_path / "state"
    config = Config(state_dir=state, node_name="node1", floating_pool=IPv4Network("192.0.2.0/28"))
    with running(state, config=config) as found:
        yield found


def test_a_configuration_is_applied_planned_without_a_change_updated_and_destroyed(server: Running) -> None:
    body = {"namespace": "testspace", "key_name": "terraform", "key": "secret"}
    assert server.call("POST", "/auth/namespaces", body).status == 200
    terraform = Provider(server, "testspace", "secret")

    # apply: networks first, then the instance on them, then the floating address.
    networks = []
    for name, block, nat in (("external", "10.0.1.0/24", True), ("second", "10.0.2.0/24", False)):
        given = {"name": f"testacc-{name}", "netblock": block, "provide_dhcp": True, "provide_nat": nat}
        made = decoded(NETWORK, terraform.ask("POST", "networks", given))
        terraform.metadata(f"networks/{made['uuid']}", {"purpose": name})
        state = terraform.read_network(made["uuid"])
        assert {**given, "metadata": {"purpose": name}}.items() <= state.items() and state[
            "state"
        ] == "created"
        networks.append(state)
    disks = [{"base": "debian:12", "size": 8, "bus": "ide", "type": "disk"}]
    disks += [{"base": "", "size": 1, "bus": "ide", "type": "disk"}]
    links = [
        {"network_uuid": networks[0]["uuid"], "address": "10.0.1.100", "macaddress": "12:34:56:78:9a:bc"}
        | {"model": "e1000"},
        {"network_uuid": networks[1]["uuid"], "address": "", "macaddress": "", "model": ""},
    ]
    given = {"name": "testacc-jump", "cpus": 1, "memory": 1024, "ssh_key": "ssh-ed25519 AAAA me@here"}
    given |= {"user_data": USER_DATA, "video": {"model": "cirrus", "memory": 16384}}
    made = decoded(INSTANCE, terraform.ask("POST", "instances", {**given, "network": links, "disk": disks}))
    assert made["uuid"]
    labels = {"person": "old man", "action": "shakes fist"}
    terraform.metadata(f"instances/{made['uuid']}", labels)
    server.wait_for(f"/instances/{made['uuid']}", "created")
    jump = terraform.read_instance(made["uuid"])
    assert {**given, "disk_spec": disks, "metadata": labels}.items() <= jump.items()
    assert jump["node"] == "node1"
    assert [link["network_uuid"] for link in jump["network"]] == [one["uuid"] for one in networks]
    first, second = jump["network"]
    assert (first["macaddr"], first["model"], first["ipv4"]) == ("12:34:56:78:9a:bc", "e1000", "10.0.1.100")
    assert second["ipv4"].startswith("10.0.2.") and second["macaddr"] and not second["floating"]
    terraform.ask("POST", f"interfaces/{first['uuid']}/float")
    floating = decoded(INTERFACE, terraform.ask("GET", f"interfaces/{first['uuid']}"))
    assert floating["floating"] and floating["ipv4"] == "10.0.1.100"

    # plan: everything is there and reads as it was kept.
    begun = len(terraform.calls)
    for network in networks:
        assert terraform.exists("networks", network["uuid"])
        kept = {name: value for name, value in network.items() if name != "floating_gateway"}
        assert kept.items() <= terraform.read_network(network["uuid"]).items()
    assert terraform.exists("instances", jump["uuid"])
    again = terraform.read_instance(jump["uuid"])
    assert again == {**jump, "network": [{**first, "floating": floating["floating"]}, second]}
    assert all(call.startswith("GET ") for call in terraform.calls[begun:])

    # apply with other metadata: all that the provider changes in place.
    terraform.metadata(f"instances/{jump['uuid']}", {"action": "screams into rock"}, gone=("person",))
    assert terraform.read_instance(jump["uuid"])["metadata"] == {"action": "screams into rock"}

    # destroy, the other way round.
    terraform.ask("POST", f"interfaces/{first['uuid']}/defloat")
    assert decoded(INTERFACE, terraform.ask("GET", f"interfaces/{first['uuid']}"))["floating"] == ""
    terraform.ask("DELETE", f"instances/{jump['uuid']}")
    server.wait_for(f"/instances/{jump['uuid']}", "deleted")
    for network in reversed(networks):
        terraform.ask("DELETE", f"networks/{network['uuid']}")
    gone = [terraform.exists("instances", jump["uuid"])]
    gone += [terraform.exists("networks", network["uuid"]) for network in networks]
    assert gone == [False] * 3


def test_namespaces_and_keys_of_a_configuration(server: Running) -> None:
    terraform = Provider(server, "system", server.key)
    terraform.ask("POST", "auth/namespaces", {"namespace": "lab"})
    terraform.metadata("auth/namespaces/lab", {"owner": "me"})
    assert terraform.ask("GET", "auth/namespaces/lab/metadata") == {"owner": "me"}
    terraform.ask("POST", "auth/namespaces/lab/keys", {"key_name": "ci", "key": "first"})
    assert decoded([str], terraform.ask("GET", "auth/namespaces/lab/keys")) == ["ci"]
    terraform.ask("PUT", "auth/namespaces/lab/keys/ci", {"key": "second"})
    assert [server.login("lab", key).status for key in ("first", "second")] == [401, 200]
    terraform.ask("DELETE", "auth/namespaces/lab/keys/ci")
    assert decoded([str], terraform.ask("GET", "auth/namespaces/lab/keys")) == []
    terraform.ask("DELETE", "auth/namespaces/lab")


def test_an_error_is_said_where_the_provider_looks_for_it(server: Running) -> None:
    terraform = Provider(server, "system", server.key)
    said = terraform.ask("GET", "instances/00000000-0000-4000-8000-000000000000", status=404)
    assert "not found" in said["error"] and said["status"] == 404
