"""`sf doctor` names what is wrong and what mends it; A: "new; a line each: ok, warning or wrong"."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.errors import exit_code
from cli.main import sf
from cli.operate import doctor
from compute.cluster.records.epochs import epoch
from compute.cluster.records.transaction import transact
from imagestore.backends.directory import Directory
from imagestore.mirror import signing
from imagestore.store.store import Store
from tests.api_server import Running, running


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("SF_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SF_API_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "_SOCKETS", ())
    return tmp_path / "state"


@pytest.fixture
def server(state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with running(state) as found:
        monkeypatch.setenv("SF_API_URL", found.url)
        yield found


def examined() -> tuple[int, list[dict[str, str]]]:
    done = CliRunner().invoke(sf, ["doctor", "--format", "json"], obj={}, standalone_mode=False)
    return exit_code(done.exception) if done.exception else 0, json.loads(done.stdout)


def lines(level: str) -> list[str]:
    return [
        f"{one['part']}: {one['what']} -> {one['mend']}" for one in examined()[1] if one["level"] == level
    ]


def test_a_machine_without_anything_is_well_and_hears_that_no_server_is_there() -> None:
    code, found = examined()
    assert code == 0
    assert {one["part"] for one in found if one["level"] == "warning"} == {"server"}
    assert [one["what"] for one in found if one["part"] == "store"] == ["local: none yet"]


def test_a_tenant_is_told_of_what_is_its_own(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are examined on the nodes, which only the system namespace may ask for."""
    server.call("POST", "/auth/namespaces", {"namespace": "shop"})
    server.call("POST", "/auth/namespaces/shop/keys", {"key_name": "k", "key": "k" * 20})
    server.call("POST", "/networks", {"name": "lan", "netblock": "10.42.0.0/24", "namespace": "shop"})
    monkeypatch.setenv("SF_NAMESPACE", "shop")
    monkeypatch.setenv("SF_KEY", "k" * 20)
    found = [one for one in examined()[1] if one["part"] == "server"]
    assert [one["level"] for one in found] == ["ok", "ok"], found


def test_a_state_that_is_empty_damaged_or_incomplete_is_wrong(state: Path) -> None:
    state.mkdir()
    (state / "installation.json").write_text('{"id": "0123abcd"}')
    database = sqlite3.connect(state / "sf.db")
    database.execute("create table t(a)")
    database.executemany("insert into t values(?)", [("x" * 900,)] * 100)
    database.commit()
    database.close()
    assert not [line for line in lines("wrong") if line.startswith("state")]
    whole = (state / "sf.db").read_bytes()
    (state / "sf.db").write_bytes(whole[:8192] + os.urandom(8192) + whole[16384:])
    assert "put a copy of it back" in next(line for line in lines("wrong") if line.startswith("state"))
    (state / "sf.db").write_bytes(b"")
    assert any("it is empty" in line for line in lines("wrong"))
    (state / "sf.db").write_bytes(whole)
    (state / "installation.json").unlink()
    assert any("installation.json is lost" in line for line in lines("wrong"))
    assert examined()[0] == 1


def test_libvirt_that_is_away_is_wrong_on_a_node_alone(state: Path) -> None:
    assert not any(line.startswith("libvirt") for line in lines("wrong"))
    state.mkdir()
    (state / "agent.json").write_text("{}")
    assert any("systemctl start libvirtd" in line for line in lines("wrong"))


def test_a_remote_that_is_away_and_a_clash_of_names_are_said(
    state: Path, tmp_path: Path, server: Running
) -> None:
    Path(os.environ["SF_CONFIG"]).write_text(f'[remotes.shop]\nurl = "{tmp_path}/nowhere"\n')
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "its-key"})
    assert any(line.startswith("store: shop: ") and "sf remote rm shop" in line for line in lines("wrong"))
    assert any("shop is a namespace and a store" in line for line in lines("warning"))


def test_nodes_guests_and_networks_are_looked_at(server: Running) -> None:
    server.agent.broken.add("web")
    uuid = server.instance("web").body["uuid"]
    server.wait_for(f"/instances/{uuid}", "error")
    server.network("lan")
    assert server.call("POST", f"/nodes/{server.agent.node}/drain").status == 200
    warnings = lines("warning")
    assert any(
        "guest system/web: qemu would not start -> sf instance events system/web" in w for w in warnings
    )
    assert any("is drained" in w and "--undo" in w for w in warnings)
    assert any("the bridge is missing" in line for line in lines("wrong"))


def test_a_server_whose_own_node_has_not_registered_yet_is_not_called_wrong(server: Running) -> None:
    """So it is for a moment after each start, and after installation."""
    server.services.controller.nodes._ways.pop(server.agent.node)
    assert not any("node" in line and "nothing" in line for line in lines("wrong"))
    assert any("has said nothing since the server started" in line for line in lines("warning"))


def test_after_a_restore_the_nodes_that_have_not_spoken_yet_are_named(server: Running) -> None:
    """A4: while nothing begins, it is said why, and what ends it."""
    node = server.agent.node
    transact(
        server.services.store,
        lambda txn: txn.update(replace(epoch(txn), waiting=(node,), why="the state was put back")),
    )
    line = next(line for line in lines("wrong") if "nothing begins" in line)
    assert node in line and "the state was put back" in line and f"sf node remove {node}" in line


def test_a_tenant_may_ask_the_doctor_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "its-key"})
    monkeypatch.setenv("SF_NAMESPACE", "shop")
    monkeypatch.setenv("SF_KEY", "its-key")
    assert not [line for line in lines("wrong") if line.startswith("server")]


def test_the_dates_of_trust_are_said_before_they_pass(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.init(Directory(state / "store"))
    keys = signing.Keyring(state / "mirror" / "keys")
    signing.init(store, keys)
    signing.Publisher(store, keys).publish()
    assert not any(one["level"] != "ok" for one in examined()[1] if one["part"] == "trust")
    monkeypatch.setattr(doctor, "_SOON", doctor.timedelta(days=400))
    assert any("sf mirror refresh" in line for line in lines("warning"))


def test_a_full_disk_is_wrong(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.mkdir()
    usage: Any = shutil.disk_usage(state)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 100))
    assert any(line.startswith("space") and "sf image gc" in line for line in lines("wrong"))


def test_what_is_closed_to_the_one_who_asks_is_no_fault(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> Iterator[doctor.Line]:
        raise PermissionError(13, "Permission denied", "sf.db")
        yield

    monkeypatch.setitem(doctor.CHECKS, "state", closed)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert any("be root for this" in line for line in lines("warning"))
