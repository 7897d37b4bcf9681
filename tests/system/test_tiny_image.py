"""The tiny guest, booted by a plain QEMU under software emulation, with config drives made here by hand."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pycdlib
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.packages import fetch, place, unpack

from tests import drills

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
UUID = "7b0b2a3e-62c6-4a5c-9f0e-0d2d6b1f4a11"
MAC = "02:00:5e:10:00:07"


def config_drive(path: Path, network: dict[str, Any] | None, user_data: str = "", **meta: Any) -> Path:
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident="config-2", rock_ridge="1.09", joliet=3)
    for name in ("/OPENSTAC", "/OPENSTAC/LATEST"):
        rock = "openstack" if name == "/OPENSTAC" else "latest"
        iso.add_directory(name, rr_name=rock, joliet_path=name.lower().replace("openstac", "openstack"))
    documents = {
        "meta_data.json": json.dumps({"uuid": UUID, "name": "web", "hostname": "web", **meta}, indent=1)
    }
    if network is not None:
        documents["network_data.json"] = json.dumps(network)
    if user_data:
        documents["user_data"] = user_data
    for number, (name, text) in enumerate(documents.items()):
        data = text.encode()
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            f"/OPENSTAC/LATEST/F{number}.;1",
            rr_name=name,
            joliet_path=f"/openstack/latest/{name}",
        )
    iso.write(str(path))
    iso.close()
    return path


class Guest:
    """A running QEMU, its serial console as text that grows, and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], console: Path, monitor: Path, serial: Path) -> None:
        self.process, self._console, self._monitor, self._serial = process, console, monitor, serial

    def text(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = re.search(pattern, self.text())
            if found:
                return found
            assert self.process.poll() is None, f"the guest is gone:\n{self.text()[-2000:]}"
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} never came; the console:\n{self.text()[-2000:]}")

    def type(self, line: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._serial))
            connection.sendall(line.encode() + b"\n")
            time.sleep(0.5)

    def power_button(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._monitor))
            connection.sendall(b"system_powerdown\n")
            time.sleep(0.5)


