"""Guests' names in the project's own Debian image, whose resolver (systemd-resolved) keeps .local for mDNS."""

import sys
import time
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv6Network
from pathlib import Path

import pytest

from compute.agent.guest import config_drive
from compute.wire.spec import DiskSpec, InstanceSpec, InterfaceSpec
from net.ipam import UNKNOWN
from tests import drills
from tests.net.machines import Cluster, make_network, make_port

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import corpus

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.skipif(not drills.everything(), reason="four minutes of emulation: scripts/test --all"),
]
ASK = b"""#cloud-config
runcmd:
- 'for n in 1 2 3 4 5 6 7 8 9; do ping -c 1 -W 5 %s && break; sleep 10; done >/dev/null && echo %s is there >/dev/ttyS0'
- echo asked >/dev/ttyS0
"""


@pytest.mark.timeout(1500)  # two boots of systemd in emulation at once
@pytest.mark.parametrize("alone", [False, True], ids=["IPv4", "IPv6 alone"])
def test_two_debian_guests_ping_each_other_by_their_bare_names(tmp_path: Path, alone: bool) -> None:
    """I: names under .local did not resolve in Debian. By IPv6 alone db is told nothing: networkd asks by DHCPv6."""
    disk = corpus(variants=("A",))["A"]
    ports = [replace(make_port(number, "n1"), hostname=name) for number, name in ((2, "web"), (3, "db"))]
    network = make_network(*ports)
    if alone:
        ports = [replace(port, address=UNKNOWN[n]) for n, port in enumerate(ports, 2)]
        six = {"netblock": UNKNOWN, "gateway": UNKNOWN[1], "netblock6": IPv6Network("fd42:1:2:3::/64")}
        network = replace(network, ports=tuple(ports), **six)
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        desired = cluster.apply(network)
        running = []
        try:
            for port, other in zip(ports, reversed(ports), strict=True):
                interface = InterfaceSpec(port.uuid, network.uuid, port.mac, str(port.address))
                untold = alone and port.hostname == "db"  # then networkd takes no search domain either
                name = f"{other.hostname}.{network.domain}" if untold else other.hostname
                user_data = ASK.replace(b"%s is", b"%s is" % other.hostname.encode()).replace(
                    b"%s", name.encode()
                )
                spec = InstanceSpec(
                    f"6b1f9d1e-7a77-4f0e-9a54-0f6a5f0e2f{port.address.packed[3]:02x}", port.hostname, "", 1, 512,
                    (DiskSpec("vda"),), (interface,), user_data=user_data,
                )  # fmt: skip
                iso, console = tmp_path / f"{port.hostname}.iso", tmp_path / f"{port.hostname}.log"
                files = config_drive.files(spec, {network.uuid: network})
                kept = {path: data for path, data in files.items() if not (untold and "network" in path)}
                iso.write_bytes(config_drive.iso(kept))
                tap = node.space.call(node.plane.create_tap, port)
                qemu = node.space.popen_quietly(
                    f"qemu-system-x86_64 -M q35 -cpu max -m 512 -nodefaults -display none -serial file:{console}"
                    f" -drive file={disk},if=virtio,format=raw,snapshot=on"
                    f" -drive file={iso},if=virtio,format=raw,readonly=on"
                    f" -netdev tap,id=n,ifname={tap},script=no,downscript=no"
                    f" -device virtio-net-pci,netdev=n,mac={port.mac}"
                )
                running.append((qemu, console, other.hostname))
            time.sleep(2)  # until qemu holds the taps, which the plan then brings home
            node.apply(desired)
            said = {}
            while len(said) < 2:
                for qemu, console, other in running:
                    assert qemu.poll() is None, qemu.communicate()
                    with suppress(FileNotFoundError):
                        text = console.read_text(errors="replace")
                        if "asked" in text:
                            said[other] = f"{other} is there" in text
                time.sleep(1)
            assert said == {"web": True, "db": True}
        finally:
            for qemu, _, _ in running:
                qemu.kill()
                qemu.communicate()
