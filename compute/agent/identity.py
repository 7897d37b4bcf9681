"""How a guest that has resumed as a copy of another becomes itself, by the agent in it (docs/howto/guests.md).

Before its memory is kept all of that is begun in it, and waits to be told what it is: nothing need be started then, and
starting is what costs. What is secret is made here: the guest's own random numbers are its copies' as well until it has
got other ones.
"""

import secrets
import struct
import time
import uuid
from collections.abc import AsyncIterator, Mapping

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compute.agent.guest import config_drive
from compute.agent.guest.channel import Channel
from compute.agent.hypervisor.libvirt import Hypervisor, Refused
from compute.wire.spec import InstanceSpec
from net import Network

_HANDLES = 1000, 1001  # of _TOLD and _DONE: so an agent counts what it opens
_HOOK, _PROGRAM, _TOLD, _DONE = (f"/etc/sf/{name}" for name in ("renew", "wait", "told", "done"))
PREPARE = f"""set -e; umask 22; {_HOOK} warm </dev/null
cat >{_PROGRAM}; chmod 700 {_PROGRAM}; : >{_DONE}; rm -f {_TOLD}; mkfifo -m 600 {_TOLD}
rm -f /etc/ssh/ssh_host_*key* /etc/dropbear/*_host_key /var/lib/systemd/random-seed /var/lib/dhcp/*.leases
: >/run/sf-boot-id; mount -o bind /run/sf-boot-id /proc/sys/kernel/random/boot_id
(set +e; {_PROGRAM} | {{
set -e; read -r name; read -r machine; read -r boot; read -r openssh; read -r dropbear
echo "$name" >/proc/sys/kernel/hostname; [ ! -e /etc/hostname ] || echo "$name" >/etc/hostname
for f in /etc/machine-id /var/lib/dbus/machine-id; do [ ! -f $f ] || [ -L $f ] || echo "$machine" >$f; done
umask 77; [ ! -d /etc/ssh ] || printf %b "$openssh" >/etc/ssh/ssh_host_ed25519_key
[ ! -d /etc/dropbear ] || printf %b "$dropbear" >/etc/dropbear/dropbear_ed25519_host_key
echo "$boot" >/run/sf-boot-id; while read -r line; do echo "$line"; done; }} | {_HOOK}
r=$?; [ -s /run/sf-boot-id ] || r=1; sync; echo $r >{_DONE}; rm -f {_PROGRAM} {_TOLD}) </dev/null >/dev/console 2>&1 &
: >{_TOLD}; sleep 1"""

# A kernel takes random bytes at once by ioctl alone, which no shell has; not each has a driver of vmgenid (Debian's of
# the cloud has none). identity.S is what this is made of.
_CODE = bytes.fromhex(
    "b802000000488d3dab00000031f60f054189c4bb0010400031c04489e74889deba000008000f054885c07875488d1c0375e6"
    "4881eb0010400074c5b8e300000031ffbe001040000f05b802000000488d3d55000000be010000000f054189c4b810000000"
    "4489e7be03520840ba101040000f0585c0782ab8100000004489e7be075200000f0585c07817b801000000bf01000000be58"
    "104000488d53a80f0531c089c7b83c0000000f052f6465762f7572616e646f6d00"
)
_BASE, _ROOM = 0x400000, 1 << 20


def program(fifo: str = _TOLD) -> bytes:
    """What waits until it is told; then it sets clock and random numbers, and hands on the lines."""
    code = _CODE + fifo.encode() + b"\0"
    head = struct.pack("<16sHHI3QI6H", b"\x7fELF\2\1\1", 2, 62, 1, _BASE + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<II6Q", 1, 7, 0, _BASE, _BASE, 120 + len(code), _ROOM, 4096) + code


def told(name: str, lines: str) -> bytes:
    """What it is told, new each time: the time, random numbers, what PREPARE reads, lines for the image's own steps."""
    head = struct.pack("<qqii64s", *divmod(time.time_ns(), 10**9), 8 * 64, 64, secrets.token_bytes(64))
    key = Ed25519PrivateKey.generate()
    openssh = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    words = b"ssh-ed25519", key.private_bytes_raw() + key.public_key().public_bytes_raw()
    dropbear = b"".join(struct.pack(">I", len(word)) + word for word in words)
    keys = openssh.decode().replace("\n", r"\n"), "".join(rf"\0{byte:03o}" for byte in dropbear)
    return head + "\n".join((name, secrets.token_hex(16), str(uuid.uuid4()), *keys, lines)).encode()


async def prepare(hypervisor: Hypervisor, uuid: str) -> None:
    """Have all of that wait. Raises Refused, Unavailable, Conflict when it is off."""
    channel = Channel(hypervisor, uuid)
    code, _, errors = await channel.run(PREPARE, stdin=program())
    if code:
        raise Refused(f"it cannot wait to be another: {errors[-200:].decode(errors='replace')}")
    # To open them costs a guest so much that it is done before.
    if (await channel.open(_TOLD, "w"), await channel.open(_DONE, "r")) != _HANDLES:
        raise Refused("its agent has opened files before: it is not as it was when it had just booted")


async def renew(hypervisor: Hypervisor, spec: InstanceSpec, networks: Mapping[str, Network]) -> None:
    """Make it itself, while it has no link. Raises Refused, Unavailable, Conflict when it is off."""

    async def whole() -> AsyncIterator[bytes]:
        yield told(spec.name, config_drive.lines(spec, networks))

    channel = Channel(hypervisor, spec.uuid)
    await channel.write(_HANDLES[0], whole())
    if (code := await channel.read(_HANDLES[1])) != b"0\n":
        raise Refused(f"{_HOOK} ended with {code[:20].decode(errors='replace').strip()}: see its console")
