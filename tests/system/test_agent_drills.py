"""`sf serve` stopped and killed at any moment, on a machine of its own: guests go on, nothing is left at the end."""

import contextlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.system.boot_sector import boot_sector
from tests.system.machine import Machine, give_kvm_to_everybody, qemu_as_nobody, within

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """`sf serve` runs, with images sector (halts at once) and a network lan."""
    (tmp_path / "sector.raw").write_bytes(boot_sector("HELLO\r\n"))
    with PrivateHost() as host:
        made = Machine(host, tmp_path, SF_ACCEL="tcg")
        made.sf("image", "push", str(tmp_path / "sector.raw"), "sector:1")
        made.start()
        made.sf("network", "create", "lan", "10.42.0.0/24")
        try:
            yield made
        finally:
            made.signal()


def create(machine: Machine, name: str, image: str = "sector:1", check: bool = True) -> None:
    words = ("--image", image, "--network", "lan", "--memory", "128")
    machine.sf("instance", "create", name, *words, check=check)


def power(machine: Machine, name: str) -> str:
    return str(machine.instance(name)["power_state"])


def qemus(machine: Machine) -> list[str]:
    return machine.host.run(["pgrep", "qemu"], check=False).stdout.split()


def remove_everything(machine: Machine) -> None:
    """Delete all through the command line; then nothing of the installation is to be seen."""
    for one in machine.listed("instance", "ls"):
        machine.sf("instance", "delete", one["uuid"])
    within(120, lambda: not machine.listed("instance", "ls"), "all instances are gone")
    for one in machine.listed("network", "ls"):
        machine.sf("network", "delete", one["uuid"])
    with contextlib.suppress(AssertionError):
        within(60, lambda: not machine.traces(), "no trace")
    assert machine.traces() == []


def test_ctrl_c_and_kill_of_sf_serve_leave_three_guests_running(machine: Machine, tiny_image: Path) -> None:
    machine.sf("image", "push", str(tiny_image), "tiny:1")
    names = ["one", "two", "three"]
    for name in names:
        create(machine, name, "tiny:1")
    for name in names:
        within(120, lambda name=name: machine.ready_line(name), f"{name} is ready")  # type: ignore[misc]
    for name in names:
        found = machine.instance(name)
        address = found["interfaces"][0]["ipv4"]
        assert machine.ready_line(name) == f"SF-GUEST-READY {found['uuid']} {name} {address}"
    before = sorted(qemus(machine))
    assert len(before) == 3
    for number in (signal.SIGINT, signal.SIGKILL):
        machine.signal(number)
        assert sorted(qemus(machine)) == before
        machine.start()
        for name in names:
            within(30, lambda name=name: power(machine, name) == "on", f"{name} is adopted")  # type: ignore[misc]
        assert sorted(qemus(machine)) == before
        pinged = machine.sf("network", "ping", "lan", machine.instance("one")["interfaces"][0]["ipv4"])
        assert " 0% packet loss" in pinged.stdout
    assert "3 guests and their networks go on running" in (machine.home / "serve.log").read_text()
    remove_everything(machine)


def test_interfaces_are_plugged_into_a_running_guest_and_out_again(
    machine: Machine, tiny_image: Path
) -> None:
    machine.sf("image", "push", str(tiny_image), "tiny:1")
    machine.sf("network", "create", "back", "10.43.0.0/24")
    create(machine, "web", "tiny:1")
    within(120, lambda: machine.ready_line("web"), "web is ready")
    (qemu,) = qemus(machine)
    for number in (1, 2):
        machine.sf("instance", "add-interface", "web", "back,address=10.43.0.9")
        within(
            60,
            lambda: machine.sf("network", "ping", "back", "10.43.0.9", check=False).stdout.count(
                " 0% packet loss"
            ),
            f"it answers on the second network, round {number}",
        )
        if number == 1:
            machine.signal()  # the next server knows what was plugged in
            machine.start()
            within(30, lambda: power(machine, "web") == "on", "web is adopted")
        machine.sf("instance", "remove-interface", "web", "10.43.0.9")
        within(60, lambda: len(machine.instance("web")["interfaces"]) == 1, "it is taken out")
        plugged = ("domiflist", machine.instance("web")["uuid"])
        within(60, lambda: machine.host.virsh(*plugged).stdout.count("ethernet") == 1, "the guest has let go")  # noqa: B023
    assert qemus(machine) == [qemu]
    remove_everything(machine)


