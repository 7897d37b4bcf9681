"""What a guest that has resumed is told, and what it makes of that: files of its own, on the kernel that is here."""

import base64
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from compute.agent import identity

SOURCE = Path(identity.__file__).with_suffix(".S")
# Of what it writes nothing is this machine's but the kernel's random numbers: it may not set the time.
_TIMELESS = "setpriv", "--bounding-set=-sys_time"
_GUEST = f"""set -e
for at in /etc /run /var/lib; do mount -t tmpfs tmpfs $at; done
mkdir -p /etc/sf /etc/ssh /etc/dropbear /var/lib/dhcp; cp hook /etc/sf/renew; chmod 700 /etc/sf/renew
for f in hostname machine-id ssh/ssh_host_rsa_key dropbear/dropbear_rsa_host_key; do echo old >/etc/$f; done
: >said; mount --bind said /dev/console
sh -c "$1" <program
cat told >{identity._TOLD}
until [ -s {identity._DONE} ]; do sleep 0.01; done
cp {identity._DONE} done; cp -r /etc/ssh /etc/dropbear /etc/hostname /etc/machine-id .
hostname >uts; cat /proc/sys/kernel/random/boot_id >boot
"""


def become(at: Path, told: bytes, hook: str) -> str:
    """How a guest that is told this ends, in a directory of its own: its files are there afterwards."""
    at.mkdir()
    (at / "program").write_bytes(identity.program())
    (at / "told").write_bytes(told)
    prepared = '[ "$1" != warm ] || exec touch /etc/sf/prepared; [ -e /etc/sf/prepared ] || exit 9'
    (at / "hook").write_text(f"#!/bin/sh\n{prepared}\n{hook}\n")
    script = identity.PREPARE.replace("; sleep 1", "")
    subprocess.run(
        ["unshare", "-mu", *_TIMELESS, "sh", "-c", _GUEST, "sh", script], cwd=at, check=True, timeout=30
    )
    return (at / "done").read_text()


@pytest.mark.skipif(not shutil.which("as"), reason="nothing assembles here")
def test_what_waits_is_made_of_its_source(tmp_path: Path) -> None:
    made, code = tmp_path / "o", tmp_path / "code"
    subprocess.run(["as", SOURCE, "-o", made], check=True)
    subprocess.run(["objcopy", "-O", "binary", made, code], check=True)
    assert code.read_bytes() == identity._CODE


@pytest.mark.skipif(os.geteuid() != 0, reason="a kernel takes random bytes from root alone")
def test_two_of_one_state_have_nothing_in_common_and_both_forms_are_one_key(tmp_path: Path) -> None:
    parts = (
        "hostname",
        "machine-id",
        "boot",
        "ssh/ssh_host_ed25519_key",
        "dropbear/dropbear_ed25519_host_key",
    )
    for name in ("web", "db"):
        told = identity.told(name, f"uuid {name}\nname {name}\n")
        assert become(tmp_path / name, told, "while read -r line; do echo $line; done") == "0\n"
    one, other = ([(tmp_path / name / part).read_bytes() for part in parts] for name in ("web", "db"))
    assert all(mine != its and mine != b"old\n" for mine, its in zip(one, other, strict=True))
    for name in ("web", "db"):
        at = tmp_path / name
        assert (at / "said").read_text() == f"uuid {name}\nname {name}\n"
        assert (at / "uts").read_text() == f"{name}\n" and len(list((at / "ssh").iterdir())) == 1
        key = at / "ssh/ssh_host_ed25519_key"
        assert key.stat().st_mode & 0o777 == 0o600
        shown = subprocess.run(["ssh-keygen", "-y", "-f", key], check=True, capture_output=True, text=True)
        dropbear = (at / "dropbear/dropbear_ed25519_host_key").read_bytes()
        kind, secret = (dropbear[4:15], dropbear[19:]) if len(dropbear) == 83 else (b"", b"")
        assert kind == b"ssh-ed25519" and struct.unpack(">I", dropbear[15:19]) == (64,)
        assert base64.b64decode(shown.stdout.split()[1]).endswith(secret[32:])


@pytest.mark.skipif(os.geteuid() != 0, reason="a kernel takes random bytes from root alone")
def test_what_fails_is_said(tmp_path: Path) -> None:
    told = identity.told("web", "x\n")
    assert become(tmp_path / "hook", told, "read -r line; exit 3") == "3\n"
    assert (
        become(tmp_path / "half", told[: told.index(b"OPENSSH")], "while read -r line; do :; done") == "1\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a kernel takes random bytes from root alone")
def test_the_kernel_takes_the_bytes_at_once(tmp_path: Path) -> None:
    if not (strace := shutil.which("strace")):
        pytest.skip("no strace")
    fifo, program, told = tmp_path / "fifo", tmp_path / "program", identity.told("web", "x\n")
    os.mkfifo(fifo)
    program.write_bytes(identity.program(str(fifo)))
    program.chmod(0o700)
    waits = subprocess.Popen(
        [*_TIMELESS, strace, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    fifo.write_bytes(b"")  # somebody looks whether it waits
    fifo.write_bytes(told)
    lines, calls = waits.communicate(timeout=30)
    assert lines.startswith("web\n") and lines.endswith("\nx\n") and waits.returncode == 0
    assert (
        "RNDADDENTROPY, {entropy_count=512, buf_size=64" in calls
        and "clock_settime(CLOCK_REALTIME, {" in calls
    )