@contextmanager
def running(directory: Path, image: Path, drive: Path, network: str, bus: str = "virtio") -> Iterator[Guest]:
    disk = directory / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", disk], check=True
    )
    console, monitor, serial = directory / "console.log", directory / "monitor", directory / "serial"
    cd = {
        "virtio": ["-drive", f"file={drive},format=raw,if=virtio,readonly=on"],
        "scsi": ["-device", "virtio-scsi-pci", "-drive", f"file={drive},format=raw,if=none,id=cd,readonly=on"]
        + ["-device", "scsi-cd,drive=cd"],
    }[bus]
    process = subprocess.Popen(
        [
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-m",
            "256",
            "-nodefaults",
            "-display",
            "none",
        ]
        + ["-drive", f"file={disk},format=qcow2,if=virtio", *cd]
        + ["-netdev", f"user,id=n,{network}", "-device", f"virtio-net-pci,netdev=n,mac={MAC}"]
        + [
            "-chardev",
            f"socket,id=s,path={serial},server=on,wait=off,logfile={console}",
            "-serial",
            "chardev:s",
        ]
        + ["-monitor", f"unix:{monitor},server=on,wait=off"],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield Guest(process, console, monitor, serial)
    finally:
        process.kill()
        process.wait()


def network_data(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "links": [{"id": "tap0", "type": "phy", "ethernet_mac_address": MAC.upper(), "mtu": 1380}],
        "networks": [{"id": "network0", "type": kind, "link": "tap0", "network_id": "x", **more}],
        "services": [{"type": "dns", "address": "10.42.0.3"}],
    }


def test_it_takes_name_address_mtu_and_key_from_the_config_drive_by_dhcp_and_powers_off(
    tmp_path: Path, tiny_image: Path
) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    drive = config_drive(
        tmp_path / "drive.iso",
        network_data("ipv4_dhcp"),
        public_keys={"mine": key.with_suffix(".pub").read_text()},
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    network = f"net=10.42.0.0/24,dhcpstart=10.42.0.77,hostfwd=tcp:127.0.0.1:{port}-:22"
    with running(tmp_path, tiny_image, drive, network) as guest:
        guest.wait_for(rf"SF-GUEST-READY {UUID} web 10\.42\.0\.77\b")
        command = ["ssh", "-q", "-i", str(key), "-p", str(port), "-o", "StrictHostKeyChecking=no"]
        command += ["-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "debian@127.0.0.1"]
        seen = subprocess.run(
            [*command, "hostname; cat /sys/class/net/eth0/mtu; ip route"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert seen.stdout.split()[:2] == ["web", "1380"], seen
        assert "default via 10.42.0.2" in seen.stdout
        guest.power_button()
        assert guest.process.wait(timeout=60) == 0


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_it_takes_a_static_address_with_routes_and_resolvers_and_gives_a_shell_on_the_console(
    tmp_path: Path, tiny_image: Path, bus: str
) -> None:
    routes = [
        {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.42.0.1"},
        {"network": "192.0.2.0", "netmask": "255.255.255.128", "gateway": "10.42.0.9"},
    ]
    drive = config_drive(
        tmp_path / "drive.iso",
        network_data(
            "ipv4",
            ip_address="10.42.0.5",
            netmask="255.255.255.0",
            routes=routes,
            dns_nameservers=["192.0.2.53"],
        ),
        user_data="#!/bin/sh\necho 0200000000010200000000028899 | rawsend eth0\nping -c 1 -w 5 10.42.0.2\n",
        hostname="web.example.org",
    )
    with running(tmp_path, tiny_image, drive, "net=10.42.0.0/24", bus) as guest:
        guest.wait_for(rf"SF-GUEST-READY {UUID} web 10\.42\.0\.5\b")
        guest.wait_for(r"rawsend: 1 frames sent")
        guest.wait_for(r"1 packets received")
        guest.wait_for(r"SF-GUEST-USER-DATA-DONE 0")
        guest.type("ip route; cat /etc/resolv.conf; echo mtu $(cat /sys/class/net/eth0/mtu)")
        guest.wait_for(r"mtu 1380")
        text = guest.text()
        assert "default via 10.42.0.1 dev eth0" in text
        assert "192.0.2.0/25 via 10.42.0.9 dev eth0" in text
        assert "nameserver 10.42.0.3" in text
        assert "nameserver 192.0.2.53" in text


@pytest.mark.drill
@pytest.mark.skipif(not drills.everything(), reason="builds it again: scripts/test --all")
def test_it_is_small_and_the_same_bytes_each_time(tmp_path: Path, tiny_image: Path) -> None:
    assert tiny_image.stat().st_size <= 64 << 20
    again = subprocess.run(
        [ROOT / "scripts/build-image", "tiny", "--cached"],
        env=os.environ | {"SF_BUILD_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert again.returncode == 0, again.stderr
    compared = subprocess.run(
        ["qemu-img", "compare", tiny_image, again.stdout.strip()], capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout


DOCUMENTS: list[Any] = [
    {"a": [{"b": "c"}, 1, -2.5e3, True, None, [], {}], "": {"x y": "z"}},
    {
        "quote": 'say "hi"',
        "back": "a\\b",
        "line": "one\ntwo\tthree",
        "unicode": "Grüße \U0001f600",
        "slash": "a/b",
    },
    [],
    "just text",
]


def flattened(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = {f"{path}#": str(len(value))}
        for key, inner in items:
            found |= flattened(inner, f"{path}{key}/")
        return found
    if isinstance(value, str):
        text = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    else:
        text = "" if value is None else json.dumps(value)
    return {path.removesuffix("/"): text}


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The very program that runs in the guest."""
    directory = tmp_path_factory.mktemp("busybox")
    unpack(fetch(["busybox-static"], directory / "packages"), directory)
    return place(directory, "bin/busybox")


def parsed(busybox: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts/guest_images/tiny/json.awk"
    return subprocess.run([busybox, "awk", "-f", script], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_guests_json_reader_agrees_with_python(
    document: Any, indent: int | None, ascii_only: bool, busybox: Path
) -> None:
    done = parsed(busybox, json.dumps(document, indent=indent, ensure_ascii=ascii_only))
    assert done.returncode == 0, done.stderr
    assert dict(line.split("\t", 1) for line in done.stdout.splitlines()) == flattened(document)


@pytest.mark.parametrize("text", ['{"a": 1', '{"a" 1}', '["a" "b"]', '{"a": "b}', "[1,]", "{} x", ""])
def test_the_guests_json_reader_refuses_what_is_no_json(text: str, busybox: Path) -> None:
    assert parsed(busybox, text).returncode != 0
