"""The clients that people already have: shakenfist-client 0.8.3, unchanged, in an environment of its own."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import web
from tests.api_server import Running, running
from tests.system.test_images_on_demand import DATA, serving

VERSION = "0.8.3"


@pytest.fixture(scope="session")
def client_bin() -> Path:
    """The client's bin directory; made once per machine, without touching our own environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sf-tests"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / f"shakenfist-client-{VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True, timeout=120)
            pip = [place / "bin/pip", "install", "-q", "--disable-pip-version-check"]
            done = subprocess.run(
                [*pip, f"shakenfist-client=={VERSION}"], capture_output=True, text=True, timeout=240
            )
            if done.returncode:
                pytest.skip(f"shakenfist-client cannot be installed here: {done.stderr[-200:]}")
            (place / "complete").touch()
    return place / "bin"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "state") as found:
        yield found


@pytest.fixture
def sf_client(client_bin: Path, server: Running, tmp_path: Path) -> Callable[..., str]:
    def run(*words: str, code: int = 0) -> str:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "SHAKENFIST_API_URL": server.url,
            "SHAKENFIST_NAMESPACE": "system",
            "SHAKENFIST_KEY": server.key,
            "SF_TEST_SESSION": os.environ["SF_TEST_SESSION"],
        }
        argv = [str(client_bin / "sf-client"), *words]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_the_client_makes_a_network_and_an_instance_and_takes_them_away(
    server: Running, sf_client: Callable[..., str]
) -> None:
    network = json.loads(sf_client("--json", "network", "create", "lan", "10.42.0.0/24"))
    assert network["state"] == "created"
    made: dict[str, Any] = json.loads(
        sf_client(
            *("--json", "instance", "create", "web", "1", "256", "-d", "8@debian:12"),
            *("-n", f"{network['uuid']}@10.42.0.9", "-m", "colour=red"),
        )
    )
    assert made["state"] in ("created", "preflight")
    assert made["network_interfaces"][0]["ipv4"] == "10.42.0.9"
    assert made["metadata"] == {"colour": "red"}
    assert made["disk_spec"] == [{"base": "debian:12", "bus": None, "size": 8, "type": "disk"}]
    server.wait_for("/instances/web", "created")
    listed = json.loads(sf_client("--json", "instance", "list"))["instances"]
    assert [i["name"] for i in listed] == ["web"]
    for verb in ("poweroff", "poweron", "pause", "unpause"):
        sf_client("instance", verb, "web")
    sf_client("instance", "reboot", "--hard", "web")
    assert "colour" in sf_client("instance", "show", "web")
    assert "debian:12" in sf_client("--simple", "instance", "show", "web")
    assert "SF-GUEST-READY" in sf_client("instance", "consoledata", "web")
    sf_client("instance", "consoledelete", "web")
    assert "reboothard" in sf_client("instance", "events", "web", "-t", "audit", "-l", "3")
    sf_client("instance", "set-metadata", "web", "owner", "me")
    sf_client("instance", "delete-metadata", "web", "owner")
    sf_client("instance", "add-interface", "web", "-n", "lan")
    assert "10.42.0.9" in sf_client("network", "addresses", "lan")
    assert made["uuid"] in sf_client("--simple", "network", "instances", "lan")
    interface = made["network_interfaces"][0]["uuid"]
    assert "10.42.0.9" in sf_client("interface", "show", interface)
    gone = sf_client("--json", "instance", "delete", "web")
    assert made["uuid"] in gone
    sf_client("network", "delete", "lan")
    assert json.loads(sf_client("--json", "network", "list")) == []


def test_the_client_sees_errors_as_it_expects_them(server: Running, sf_client: Callable[..., str]) -> None:
    assert "not found" in sf_client("instance", "show", "nothing", code=1).lower()
    assert "Malformed" in sf_client("network", "create", "tiny", "10.0.0.0/30", code=1)
    assert "no room" in sf_client("instance", "create", "a", "1", "900000", "-d", "8@debian:12", code=1)


