"""Debian's ansible at work on a real server (its node is played), by the collection in contrib/ansible."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api_server import Running
from tests.system.test_first_hour import ROOT
from tests.system.test_images_on_demand import serving
from tests.system.test_tenants import tenant

pytestmark = pytest.mark.skipif(
    shutil.which("ansible-playbook") is None, reason="needs ansible-core (scripts/setup --tests installs it)"
)

PAGE = (ROOT / "docs/howto/ansible.md").read_text()
RECAP = re.compile(r"localhost +: ok=(\d+) +changed=(\d+) +unreachable=0 +failed=(\d+)")
Types = Callable[..., str]


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's first line has put the collection."""
    home = tmp_path_factory.mktemp("ansible")
    line = "ansible-galaxy collection install ./contrib/ansible"
    assert line in PAGE
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run(line.split(), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / ".ansible/collections"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    with serving(tmp_path) as found:
        disk = tmp_path / "debian.raw"
        disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
        environment = os.environ | {"SF_STATE_DIR": str(tmp_path / "server")}
        push = [ROOT / ".venv/bin/sf", "image", "push", "-q", str(disk), "debian:12"]
        subprocess.run(push, env=environment, check=True, capture_output=True)
        yield found


@pytest.fixture
def types(server: Running, collections: Path, tmp_path: Path) -> Types:
    """Somebody at the server's machine: a line of the shell, and what it said."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/id_ed25519.pub").write_text("ssh-ed25519 AAAA me@here\n")

    def run(line: str, code: int = 0, **more: str) -> str:
        environment = {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "HOME": str(home),
            "ANSIBLE_COLLECTIONS_PATH": str(collections),
            "ANSIBLE_NOCOLOR": "1",
            "SF_TEST_SESSION": os.environ["SF_TEST_SESSION"],
            "SF_STATE_DIR": str(server.services.config.state_dir),
            "SF_API_URL": server.url,
        }
        told = {"cwd": home, "env": environment | more, "capture_output": True, "text": True, "timeout": 200}
        done = subprocess.run(["bash", "-c", line], **told)  # type: ignore[call-overload]
        said: str = done.stdout + done.stderr
        assert done.returncode == code, f"{line}: {done.returncode}\n{said}"
        return done.stdout if code == 0 else said

    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S):
        name = re.match(r"# (\S+)\n", block)
        assert name
        (home / name[1]).write_text(block)
    (home / "golden.qcow2").write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
    return run


def recap(said: str) -> tuple[int, int]:
    """How many tasks went well, and how many of them changed something."""
    found = RECAP.search(said)
    assert found and found[3] == "0", said
    return int(found[1]), int(found[2])


def play(types: Types, *tasks: dict[str, Any], words: str = "", **more: str) -> list[dict[str, Any]]:
    """What became of each task; a failure is one of its results."""
    told = [{"ignore_errors": True, "register": f"r{n}", **task} for n, task in enumerate(tasks)]
    every = "{{ [" + ", ".join(one["register"] for one in told) + "] | to_json }}"
    told += [
        {
            "ansible.builtin.copy": {"dest": "{{ playbook_dir }}/results", "content": every},
            "check_mode": False,
        }
    ]
    body = json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": told}])
    types(f"cat > play.yml <<'END'\n{body}\nEND\nansible-playbook play.yml {words}", **more)
    found: list[dict[str, Any]] = json.loads(types("cat results"))
    return found


def tags(server: Running) -> dict[str, str]:
    """The entity tag of every object, which each change of it changes."""
    every = [f"/{kind}/{one['uuid']}" for kind in ("instances", "networks") for one in server.get(f"/{kind}")]
    return {path: server.call("GET", path).headers["etag"] for path in every}


def test_the_page_about_ansible_is_true_and_a_second_run_changes_nothing(
    server: Running, types: Types
) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()][1:]
    doc, check, first, second, golden, again, graph, host, away = lines
    assert "= name" in types(doc)
    assert recap(types(check)) == (2, 2) and server.get("/instances") == []
    assert recap(types(first)) == (2, 2)
    web = server.get("/instances/web1")
    assert (web["memory"], web["power_state"], web["metadata"]) == (512, "on", {"role": "web"})
    assert web["ssh_key"].startswith("ssh-ed25519") and web["interfaces"][0]["ipv4"].startswith("10.42.0.")
    before = tags(server)
    assert recap(types(second)) == (2, 0) and tags(server) == before
    assert recap(types(golden)) == (2, 2) and recap(types(again)) == (2, 0)
    assert server.get("/instances/third")["disk_spec"][0]["base"] == "sf://upload/system/golden"
    listed = types(graph)
    for group, guests in (
        ("namespace_system", ("third", "web1", "web2")),
        ("network_lan", ("web1", "web2")),
        ("label_role_web", ("web1", "web2")),
        ("role_web", ("web1", "web2")),
        ("on", ("third", "web1", "web2")),
    ):
        assert members(listed, group) == guests
    shown = json.loads(types(host))
    assert shown["ansible_host"] == web["uuid"] and "user_data" not in shown["sf"]
    assert f"sf instance connect {web['uuid']} %p" in shown["ansible_ssh_common_args"]
    assert recap(types(away)) == (3, 3)
    assert server.get("/instances") == server.get("/networks") == []
    assert recap(types(away)) == (3, 0)


def members(graph: str, group: str) -> tuple[str, ...]:
    found = re.search(rf"^  \|--@{group}:\n((?:  \|  \|--.*\n)*)", graph, re.M)
    assert found, (group, graph)
    return tuple(sorted(re.findall(r"--(\S+)", found[1])))


def test_a_guest_is_settled_and_what_belongs_to_its_making_is_said(server: Running, types: Types) -> None:
    server.network()
    server.network("back", "10.43.0.0/24")
    web: dict[str, Any] = {"name": "web", "image": "debian:12", "networks": [{"network": "lan"}]}
    more = {"cpus": 2, "memory": 2048, "disks": [2], "order": 3, "metadata": {"a": 1}}
    plugged = {
        "networks": [{"network": "back", "address": "10.43.0.7"}, {"network": "lan", "publish": ["8080:80"]}]
    }
    wanted: list[tuple[dict[str, Any], list[str] | str]] = [
        ({}, ["create"]),
        (more, ["set cpus, disks, memory, order", "set metadata a"]),
        (more, []),
        (plugged, ["plug into back", "publish 8080:80 on lan"]),
        (plugged, []),
        ({"state": "stopped"}, ["stop"]),
        ({"state": "stopped"}, []),
        ({"state": "started"}, ["start"]),
        ({"disks": [1]}, "grow"),
        ({"ssh_key": "ssh-ed25519 BBBB"}, "was made with something else: ssh_key"),
        ({"ssh_key": "ssh-ed25519 BBBB", "recreate": True}, ["delete", "create"]),
        ({"networks": [{"network": "nowhere"}]}, "no network is called nowhere"),
        ({"image": "debian:13", "recreate": True}, "debian:13"),
        ({"state": "absent"}, []),
    ]
    results = play(types, *({"sf.cloud.instance": {**web, **change}} for change, _ in wanted))
    for (change, expected), result in zip(wanted, results, strict=True):
        if isinstance(expected, str):
            assert result["failed"] and expected in result["msg"], (change, result)
        else:
            assert not result["failed"] and result["changes"] == expected, (change, result)
            assert result["changed"] == bool(expected)
    network = {"name": "lan", "netblock": "10.99.0.0/24"}
    same = {"name": "lan", "netblock": "10.42.0.0/24", "metadata": {"a": "b"}}
    six = {"name": "six", "ipv6": "auto", "slaac": True}
    tasks = [{"sf.cloud.network": one} for one in (network, same, same, six, six)]
    wrong, set_, again, alone, as_it_was = play(types, *tasks)
    assert alone["changed"] and not as_it_was["changed"] and alone["network"]["slaac"]
    assert wrong["failed"] and "netblock is '10.42.0.0/24', not '10.99.0.0/24'" in wrong["msg"]
    assert set_["changed"] and not again["changed"] and set_["network"]["metadata"] == {"a": "b"}


def test_a_tenants_words_are_no_template_and_its_key_sees_its_own_guests(
    server: Running, types: Types, tmp_path: Path
) -> None:
    """What a guest's metadata says would otherwise be evaluated by the administrator's ansible."""
    tenant(server, "shop")
    trap = tmp_path / "trapped"
    evil = f"{{{{ lookup('pipe', 'touch {trap}') }}}}"
    server.instance("web", metadata={"role": evil, evil: "x"}, as_namespace="shop")
    server.instance("web", metadata={"role": "front"})
    types("sed -i '1a all_namespaces: true' lab.sf.yml")
    show = "ansible all -i lab.sf.yml -c local -m debug -a msg={{sf.metadata.role}}"
    said = types(show)
    assert "shop/web | SUCCESS" in said and "system/web | SUCCESS" in said and evil in said
    assert not trap.exists()
    own = {"SF_NAMESPACE": "shop", "SF_KEY": "key-shop"}
    listed = json.loads(types("ansible-inventory -i lab.sf.yml --list", **own))
    assert list(listed["_meta"]["hostvars"]) == ["web"] and listed["namespace_shop"]["hosts"] == ["web"]
    assert "does not take the key" in types("ansible-inventory -i lab.sf.yml --list 2>&1", SF_KEY="wrong")
