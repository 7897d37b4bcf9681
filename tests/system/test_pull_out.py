"""What `sf image pull` writes, and what it leaves alone."""

import json
import os
import pwd
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.disks.output import target
from tests.ending import killed
from tests.system.test_cli_images import SF, User
from tests.unit.imagestore.images import identical, make_raw

pytestmark = pytest.mark.system
SIZE = 6 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "disk.raw")


@pytest.fixture
def user(tmp_path: Path, disk: Path) -> User:
    user = User(tmp_path)
    user.types("image", "push", disk, "a")
    return user


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A node in a directory of its own, of a loop device a MiB larger than the disk, full of ones."""
    backing, node = tmp_path / "backing", tmp_path / "node"
    backing.write_bytes(b"\xff" * (SIZE + (1 << 20)))
    losetup = ["losetup", "--find", "--show", backing]
    loop = subprocess.run(losetup, capture_output=True, text=True, check=True).stdout.strip()
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, Path(loop).stat().st_rdev)
        yield node
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_block_device_is_written_and_stays_one(user: User, disk: Path, device: Path) -> None:
    """C1"""
    user.types("image", "pull", "a", "-o", device)
    assert device.is_block_device()
    content = device.read_bytes()
    assert content[:SIZE] == disk.read_bytes()
    assert content[SIZE:] == b"\xff" * (1 << 20)


def test_a_link_to_a_device_is_followed(user: User, disk: Path, device: Path) -> None:
    """C1, C2"""
    link = device.with_name("link")
    link.symlink_to(device)
    user.types("image", "pull", "a", "-o", link)
    assert link.is_symlink() and device.read_bytes()[:SIZE] == disk.read_bytes()


def test_a_device_that_is_too_small_is_refused_before_a_byte_of_it_changes(
    user: User, device: Path, tmp_path: Path
) -> None:
    """C1"""
    user.types("image", "push", make_raw(tmp_path / "large.raw", size_bytes=16 << 20), "large")
    assert "bytes, the disk" in user.fails("image", "pull", "large", "-o", device, code=2)
    assert device.read_bytes() == b"\xff" * (SIZE + (1 << 20))


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_disk_that_a_guest_writes_to_is_refused(
    user: User, device: Path, tmp_path: Path, kind: str
) -> None:
    """C1: and a file would be another than the guest's from then on."""
    disk, socket = (device if kind == "device" else tmp_path / "backing"), tmp_path / "nbd"
    with killed(subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", socket, disk])) as guest:
        while not socket.exists():
            time.sleep(0.02)
        assert "in use" in user.fails("image", "pull", "a", "-o", disk, "--as", "raw", code=5)
        guest.terminate()
    assert disk.read_bytes() == b"\xff" * (SIZE + (1 << 20))


def test_what_is_neither_a_file_nor_a_disk_is_refused_and_left(user: User, tmp_path: Path) -> None:
    """C2"""
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(tmp_path / "fifo")
    subprocess.run(["python3", "-c", f"import socket as s; s.socket(s.AF_UNIX).bind('{tmp_path}/socket')"])
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    for name in ("null", "fifo", "socket", "nowhere"):
        before = (tmp_path / name).lstat().st_ino
        assert "cannot write" in user.fails(
            "image", "pull", "a", "-o", tmp_path / name, "--as", "raw", code=2
        )
        assert (tmp_path / name).lstat().st_ino == before
    assert not (tmp_path / "nothing").exists()


def test_a_file_keeps_its_owner_and_mode_and_a_link_its_place(user: User, disk: Path, tmp_path: Path) -> None:
    """C2, C3"""
    kept, link, nobody = tmp_path / "kept.raw", tmp_path / "link.raw", pwd.getpwnam("nobody")
    kept.write_bytes(b"x")
    kept.chmod(0o600)
    os.chown(kept, nobody.pw_uid, nobody.pw_gid)
    link.symlink_to(kept)
    user.types("image", "pull", "a", "-o", link)
    status = kept.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (
        nobody.pw_uid,
        nobody.pw_gid,
        0o600,
    )
    assert link.is_symlink() and kept.read_bytes() == disk.read_bytes()


def test_a_dash_is_the_standard_output(user: User, disk: Path) -> None:
    """C4"""
    argv = [SF, "image", "pull", "a", "-o", "-"]
    done = subprocess.run(argv, env=user.environment, cwd=user.home, capture_output=True, check=True)
    assert done.stdout == disk.read_bytes() and not (user.home / "-").exists()


def test_an_unknown_suffix_is_asked_for(user: User, disk: Path) -> None:
    """C5"""
    assert "--as" in user.fails("image", "pull", "a", "-o", user.home / "x.iso", code=2)
    user.types("image", "pull", "a", "-o", user.home / "x.iso", "--as", "raw")
    assert identical(disk, "raw", user.home / "x.iso", "raw")


def test_an_unfinished_file_that_another_user_put_there_is_not_taken_up(user: User, disk: Path) -> None:
    """F8"""
    digest = json.loads(user.types("image", "show", "a", "--format", "json").stdout)["digest"]
    theirs, nobody = user.home / f".x.raw.{digest[3:19]}.raw", pwd.getpwnam("nobody").pw_uid
    theirs.write_bytes(b"theirs")
    os.chown(theirs, nobody, -1)
    linked = user.home / f".x.raw.{digest[3:19]}.raw.1"
    linked.hardlink_to(disk)
    (user.home / f".x.raw.{digest[3:19]}.raw.2").symlink_to(disk)
    before = disk.read_bytes()
    user.types("image", "pull", "a", "-o", user.home / "x.raw")
    assert (user.home / "x.raw").stat().st_uid == 0
    assert theirs.read_bytes() == b"theirs" and disk.read_bytes() == before


def test_the_name_of_an_unfinished_file_is_nobodys_to_foresee(tmp_path: Path) -> None:
    """F8"""
    with target(tmp_path / "x", "m") as one:
        pass
    (tmp_path / one.beside).unlink()
    with target(tmp_path / "x", "m") as two:
        assert two.beside != one.beside
