"""What `sf serve` is told, and what it refuses before it starts anything."""

import json
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from compute.cluster import certificates, desired
from compute.cluster.auth import Authority, ensure_local_key
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config, host_port, load
from compute.errors import Conflict, Denied, Unauthenticated, Unavailable
from compute.process import only_one
from compute.serve import _listen, _settings, installation_id, secured
from compute.wire.spec import JoinToken
from imagestore import Invalid, Settings


def test_flags_win_over_variables_and_these_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'listen = "127.0.0.1:1"\nuplink = "eth9"\nexcluded_networks = ["10.0.0.0/16", "172.16.0.0/12"]\n'
        '[remotes.official]\nurl = "https://images.example/"\n'
    )
    env = {"SF_CONFIG": str(file), "SF_LISTEN": "127.0.0.1:2", "SF_STATE_DIR": str(tmp_path)}
    config = load(Settings({"listen": "[::1]:3"}, env))
    assert (config.host, config.port, config.uplink) == ("::1", 3, "eth9")
    assert [str(block) for block in config.excluded] == ["10.0.0.0/16", "172.16.0.0/12"]
    assert config.stores == (("local", f"file://{tmp_path}/store"), ("official", "https://images.example/"))
    assert load(Settings(environment=env)).port == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"SF_LISTEN": "host:port"},
        {"SF_FLOATING_POOL": "10.0.0.1/24"},
        {"SF_MESH_ADDRESS": "here"},
        {"SF_CPU_RATIO": "nan"},
        {"SF_DISK_RATIO": "inf"},
        {"SF_RESTART_RESERVE": "-1"},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(Invalid, match="configuration"):
        load(Settings(environment=wrong))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("listen = ")
    with pytest.raises(Invalid, match=r"c\.toml"):
        load(Settings(environment={"SF_CONFIG": str(tmp_path / "c.toml")}))


def test_one_server_per_state_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_one(tmp_path), pytest.raises(Conflict, match="another sf serve"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_a_taken_address_is_a_conflict() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(Conflict, match="cannot listen"):
        _listen("127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0"])
def test_nodes_are_listened_for_at_an_address_of_either_kind(where: str) -> None:
    with _listen(*host_port(where)) as listener:
        assert listener.getsockname()[0] == where.rpartition(":")[0].strip("[]")


def test_the_installations_id_is_made_once_and_never_made_up_again(tmp_path: Path) -> None:
    first = installation_id(tmp_path)
    assert installation_id(tmp_path) == first
    (tmp_path / "sf.db").touch()
    (tmp_path / "installation.json").rename(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="is lost"):  # a new id would make strangers of all guests
        installation_id(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "installation.json")
    assert json.loads((tmp_path / "installation.json").read_text()) == {"id": first}
    (tmp_path / "installation.json").write_text("{}")
    with pytest.raises(Unavailable, match="cannot read"):
        installation_id(tmp_path)


def test_a_lost_hash_of_the_local_key_is_made_again_from_its_file(tmp_path: Path) -> None:
    key_file = tmp_path / "auth/local-key"
    store = SqliteStore(tmp_path / "a.db")
    ensure_local_key(store, key_file)
    store.close()
    fresh = SqliteStore(tmp_path / "b.db")
    ensure_local_key(fresh, key_file)
    ensure_local_key(fresh, key_file)
    authority = Authority(fresh)
    token = authority.login("system", key_file.read_text())["access_token"]
    assert authority.caller(f"Bearer {token}").admin
    with pytest.raises(Unauthenticated):
        Authority(fresh).login("system", key_file.read_text() + "x")
    fresh.close()


@pytest.mark.parametrize("text", ["", "sfj1", "sfj1.x.y", "sfj2.AAAA.b", "sfj1.QUFBQQ==.secret"])
def test_what_is_no_join_token_is_refused(text: str) -> None:
    with pytest.raises(Denied, match="join token"):
        JoinToken.parse(text)


def test_the_servers_certificate_is_made_once_and_its_key_is_roots_alone(tmp_path: Path) -> None:
    cert, key, fingerprint = certificates.certificate(tmp_path)
    assert certificates.certificate(tmp_path) == (cert, key, fingerprint)
    assert key.stat().st_mode & 0o777 == 0o600
    token = JoinToken(fingerprint, "s")
    assert JoinToken.parse(str(token)) == token


def facts(number: int, mtu_bytes: int) -> dict[str, Any]:
    return {"cpus": 1, "memory_mib": 512, "address": f"192.0.2.{number}", "mtu_bytes": mtu_bytes}


def test_a_node_hears_only_of_networks_that_it_has_to_do_with(tmp_path: Path) -> None:
    networks = [
        Network(uuid=f"u{n}", name=f"n{n}", namespace="s", netblock="10.0.0.0/24", vni=n, router_node=node)
        for n, node in ((1, "here"), (2, "there"), (3, ""))
    ]
    nodes = [
        Node(uuid="1", name="here", facts=facts(1, 8950)),
        Node(uuid="2", name="there", facts=facts(2, 1450)),
        Node(uuid="3", name="silent"),
        Node(uuid="4", name="gone", state="deleted", facts=facts(4, 1280)),
    ]
    with closing(SqliteStore(tmp_path / "sf.db")) as store:
        transact(store, lambda txn: [txn.create(one) for one in (*networks, *nodes)])
        found = desired.read(Transaction(store), "here", "0123abcd", ["here"]).networks
    assert [n.name for n in found.networks] == ["n1"]
    assert found.networks[0].mtu_bytes == 1450
    assert [(p.node, str(p.address)) for p in found.peers] == [("there", "192.0.2.2")]
    assert str(found.underlay) == "192.0.2.1"


def test_no_client_is_sent_a_ticket_that_it_would_read_while_it_writes(tmp_path: Path) -> None:
    """Of a few hundred streams of the command line one lost its request, and was let go after 10 s."""
    (tmp_path / "auth").mkdir()
    made = _settings(FastAPI(), **secured(Config(state_dir=tmp_path, tls=True)))
    assert made.ssl and made.ssl.num_tickets == 0
    assert _settings(FastAPI()).ssl is None


def test_small_answers_do_not_wait_for_each_other() -> None:
    """Without it an answer of two writes takes 40 ms: the kernel waits for an acknowledgement that is delayed."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