def test_the_client_manages_namespaces_keys_and_trust(server: Running, sf_client: Callable[..., str]) -> None:
    sf_client("namespace", "create", "shop")
    sf_client("namespace", "add-key", "shop", "first", "secret1")
    sf_client("namespace", "add-trust", "shop", "system")
    sf_client("namespace", "set-metadata", "shop", "a", "b")
    shown = json.loads(sf_client("--json", "namespace", "show", "shop"))
    assert (shown["keys"], shown["trust"]) == (["first"], {"full": ["system"]})
    assert "first" in sf_client("namespace", "show", "shop")
    assert server.login("shop", "secret1").status == 200
    sf_client("namespace", "delete-key", "shop", "first")
    assert server.login("shop", "secret1").status == 401
    sf_client("namespace", "clean", "--confirm", "--namespace", "shop")
    sf_client("namespace", "delete", "shop")
    assert "shop" not in sf_client("namespace", "list")


def test_the_client_keeps_urls_as_artifacts_and_boots_from_them(
    tmp_path: Path, client_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views compared with the page of the interface: each field is there, and of its kind."""
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "x").write_bytes(DATA)
    with web.nginx(root, tmp_path / "nginx") as url, serving(tmp_path) as server:
        url += "/x"
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SHAKENFIST_API_URL": server.url}
        environment |= {"SHAKENFIST_NAMESPACE": "system", "SHAKENFIST_KEY": server.key}

        def sf_client(*words: str) -> Any:
            argv = [str(client_bin / "sf-client"), "--json", *words]
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout

        sf_client("artifact", "cache", url)
        uuid = sf_client("artifact", "list")[0]["uuid"]
        server.wait_for(f"/artifacts/{uuid}", "created")
        shown = sf_client("artifact", "show", uuid)
        kinds = {
            "uuid": str,
            "namespace": str,
            "artifact_type": str,
            "state": str,
            "source_url": str,
            "index": int,
        }
        kinds |= {"blob_uuid": str, "blobs": dict, "max_versions": int, "shared": bool, "metadata": dict}
        assert {name: type(shown[name]) for name in kinds} == kinds and shown["source_url"] == url
        blob = shown["blobs"]["1"]
        wanted = {
            "uuid": str,
            "size": int,
            "reference_count": int,
            "depends_on": type(None),
            "instances": list,
        }
        assert {name: type(blob[name]) for name in wanted} == wanted and blob["uuid"] == shown["blob_uuid"]
        assert (blob["size"], shown["index"]) == (len(DATA), 1)
        assert sf_client("artifact", "versions", uuid)[0]["index"] == 1
        made = sf_client("instance", "create", "web", "1", "256", "-d", f"8@{url}")
        assert server.wait_for("/instances/web", "created")["disks"][0]["base"] == url
        assert sf_client("artifact", "show", uuid)["blobs"]["1"]["instances"] == [made["uuid"]]
        sf_client("artifact", "share", uuid)
        assert sf_client("artifact", "show", uuid)["shared"]
        sf_client("artifact", "unshare", uuid)
        sf_client("artifact", "max-versions", uuid, "2")
        sf_client("artifact", "delete-version", uuid, "1")
        assert sf_client("artifact", "show", uuid)["blobs"] == {}
        assert any("version 1 is blob" in e["message"] for e in sf_client("artifact", "events", uuid))
        assert sf_client("artifact", "delete", uuid)["state"] == "deleted"
        assert sf_client("artifact", "list") == []


def test_the_client_lists_nodes_artifacts_and_locks(server: Running, sf_client: Callable[..., str]) -> None:
    assert "node1" in sf_client("node", "list")
    assert "node1" in sf_client("node", "show", "node1")
    assert sf_client("node", "events", "node1")
    assert json.loads(sf_client("--json", "artifact", "list")) == []
    assert sf_client("--json", "admin", "lock", "list").strip() == "{}"
