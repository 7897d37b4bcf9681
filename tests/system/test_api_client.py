"""The clients that people already have: shakenfist-client 0.8.3, unchanged, in an environment of its own."""

import asyncio
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import new_uuid, transact
from compute.wire.spec import InstanceState, InstanceStatus
from tests import web
from tests.api_server import Running, running
from tests.system.test_images_on_demand import DATA, serving

VERSION = "0.8.3"
FAIL = {
    "artifact set-metadata": "the client asks for an instance of that uuid",
    "artifact delete-metadata": "the same",
    "blob set-metadata": "the same",
    "blob delete-metadata": "the same",
    "instance await": "the client has no such method",
    "instance snapshot": "snapshots are images of ours (my/NAME:TIME), not artifacts yet",
}
"""Of the client's 85 those that do not work, and why; `network ping` and `node resources` work with --json alone."""
IN_A_GUEST = {f"instance {word}" for word in ("execute", "upload", "download", "screenshot")}
"""They work, and are run where there is a real guest: tests/system/test_into_guests.py."""

MANY = """
import json, sys
import click
from click.testing import CliRunner
from shakenfist_client.main import cli

def every(command, path=()):
    if not isinstance(command, click.Group):
        return [" ".join(path)]
    return [name for word, one in command.commands.items() for name in every(one, (*path, word))]

done = [CliRunner().invoke(cli, words) for words in json.load(sys.stdin)]
print(json.dumps([every(cli), [[one.exit_code, one.output, repr(one.exception)] for one in done]]))
"""
"""Many commands in one process: the client takes a second to be imported."""


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


def client_environment(server: Running, home: Path) -> dict[str, str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "SHAKENFIST_API_URL": server.url}
    return environment | {"SHAKENFIST_NAMESPACE": "system", "SHAKENFIST_KEY": server.key}


