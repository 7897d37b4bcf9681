"""Commands that speak to a server: a real `sf serve` with libvirt, on a machine of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from private_libvirtd import PrivateHost  # noqa: E402

from tests.system.machine import within  # noqa: E402

pytestmark = pytest.mark.system

SF = Path(sys.executable).with_name("sf")


class Site:
    """One server and whoever types commands on its machine."""

    def __init__(self, host: PrivateHost, home: Path) -> None:
        self.host, self.home = host, home
        self.variables = {
            "HOME": str(home),
            "SF_STATE_DIR": str(home / "sf"),
            "SF_CACHE_DIR": str(home / "hints"),
        }
        self._serve: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.home / "serve.log").open("ab") as log:
            self._serve = self.host.popen(
                self._argv("serve"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 60
        while self.run("instance", "ls").returncode:
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Ctrl-C at the server; its exit code."""
        assert self._serve
        children = Path(f"/proc/{self._serve.pid}/task/{self._serve.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGINT)
        code = self._serve.wait(60)
        self._serve = None
        return code

    def said(self) -> str:
        return (self.home / "serve.log").read_text()

    def _argv(self, *words: str | Path, **variables: str) -> list[str]:
        given = [f"{name}={value}" for name, value in (self.variables | variables).items()]
        return ["env", *given, str(SF), *map(str, words)]

    def run(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        argv = self.host.inside(self._argv(*words, **variables))
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)

    def types(self, *words: str | Path, **variables: str) -> str:
        done = self.run(*words, **variables)
        assert done.returncode == 0, (
            f"$ sf {' '.join(map(str, words))}\n{done.stdout}{done.stderr}\n{self.said()}"
        )
        return done.stdout

    def json(self, *words: str | Path, **variables: str) -> dict:
        return json.loads(self.types(*words, "--format", "json", **variables))

    def fails(self, code: int, *words: str | Path, **variables: str) -> str:
        """The one line that an error is."""
        done = self.run(*words, **variables)
        assert done.returncode == code, f"$ sf {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("sf: "), done.stderr
        assert done.stdout == ""
        return lines[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("site")
    with PrivateHost() as host:
        found = Site(host, home)
        found.start()
        found.types("image", "push", tiny_image, "tiny:1", "-q")
        found.types("network", "create", "lan", "10.42.0.0/24")
        yield found
        found.types("instance", "ls")
        assert found.interrupt() == 0


@pytest.fixture(scope="module")
def web(site: Site) -> str:
    """A guest that is up."""
    site.types(
        "instance",
        "create",
        "web",
        "--image",
        "tiny:1",
        "--network",
        "lan",
        "--memory",
        "192",
        "--wait",
        "boot",
    )
    return "web"


def test_a_guest_that_boots_is_followed_until_it_says_that_it_is_up(site: Site) -> None:
    words = (
        "instance",
        "create",
        "up",
        "--image",
        "tiny:1",
        "--network",
        "lan",
        "--memory",
        "192",
        "--wait",
        "boot",
    )
    done = site.run(*words, "--format", "json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    address = made["interfaces"][0]["ipv4"]
    last = done.stderr.splitlines()[-1]
    signs = rf"SF-GUEST-READY \S+ \S+ {re.escape(address)}|its agent answers"
    assert re.fullmatch(rf"up: ({signs}) after [\d.]+ s", last)
    assert "booting" in done.stderr
    site.types("instance", "delete", "up", "--wait")
    assert "up" not in site.types("instance", "ls", "--format", "name").split()


def test_what_a_guest_and_its_node_use_is_counted(site: Site, web: str) -> None:
    address = site.json("instance", "show", web)["interfaces"][0]["ipv4"]
    site.types("network", "ping", "lan", address)

    def used() -> dict[str, Any]:
        return site.json("instance", "show", web)["usage"] or {"per_s": {}}

    within(60, lambda: used()["per_s"] and used()["in_bytes"], "figures of two intervals")
    found = used()
    assert 0 < found["cpu_s"] < 600 and 2**24 < found["memory_bytes"] < 2**30
    assert found["read_bytes"] > 2**20 and found["disk_bytes"] > 0 and found["out_bytes"] > 100
    assert 0 <= found["cpu_share"] < 2
    node = site.json("node", "ls")[0]["usage"]
    assert node["memory_total_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < node["disk_bytes"] <= node["disk_total_bytes"] and node["cpu_s"] > found["cpu_s"]
    lines = site.types("top").splitlines()
    assert lines[0].split()[:2] == ["NAME", "CPUS"] and lines[1].split()[0] == web and "of 1" in lines[1]


def test_a_guest_is_shown_listed_pinged_and_its_history_told(site: Site, web: str) -> None:
    shown = site.json("instance", "show", web)
    address = shown["interfaces"][0]["ipv4"]
    table = site.types("instance", "show", web)
    assert address in table and "tiny:1" in table and ("tcg" in table or "kvm" in table)
    assert web in site.types("instance", "ls", "--format", "name").split()
    assert address in site.types("instance", "ls")
    assert address in site.types("network", "show", "lan")
    assert "bytes from" in site.types("network", "ping", "lan", address)
    assert "does not answer" in site.run("network", "ping", "lan", "10.42.0.250").stderr
    assert "created" in site.types("instance", "events", web)
    assert site.types("network", "doctor", "lan", "--format", "json") == "[]\n"
    assert site.json("network", "events", "lan")
    assert "SF-GUEST-READY" in site.types("instance", "console", web)


def test_the_console_can_be_followed_until_ctrl_c(site: Site, web: str) -> None:
    argv = ["timeout", "-s", "INT", "3", *site._argv("instance", "console", web, "-f")]
    done = subprocess.run(site.host.inside(argv), capture_output=True, timeout=60)
    assert b"SF-GUEST-READY" in done.stdout
    assert done.stderr.split(b"\n") == [b"", b"sf: interrupted", b""]


def test_ssh_goes_through_the_api_with_or_without_the_servers_files(site: Site, web: str) -> None:
    uuid = site.json("instance", "show", web)["uuid"]
    for variables in ({}, {"SF_STATE_DIR": "/nowhere", "SF_KEY": local_key(site)}):
        done = site.run("instance", "ssh", web, "true", **variables)
        assert uuid in done.stderr and "Permission denied" in done.stderr, done.stderr


def local_key(site: Site) -> str:
    return (site.home / "sf/auth/local-key").read_text().strip()


def test_power_follows_the_commands(site: Site, web: str) -> None:
    def power(wanted: str) -> None:
        end = time.monotonic() + 60
        while (seen := site.json("instance", "show", web)["power_state"]) != wanted:
            assert time.monotonic() < end, seen
            time.sleep(0.1)

    for word, wanted in (("pause", "paused"), ("unpause", "on"), ("stop", "off"), ("start", "on")):
        site.types("instance", word, web)
        power(wanted)
    site.types("instance", "reboot", web, "--hard")


def test_an_interface_is_plugged_in_and_taken_out(site: Site, web: str) -> None:
    site.types("network", "create", "second", "10.43.0.0/24")
    address = site.json("instance", "show", web)["interfaces"][0]["ipv4"]
    assert "pool" in site.fails(6, "instance", "float", web, address)
    plugged = site.json("instance", "add-interface", web, "second,address=10.43.0.77")
    assert plugged["ipv4"] == "10.43.0.77"
    assert "10.43.0.77" in site.types("instance", "show", web)
    assert "no interface" in site.fails(3, "instance", "remove-interface", web, "10.43.0.78")
    site.types("instance", "remove-interface", web, "10.43.0.77")
    end = time.monotonic() + 60
    while "10.43.0.77" in site.types("instance", "show", web):
        assert time.monotonic() < end
        time.sleep(0.1)
    site.types("network", "delete", "second")


CREATE = ("instance", "create")
WRONG = {
    "unknown image": (3, (*CREATE, "x", "--image", "tyni:1"), "tiny:1"),
    "bad image name": (2, (*CREATE, "x", "--image", "Tiny One"), "Tiny One"),
    "image from a file": (2, (*CREATE, "x", "--image", "file:/etc/passwd"), "file:"),
    "disk smaller than its image": (2, (*CREATE, "x", "--image", "large:1", "--disk", "1G"), "smaller"),
    "no disk": (2, (*CREATE, "x"), "disk"),
    "bad disk size": (2, (*CREATE, "x", "--image", "tiny:1", "--disk", "lots"), "lots"),
    "name taken": (5, (*CREATE, "web", "--image", "tiny:1", "--network", "lan"), "web"),
    "bad instance name": (2, (*CREATE, "not.a.label", "--image", "tiny:1"), "not.a.label"),
    "unknown network": (3, (*CREATE, "x", "--image", "tiny:1", "--network", "wan"), "wan"),
    "address outside": (2, (*CREATE, "x", "--image", "tiny:1", "--network", "lan,address=10.9.9.9"), "10.9.9.9"),
    "address of the router": (2, (*CREATE, "x", "--image", "tiny:1", "--network", "lan,address=10.42.0.1"), "router"),
    "no address": (2, (*CREATE, "x", "--image", "tiny:1", "--network", "lan,address=here"), "here"),
    "unknown network option": (2, (*CREATE, "x", "--image", "tiny:1", "--network", "lan,colour=red"), "colour"),
    "private key as public one": (2, (*CREATE, "x", "--image", "tiny:1", "--ssh-key", "/etc/passwd"), "/etc/passwd"),
    "too much memory": (6, (*CREATE, "x", "--image", "tiny:1", "--memory", "4000000"), "memory"),
    "unknown node": (3, (*CREATE, "x", "--image", "tiny:1", "--on", "mars"), "mars"),
    "network too small": (2, ("network", "create", "n", "10.50.0.0/30"), "/29"),
    "network with host bits": (2, ("network", "create", "n", "10.50.0.7/24"), "10.50.0.7"),
    "network of nonsense": (2, ("network", "create", "n", "everything"), "everything"),
    "network in use": (5, ("network", "delete", "lan"), "lan"),
    "float of nothing": (3, ("instance", "float", "web", "10.9.9.9"), "10.9.9.9"),
    "token without a listener": (5, ("node", "token"), "SF_AGENT_LISTEN"),
    "unknown instance": (3, ("instance", "show", "nobody"), "nobody"),
    "unknown network to show": (3, ("network", "show", "nowhere"), "nowhere"),
    "ping outside": (2, ("network", "ping", "lan", "192.0.2.1"), "192.0.2.1"),
    "unknown node to show": (3, ("node", "show", "mars"), "mars"),
    "unknown namespace": (3, ("key", "ls", "nobody"), "nobody"),
    "the system namespace": (2, ("namespace", "delete", "system"), "system"),
}  # fmt: skip


@pytest.fixture(scope="module")
def large(site: Site) -> None:
    disk = site.home / "large.raw"
    with disk.open("wb") as file:
        file.truncate(3 << 30)
    site.types("image", "push", disk, "large:1", "--input-format", "raw", "-q")


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_gets_one_line_and_leaves_nothing(site: Site, web: str, large: None, kind: str) -> None:
    code, words, mentioned = WRONG[kind]
    guests = site.types("instance", "ls", "--all", "--format", "name")
    networks = site.types("network", "ls", "--all", "--format", "name")
    taken = site.types("network", "show", "lan", "--format", "json")
    assert mentioned in site.fails(code, *words)
    assert site.types("instance", "ls", "--all", "--format", "name") == guests
    assert site.types("network", "ls", "--all", "--format", "name") == networks
    assert site.types("network", "show", "lan", "--format", "json") == taken


def test_errors_of_the_server_carry_its_request_id(site: Site) -> None:
    assert re.search(r"\[request \w+\]$", site.fails(3, "instance", "show", "nobody"))


def test_tenants_have_their_own_keys_and_see_their_own(site: Site, web: str) -> None:
    site.types("namespace", "create", "shop")
    key = site.types("key", "add", "shop", "laptop").strip()
    as_shop = {"SF_NAMESPACE": "shop", "SF_KEY": key}
    assert site.types("instance", "ls", "--format", "name", **as_shop) == ""
    site.fails(3, "instance", "show", web, **as_shop)
    site.fails(4, "namespace", "create", "other", **as_shop)
    site.fails(4, "instance", "ls", SF_NAMESPACE="shop", SF_KEY="wrong")
    assert "laptop" in site.types("namespace", "show", "shop")
    reader = site.types("key", "add", "shop", "reader", "--ttl", "30d", "--read-only").strip()
    site.types("instance", "ls", SF_NAMESPACE="shop", SF_KEY=reader)
    denied = site.fails(4, "network", "create", "lan", "10.7.0.0/24", SF_NAMESPACE="shop", SF_KEY=reader)
    assert "key reader of namespace shop may only read" in denied
    site.fails(2, "key", "add", "shop", "odd", "--ttl", "0")
    listed = site.types("key", "ls", "shop")
    assert re.search(r"laptop +read and change +never\n", listed) and re.search(
        r"reader +read +in 29 d\n", listed
    )
    assert re.search(
        r"key reader added +system/local from 127.0.0.1\n", site.types("namespace", "events", "shop")
    )
    site.types("key", "rm", "shop", "reader")
    assert site.types("key", "ls", "shop", "--format", "name") == "laptop\n"
    site.types("key", "rm", "shop", "laptop")
    site.fails(4, "instance", "ls", **as_shop)
    site.types("namespace", "delete", "shop")
    assert "shop" not in site.types("namespace", "ls", "--format", "name").split()


def test_nodes_are_listed_shown_and_drained(site: Site, web: str) -> None:
    name = site.types("node", "ls", "--format", "name").strip()
    assert site.json("node", "show", name)["cpus"] > 0
    create = ("instance", "create", "x", "--image", "tiny:1")
    (node,) = json.loads(site.types(*create, "--dry-run", "--format", "json"))
    place = os.statvfs(site.home / "sf" / "instances")
    held = sum(disk["size_bytes"] for disk in site.json("instance", "show", web)["disks"])
    assert node["fits"] and node["disk_bytes"] == 4 * place.f_blocks * place.f_frsize - held
    site.types("node", "drain", name)
    refused = site.run(*create, "--dry-run")
    assert refused.returncode == 6 and "is drained" in refused.stdout
    site.fails(6, *create)
    site.types("node", "drain", name, "--undo")
    assert "created" in site.types("node", "ls")


def test_the_cache_is_listed_and_verified(site: Site, web: str) -> None:
    digest = site.json("image", "show", "tiny:1")["digest"]
    assert digest in site.types("cache", "ls")
    listed = json.loads(site.types("image", "ls", "--format", "json"))
    assert [image["present"] for image in listed if image["name"] == "tiny:1"] == ["100%"]
    assert "every byte is right" in site.types("cache", "verify")


def test_an_image_is_brought_to_nodes_through_the_api_and_their_caches_are_listed(
    site: Site, web: str
) -> None:
    node = site.types("node", "ls", "--format", "name").strip()
    (site.home / "more.raw").write_bytes(os.urandom(3 << 20))
    site.types("image", "push", site.home / "more.raw", "more:1", "--input-format", "raw")
    digest = site.json("image", "show", "more:1")["digest"]
    site.types("cache", "prefetch", "more:1", "--on", "all")
    end = time.monotonic() + 60
    while not any(i["complete"] for i in site.json("cache", "ls", "--on", "all") if i["digest"] == digest):
        assert time.monotonic() < end, site.types("cache", "ls", "--on", node)
        time.sleep(0.1)
    assert {image["node"] for image in site.json("cache", "ls", "--on", node)} == {node}
    assert digest in site.types("cache", "ls")
    site.fails(3, "cache", "ls", "--on", "nowhere")
    site.fails(3, "cache", "prefetch", "nothing:1", "--on", node)
    site.types("image", "rm", "more:1")


def test_a_server_that_is_not_there_is_unreachable(site: Site) -> None:
    for words in (("instance", "ls"), ("network", "ls"), ("node", "ls")):
        assert "127.0.0.1:9" in site.fails(8, *words, "--api-url", "http://127.0.0.1:9")


def test_a_second_server_on_the_same_state_is_refused(site: Site) -> None:
    assert "SF_STATE_DIR" in site.fails(5, "serve", "--listen", "127.0.0.1:0")


def test_ctrl_c_says_that_guests_go_on_and_the_next_server_finds_them(site: Site, web: str) -> None:
    before = site.json("instance", "show", web)
    assert site.interrupt() == 0
    assert re.search(r"\b1 guests?.* go(es)? on running", site.said().splitlines()[-1])
    site.start()
    after = site.json("instance", "show", web)
    assert (after["uuid"], after["power_state"]) == (before["uuid"], "on")
    site.types("instance", "delete", web, "--wait")
    site.types("network", "delete", "lan")
