"""What a guest that has resumed is given: a program that seeds its kernel, one host key in two forms, its words."""

import base64
import os
import struct
import subprocess
from pathlib import Path

import pytest

from compute.agent import identity


@pytest.mark.skipif(os.geteuid() != 0, reason="a kernel takes random bytes from root alone")
def test_the_program_gives_the_kernel_its_bytes(tmp_path: Path) -> None:
    program = tmp_path / "seed"
    program.write_bytes(identity.seeder(os.urandom(64)))
    program.chmod(0o700)
    assert subprocess.run([program]).returncode == 0
    if (strace := Path("/usr/bin/strace")).exists():
        said = subprocess.run([strace, "-f", program], capture_output=True, text=True).stderr
        assert "RNDADDENTROPY, {entropy_count=512, buf_size=64" in said and said.count(" = 0\n") == 3


def test_no_two_have_a_word_in_common_and_both_forms_are_one_key(tmp_path: Path) -> None:
    one, other = (identity.line("web").split(" ") for _ in range(2))
    assert not set(one[3:]) & set(other[3:]) and one[1] != other[1] and one[2] == "web"
    openssh, dropbear = (base64.b64decode(text) for text in one[5:])
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_bytes(openssh)
    shown = subprocess.run(["ssh-keygen", "-y", "-f", file], check=True, capture_output=True).stdout.split()
    public = base64.b64decode(shown[1])[-32:]
    length = struct.unpack(">I", dropbear[:4])[0]
    assert dropbear[4 : 4 + length] == b"ssh-ed25519" and dropbear[-32:] == public
    assert len(dropbear) == 4 + length + 4 + 64


def test_the_steps_are_a_shell_script() -> None:
    for script in (identity.IDENTITY, identity.NETWORK):
        subprocess.run(["sh", "-n", "-c", script], check=True)