def test_a_guest_that_ended_by_itself_stays_off_until_somebody_powers_it_on(
    machine: Machine, tiny_image: Path
) -> None:
    machine.sf("image", "push", str(tiny_image), "tiny:1")
    script = machine.home / "halt"
    script.write_text("#!/bin/sh\n[ -e /run/stay ] || poweroff\n")
    words = ("--image", "tiny:1", "--network", "lan", "--memory", "128", "--user-data", str(script))
    machine.sf("instance", "create", "brief", *words)
    within(120, lambda: machine.ready_line("brief"), "brief is ready")
    within(60, lambda: power(machine, "brief") == "off", "it powered itself off")
    assert "powered itself off" in machine.instance("brief")["error_message"]
    machine.signal()
    machine.start()
    within(30, lambda: machine.instance("brief")["state"] == "created", "it is known again")
    assert (power(machine, "brief"), qemus(machine)) == ("off", [])
    machine.sf("instance", "start", "brief")
    within(60, lambda: power(machine, "brief") == "on", "it is on")
    remove_everything(machine)


def test_a_qemu_that_is_not_root_boots_from_the_image_service_too(tmp_path: Path, tiny_image: Path) -> None:
    """As on Debian and Ubuntu: exports, overlays and config drive are for qemu's user, and for nobody else."""
    home = Path(tempfile.mkdtemp(prefix="sf-", dir="/var/tmp"))
    home.chmod(0o711)
    with PrivateHost(settings=qemu_as_nobody(), libvirtd=False) as host, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        give_kvm_to_everybody(host)
        host.start_libvirtd()
        machine = Machine(host, home, SF_ACCEL="tcg")
        machine.start()
        stack.callback(machine.signal)
        machine.sf("image", "push", str(tiny_image), "tiny:1")
        machine.sf("network", "create", "lan", "10.42.0.0/24")
        create(machine, "web", "tiny:1")
        within(150, lambda: machine.ready_line("web"), "web is ready")
        mine = [path for path in (machine.state / "instances").rglob("*") if path.is_file()]
        assert mine and not [path for path in mine if path.stat().st_mode & 0o077]
        remove_everything(machine)


@pytest.mark.drill
def test_a_create_cut_off_by_kill_9_at_any_moment_ends_created_or_in_an_error_with_its_reason(
    machine: Machine,
) -> None:
    rng = random.Random(drills.seed())
    create(machine, "witness")
    within(60, lambda: power(machine, "witness") == "on", "the witness runs")
    (witness,) = qemus(machine)
    for number in range(drills.rounds(full=50)):
        name = f"half-{number}"
        create(machine, name)
        time.sleep(rng.uniform(0, 1.5))
        machine.signal()
        assert witness in qemus(machine)
        machine.start()
        within(60, lambda name=name: machine.instance(name)["state"] in ("created", "error"), name)  # type: ignore[misc]
        found = machine.instance(name)
        if found["state"] == "error":
            assert found["error_message"]
        else:
            within(60, lambda name=name: power(machine, name) == "on", f"{name} runs")  # type: ignore[misc]
        machine.sf("instance", "delete", name)
    remove_everything(machine)


@pytest.mark.drill
def test_a_delete_cut_off_by_kill_9_at_any_moment_is_finished_by_the_next_server(machine: Machine) -> None:
    rng = random.Random(drills.seed() + 1)
    create(machine, "witness")
    for number in range(drills.rounds(full=50)):
        name = f"gone-{number}"
        create(machine, name)
        within(60, lambda name=name: power(machine, name) == "on", f"{name} runs")  # type: ignore[misc]
        machine.sf("instance", "delete", name)
        time.sleep(rng.uniform(0, 0.6))
        machine.signal()
        assert power_of_witness(machine)
        machine.start()
        left = [one["name"] for one in machine.listed("instance", "ls")]
        within(
            60,
            lambda name=name: name not in [one["name"] for one in machine.listed("instance", "ls")],  # type: ignore[misc]
            f"{name} is gone (after the kill: {left})",
        )
    remove_everything(machine)


def power_of_witness(machine: Machine) -> bool:
    """A guest that nobody asked to go is still there."""
    return len(qemus(machine)) >= 1