def many(client_bin: Path, server: Running, place: Path, *lines: str) -> tuple[list[str], list[str]]:
    """Every command of the client, and what these, which all work, said."""
    asked, argv = [line.split() for line in lines], [str(client_bin / "python"), "-c", MANY]
    options: dict[str, Any] = {"cwd": place, "env": client_environment(server, place), "timeout": 200}
    done = subprocess.run(argv, input=json.dumps(asked), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    known, answers = json.loads(done.stdout)
    for words, (code, said, error) in zip(asked, answers, strict=True):
        assert code == 0, (words, said, error)
    return known, [said for _, said, _ in answers]


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
    block = server.network("six", "", ipv6="auto")["netblock6"].removesuffix(":/64")
    sf_client("instance", "create", "alone", "1", "256", "-d", "8@debian:12", "-n", "six")
    assert "six" in sf_client("network", "list") and "None" in sf_client("--simple", "network", "show", "six")
    assert "0.0.0.2" in sf_client("network", "addresses", "six")
    assert f"{block}:2" in sf_client("--json", "network", "addresses", "six")
    assert (
        json.loads(sf_client("--json", "instance", "show", "alone"))["network_interfaces"][0]["ipv4"] is None
    )
    sf_client("instance", "show", "alone")
    sf_client("instance", "delete", "alone")
    gone = sf_client("--json", "instance", "delete", "web")
    assert made["uuid"] in gone
    for name in ("lan", "six"):
        sf_client("network", "delete", name)
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


def test_the_client_uploads_artifacts_finds_their_blobs_and_labels_them(
    tmp_path: Path, client_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views compared with what the client shows of them."""
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    data = DATA + b"odd"
    (tmp_path / "disk").write_bytes(data)
    sha512 = hashlib.sha512(data).hexdigest()
    with serving(tmp_path) as server:
        said = many(client_bin, server, tmp_path, "artifact upload golden disk")[1][0]
        assert "Uploading new blob" in said and "Created artifact" in said
        made = server.wait_for("/artifacts/golden", "created")
        assert (made["source_url"], made["index"], made["name"]) == ("sf://upload/system/golden", 1, "golden")
        blob = made["blob_uuid"]
        again, *shown = many(
            *(client_bin, server, tmp_path, "artifact upload second disk", f"--json blob sha512 {sha512}"),
            *(f"--json blob sha512 {'0' * 128}", f"blob sha512 {'0' * 128}", "--json blob list", "blob list"),
            *(
                f"blob show {blob}",
                f"blob events {blob}",
                f"label update newest {blob}",
                "--json artifact show golden",
            ),
            *("instance create web 1 256 -d 8@label:newest", f"--json blob show {blob}"),
            *(f"artifact download {made['uuid']} back", "backup create all.json"),
        )[1]
        assert "Recycling existing blob" in again and "Uploading" not in again
        found = json.loads(shown[0])
        wanted = {
            "uuid": str,
            "state": str,
            "metadata": dict,
            "version": int,
            "size": int,
            "virtual size": int,
        }
        wanted |= {"reference_count": int, "depends_on": type(None), "instances": list, "locations": list}
        wanted |= {"modified": float, "fetched_at": float, "transcodes": dict, "sha512": str}
        assert {name: type(found[name]) for name in wanted} == wanted
        assert (found["uuid"], found["size"], found["sha512"]) == (blob, len(data), sha512)
        assert json.loads(shown[1]) is None and "No blob found" in shown[2]
        assert blob in [one["uuid"] for one in json.loads(shown[3])] and blob in shown[4]
        assert f"sha512          : {sha512}" in shown[5] and "version 1 is blob" in shown[6]
        assert server.get("/label/newest")["blob_uuid"] == blob == json.loads(shown[8])["blob_uuid"]
        assert json.loads(shown[10])["virtual size"] > len(DATA)
        assert (tmp_path / "back").read_bytes() == data == (tmp_path / "blobs" / blob).read_bytes()


def test_each_of_the_clients_85_commands_works_or_is_named(
    tmp_path: Path, client_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    (tmp_path / "disk").write_bytes(DATA)
    known, worked = set[str](), set[str]()
    with serving(tmp_path, floating_pool=IPv4Network("192.0.2.0/28")) as server:

        def run(*lines: str) -> list[str]:
            names, said = many(client_bin, server, tmp_path, *lines)
            known.update(names)
            for line in lines:
                plain = [word for word in line.split() if word != "--json"]
                worked.add(" ".join(plain[: 3 if plain[0] == "admin" else 1 if plain[0] == "version" else 2]))
            return said

        server.count()
        run(
            *("version", "admin lock list", "namespace create shop", "namespace list", "namespace show shop"),
            *(
                "namespace add-key shop k secret",
                "namespace update-key shop k other",
                "namespace delete-key shop k",
            ),
            *("namespace add-trust shop system", "namespace remove-trust shop system"),
            *(
                "namespace set-metadata shop a b",
                "namespace get-metadata shop",
                "namespace delete-metadata shop a",
            ),
            *("namespace clean --confirm --namespace shop", "namespace delete shop"),
            *("network create lan 10.42.0.0/24", "network create other 10.43.0.0/24", "network list"),
            *("network show lan", "network events lan", "network addresses lan", "network instances lan"),
            *("network set-metadata lan a b", "network delete-metadata lan a", "network delete other"),
            *("node list", "node show node1", "node events node1", "artifact upload golden disk"),
            *("--json node resources node1", "node cpuhogs"),
        )
        made = server.wait_for("/artifacts/golden", "created")
        blob, sha512 = made["blob_uuid"], made["blobs"]["1"]["sha512"]
        web = "web 1 256 -d 8@label:newest -n lan@10.42.0.9"
        run(f"label update newest {blob}", f"instance create {web}")
        uuid = server.wait_for("/instances/web", "created")["uuid"]
        transact(server.services.store, lambda txn: txn.create(Node(uuid=new_uuid(), name="gone")))
        interface = server.get("/instances/web/interfaces")[0]["uuid"]
        status = InstanceStatus(uuid, InstanceState.CREATED, "on", vdi_port=5900, extra={"vdi_password": "x"})
        report = server.agent.controller.report("node1", [status], [])
        asyncio.run_coroutine_threadsafe(report, server.loop).result(20)
        routed = run("network add-routed lan")[0].strip()
        run(
            *("artifact list", "artifact show golden", "artifact versions golden", "artifact events golden"),
            *("artifact download golden back", "artifact max-versions golden 2", "artifact share golden"),
            *("artifact unshare golden", "blob list", f"blob show {blob}", f"blob events {blob}"),
            *(f"blob sha512 {sha512}", "backup create all.json", "instance list", "instance show web"),
            *("instance events web", "instance set-metadata web a b", "instance delete-metadata web a"),
            *(
                "node delete gone",
                "instance vdiconsolefile web",
                "instance vdiconsole web --viewer /bin/true",
            ),
            *(
                "instance consoledata web",
                "instance consoledelete web",
                "instance pause web",
                "instance unpause web",
            ),
            *(
                "instance reboot web",
                "instance poweroff web",
                "instance poweron web",
                f"interface show {interface}",
            ),
            *(
                f"interface float {interface}",
                f"interface defloat {interface}",
                "--json network ping lan 10.42.0.9",
            ),
            *(f"interface set-metadata {interface} a b", f"interface delete-metadata {interface} a"),
            *(
                f"network delete-routed lan {routed}",
                "instance add-interface web -n lan",
                "instance delete web",
            ),
            *(
                "instance delete-all --confirm --namespace system",
                "network delete-all --confirm --namespace system",
            ),
            *(
                "artifact delete-version golden 1",
                "artifact delete golden",
                "artifact cache https://192.0.2.1/x",
            ),
        )
    assert len(known) == 85 and known - worked == IN_A_GUEST | set(FAIL)


def test_the_client_lists_nodes_artifacts_and_locks(server: Running, sf_client: Callable[..., str]) -> None:
    assert "node1" in sf_client("node", "list")
    assert "node1" in sf_client("node", "show", "node1")
    assert sf_client("node", "events", "node1")
    assert json.loads(sf_client("--json", "artifact", "list")) == []
    assert sf_client("--json", "admin", "lock", "list").strip() == "{}"
