"""Real Debian guests in qemu on a machine of tests/net/machines.py, and a shell in them."""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compute.agent.guest import config_drive
from compute.wire.spec import DiskSpec, InstanceSpec, InterfaceSpec
from net.kernel.netns import Netns
from net.plan.facts import HOST
from net.plan.model import Network, Port
from tests.net.machines import Node, Space

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import corpus

_SSH = (
    "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=20"
)


def disk(variant: str) -> Path:
    """Its raw disk, built where nobody built it before: a minute."""
    return corpus(variants=(variant,))[variant]


@dataclass
class Debian:
    """A guest that runs. `key`: the file of the one that its user `debian` takes."""

    qemu: subprocess.Popen[str]
    console: Path
    key: Path

    def said(self) -> str:
        assert self.qemu.poll() is None, self.qemu.communicate()
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def does(self, source: Space, address: object, command: str, *, check: bool = True) -> str:
        """What a shell in it prints, by ssh from another machine."""
        return source.sh(
            f"{_SSH} -i {self.key} debian@{address} sudo sh -s <<'END'\n{command}\nEND",
            check=check,
            timeout_s=200,
        )

    def answers(self, source: Space, address: object) -> bool:
        return "here" in self.does(source, address, "echo here", check=False)


@contextmanager
def debian(
    node: Node, network: Network, port: Port, image: Path, directory: Path, *, user_data: bytes = b""
) -> Iterator[Debian]:
    """Boots at a port of a network that is applied. What it writes on its disk is lost."""
    key, name = directory / f"{port.hostname}.key", port.hostname
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    interface = InterfaceSpec(port.uuid, network.uuid, port.mac, str(port.address))
    public = (key.with_suffix(".key.pub").read_text(),)
    spec = InstanceSpec(
        str(uuid.uuid4()), name, "", 1, 512, (DiskSpec("vda"),), (interface,), public, user_data=user_data
    )
    iso, console = directory / f"{name}.iso", directory / f"{name}.log"
    iso.write_bytes(config_drive.iso(config_drive.files(spec, {network.uuid: network})))
    tap = node.space.call(node.plane.create_tap, port)
    qemu = node.space.popen_quietly(
        f"qemu-system-x86_64 -M q35 -cpu max -m 512 -nodefaults -display none -serial file:{console}"
        f" -drive file={image},if=virtio,format=raw,snapshot=on"
        f" -drive file={iso},if=virtio,format=raw,readonly=on"
        f" -netdev tap,id=n,ifname={tap},script=no,downscript=no"
        f" -device virtio-net-pci,netdev=n,mac={port.mac},host_mtu={network.mtu_bytes}"
    )
    try:
        while not node.space.call(_held, tap):
            assert qemu.poll() is None, qemu.communicate()
            time.sleep(0.05)
        node.space.call(node.plane.adopt_tap, network, port)
        yield Debian(qemu, console, key)
    finally:
        qemu.kill()
        qemu.communicate()


def _held(tap: str) -> bool:
    with Netns(HOST) as host:
        link = host.link(tap)
        return link is not None and link.carrier
