"""A machine that goes down and comes back: its guests end in order before it does, and start in order after it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.system.boot_sector import boot_sector
from tests.system.machine import ROOT, Machine, within

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with PrivateHost() as host:
        made = Machine(host, tmp_path, SF_ACCEL="tcg", SF_STOP_LIMIT="2s")
        made.start()
        yield made
        made.signal(signal.SIGINT)


def goes_down(machine: Machine) -> list[str]:
    """As systemd does it: the server, then sf-guests.service, then the rest at once. What was said of the guests."""
    machine.signal(signal.SIGINT)
    ended = subprocess.run(
        machine.argv(sys.executable, str(ROOT / "debian/sf-guests")), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    machine.host.stop()
    return ended.stdout.splitlines()


def comes_back(machine: Machine) -> None:
    machine.host.start()
    machine.start()


def power(machine: Machine) -> dict[str, str]:
    return {one["name"]: one["power_state"] for one in machine.listed("instance", "ls")}


def started(machine: Machine, name: str) -> float:
    """When it was started last."""
    events = machine.listed("instance", "events", name)
    return max(float(e["timestamp"]) for e in events if e["message"] == "started")


def test_guests_end_and_start_in_their_order_and_autostart_decides_which(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "sector.raw").write_bytes(boot_sector("HELLO\r\n"))
    machine.sf("image", "push", str(tmp_path / "sector.raw"), "sector:1")
    for name in ("web", "db", "never", "always", "off"):
        machine.sf("instance", "create", name, "--image", "sector:1", "--memory", "32", "--wait", "created")
    machine.sf("instance", "stop", "always", "off")
    machine.sf("instance", "set", "db", "--order", "1", "--delay", "2s")
    machine.sf("instance", "set", "web", "--order", "2")
    machine.sf("instance", "set", "never", "--autostart", "no")
    machine.sf("instance", "set", "always", "--autostart", "yes", "--order", "3")
    assert machine.sf("instance", "set", "web", "--order", "10", check=False).returncode == 2
    assert machine.instance("db")["delay_s"] == 2
    within(30, lambda: power(machine)["always"] == "off", "it is off")

    said = goes_down(machine)  # a boot sector does not hear the power button
    cut = [line for line in said if line.endswith("was cut off")]
    assert cut == ["system/web was cut off", "system/db was cut off", "system/never was cut off"]
    assert {*said} - {*cut} == {"system/always is off", "system/off is off"}

    comes_back(machine)
    wanted = {"web": "on", "db": "on", "never": "off", "always": "on", "off": "off"}
    within(120, lambda: power(machine) == wanted, f"{wanted}")
    assert started(machine, "db") + 2 <= started(machine, "web") <= started(machine, "always")

    machine.signal(signal.SIGINT)  # the machine stays up this time
    machine.start()
    assert power(machine) == wanted
    assert "ended" not in machine.sf("instance", "events", "web").stdout
