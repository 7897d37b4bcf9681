"""docs/howto/operate.md, "Three machines", typed: servers that are nodes, in namespaces, and a laptop elsewhere."""

import json
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.drills import everything
from tests.system.laptop import Laptop
from tests.system.machine import ROOT, within
from tests.system.three import NAMES, Three

pytest.importorskip("etcd3gw")
pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def told() -> tuple[str, list[str]]:
    """What the page has a person write into config.toml, and type."""
    text = (
        (ROOT / "docs/howto/operate.md").read_text().partition("### Three machines")[2].partition("\n## ")[0]
    )
    config = "".join(re.findall(r"(?:^    .*\n)+", text, re.M)[:1]).replace("    ", "")
    typed = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    return config, typed


def test_three_machines_are_one_cloud_and_a_laptop_knows_all_of_them(tmp_path: Path) -> None:
    config, typed = told()
    assert "agent_listen" in config and typed[1] == "sf node ls" and typed[2].startswith("sf login https://")
    with ExitStack() as stack:
        three = Three(stack, tmp_path, config)
        for machine in three.nodes.values():
            assert {n["name"]: n["state"] for n in machine.listed("node", "ls")} == dict.fromkeys(
                NAMES, "created"
            )
        laptop = Laptop(three.world, tmp_path / "laptop")
        laptop.home.mkdir()
        key = three.key.encode()
        log = (three.nodes["n2"].home / "serve.log").read_text()
        (fingerprint,) = set(re.findall(r"--fingerprint (b3:[0-9a-f]{64})", log))
        laptop.run(*typed[2].replace("b3:…", fingerprint).split(), given=key + b"\n")
        shown = laptop.run(*typed[3].split(), "--format", "json").stdout.decode()
        assert all(f"https://10.77.0.{name[1]}:13000" in shown for name in NAMES), shown
        laptop.sf("network", "create", "lan", "10.42.0.0/24")
        usage = lambda: json.loads(laptop.sf("node", "show", "n3", "--format", "json"))["usage"]  # noqa: E731
        within(90, usage, "the first server asks the third's agent")
        logs = [(machine.home / "serve.log").read_text() for machine in three.nodes.values()]
        for name in ("installation.json", "auth/ca.key", "auth/ca.crt", "auth/agent.key", "auth/local-key"):
            (one,) = {(machine.state / name).read_text() for machine in three.nodes.values()}
            assert name == "installation.json" or not any(one.strip() in log for log in logs), name
        if not everything():
            return
        three.kill("link", "n1")  # the first that the laptop would ask
        assert "lan" in laptop.sf("network", "ls")
        laptop.sf("network", "create", "other", "10.43.0.0/24")
        states = lambda: laptop.sf("node", "ls", "--format", "json")  # noqa: E731
        within(90, lambda: '"missing"' in states(), "its node is missing")
        three.mend("link", "n1")
        within(90, lambda: states().count('"created"') == 3, "it is back")
        three.kill("server", "n2")
        subprocess.run(
            three.nodes["n2"].host.inside(["rm", "-rf", str(three.nodes["n2"].state / "auth")]), check=True
        )
        three.mend("server", "n2")  # what makes the installation comes back out of the state
        within(90, lambda: states().count('"created"') == 3, "the same node")


@pytest.mark.skipif(not everything(), reason="scripts/test --all")
def test_guests_of_three_servers_outlive_each_of_them_and_are_reached_by_all(tmp_path: Path) -> None:
    with ExitStack() as stack:
        three = Three(stack, tmp_path, told()[0], libvirtd=True)
        one, two, three_ = three.nodes.values()
        one.sf("network", "create", "lan", "10.42.0.0/24")
        for maker, node in ((one, "n3"), (two, "n1"), (three_, "n2")):
            words = ("--image", "tiny:1", "--network", "lan", "--memory", "64", "--on", node)
            maker.sf("instance", "create", f"on-{node}", *words)
        for machine in three.nodes.values():
            for node in NAMES:
                ready = lambda m=machine, n=f"on-{node}": m.ready_line(n)  # noqa: E731
                within(150, ready, f"on-{node} is seen")
        three.kill("server", "n2")
        three.kill("member", "n1")
        assert two.host.virsh("list", "--name").stdout.split(), "it runs on"
        within(90, lambda: one.ready_line("on-n3"), "the others answer")
        three.mend("member", "n1")
        three.mend("server", "n2")
        within(90, lambda: one.ready_line("on-n2"), "its agent has found it")
        three_.sf("instance", "delete", "on-n1", "on-n2", "on-n3")
        left = lambda: [t for m in three.nodes.values() for t in m.traces() if t.startswith("domain ")]  # noqa: E731
        within(90, lambda: not left(), "no guest is left")
