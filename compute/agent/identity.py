"""How a guest that has resumed as a copy of another becomes itself, by the agent in it (docs/howto/guests.md).

Before it has an interface: clock, random numbers, name, machine-id, boot_id, ssh host keys, what the image renews. What
is secret is made here: the guest's own random numbers are its copies' as well until it has got other ones.
"""

import base64
import secrets
import struct
import time
import uuid

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HOOK = "/etc/sf/renew"
"""The image's own steps: `identity` while nobody can reach it, `network` when its interfaces are there."""
NETWORK = f"exec {HOOK} network"
IDENTITY = f"""set -e; umask 22; read -r now seed name machine boot openssh dropbear; date -s "@$now" >/dev/null
d=$(mktemp -d); echo "$seed" | base64 -d >"$d/seed"; chmod 700 "$d/seed"; "$d/seed"; rm -r "$d"
hostname "$name"; [ ! -e /etc/hostname ] || echo "$name" >/etc/hostname
for f in /etc/machine-id /var/lib/dbus/machine-id; do [ ! -f $f ] || [ -L $f ] || echo "$machine" >$f; done
echo "$boot" >/run/sf-boot-id; mount -o bind /run/sf-boot-id /proc/sys/kernel/random/boot_id
rm -f /etc/ssh/ssh_host_*key* /etc/dropbear/*_host_key /var/lib/systemd/random-seed /var/lib/dhcp/*.leases
key() {{ [ ! -d "${{2%/*}}" ] || (umask 77; echo "$1" | base64 -d >"$2"); }}
key "$openssh" /etc/ssh/ssh_host_ed25519_key; key "$dropbear" /etc/dropbear/dropbear_ed25519_host_key
{HOOK} identity; sync"""

# A kernel takes random bytes at once by ioctl alone, which no shell has; not each has a driver of vmgenid (Debian's of
# the cloud has none). x86-64: opens /dev/urandom, RNDADDENTROPY of what stands behind the code, RNDRESEEDCRNG.
_SEED_BYTES = 64
_CODE = bytes.fromhex(
    "488d3d3500000031f66a02580f0589c389c7be03520840488d152b0000006a10580f0589c589dfbe075200006a10580f05"
    "09e8f7d889c76a3c580f052f6465762f7572616e646f6d00"
)


def seeder(seed: bytes) -> bytes:
    """A program that gives the kernel below it these 64 random bytes; its exit code is 0 if that took them."""
    behind = _CODE + struct.pack("<ii", 8 * _SEED_BYTES, _SEED_BYTES) + seed
    whole, base = 120 + len(behind), 0x400000
    head = struct.pack("<16sHHI3QI6H", b"\x7fELF\2\1\1", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<II6Q", 1, 5, 0, base, base, whole, whole, 4096) + behind


def _host_keys() -> tuple[bytes, bytes]:
    """One key as OpenSSH and as dropbear keep it."""
    key, raw = Ed25519PrivateKey.generate(), form.Encoding.Raw
    secret = key.private_bytes(raw, form.PrivateFormat.Raw, form.NoEncryption())
    public = key.public_key().public_bytes(raw, form.PublicFormat.Raw)
    openssh = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    words = b"ssh-ed25519", secret + public
    return openssh, b"".join(struct.pack(">I", len(word)) + word for word in words)


def line(name: str) -> str:
    """What IDENTITY reads, new each time; nobody in the guest sees it in a list of processes."""
    made = seeder(secrets.token_bytes(_SEED_BYTES)), *_host_keys()
    seed, *keys = (base64.b64encode(data).decode() for data in made)
    return (
        " ".join((f"{time.time():.0f}", seed, name, secrets.token_hex(16), str(uuid.uuid4()), *keys)) + "\n"
    )
