"""The two ways of docs/howto/backup.md to keep a store that nobody reads who has only the disk or the bucket."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from compute.cluster.state.sqlite import SqliteStore
from tests import servers

SECRET = os.urandom(4096)  # no compression hides it

# In a mount namespace of its own, an ext4 with encryption (linux/fscrypt.h): policy version 2 on one directory.
FSCRYPT = """
import fcntl, os, struct, subprocess, sys
ADD, SET = 0xC0506617, 0x800C6613
disk, place, key = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])
os.makedirs(place, exist_ok=True)
subprocess.run(["mount", "-o", "loop", disk, place], check=True)
root, secret = os.open(place, os.O_RDONLY), os.path.join(place, "secret")
given = bytearray(struct.pack("II32sII32x", 2, 0, b"", len(key), 0) + key)
fcntl.ioctl(root, ADD, given)
if not os.path.exists(secret):
    os.mkdir(secret)
    fcntl.ioctl(os.open(secret, os.O_RDONLY), SET, struct.pack("BBBB4x16s", 2, 1, 4, 0, bytes(given[8:24])))
code = subprocess.run(sys.argv[4:], cwd=secret).returncode
os.sync()
sys.exit(code)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(SECRET + os.urandom(1 << 20))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sf").mkdir()
    own = {
        "SF_STATE_DIR": str(tmp_path / "sf"),
        "SF_CACHE_DIR": str(tmp_path / "hints"),
        "HOME": str(tmp_path),
    }
    return {**os.environ, **servers.credentials(), **own}


def sf(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("sf")), *words]


def test_a_store_on_an_encrypted_directory_is_read_with_its_key_alone(
    disk: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    volume = tmp_path / "volume.img"
    os.truncate(os.open(volume, os.O_CREAT | os.O_RDWR), 64 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", "-O", "encrypt", volume], capture_output=True)
    if os.geteuid() != 0 or made.returncode:
        pytest.skip("needs root and an mkfs.ext4 that knows encryption")

    def inside(key: str, *words: str) -> subprocess.CompletedProcess[str]:
        unshare = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", FSCRYPT]
        argv = [*unshare, str(volume), str(tmp_path / "mounted"), key, *words]
        return subprocess.run(argv, env=settings, capture_output=True, text=True, timeout=120)

    key = os.urandom(64).hex()
    pushed = inside(
        key, *sf("image", "push", "-q", "--input-format", "raw", "--store", "store", str(disk), "secret-name")
    )
    if "Inappropriate ioctl" in pushed.stderr or "not supported" in pushed.stderr:
        pytest.skip("this kernel has no fscrypt")
    assert pushed.returncode == 0, pushed.stderr
    again = tmp_path / "again.raw"
    pulled = inside(key, *sf("image", "pull", "-q", "--store", "store", "secret-name", "-o", str(again)))
    assert pulled.returncode == 0 and again.read_bytes() == disk.read_bytes(), pulled.stderr
    there = ("test", "-e", "store/store.json")
    assert inside(key, *there).returncode == 0 and inside(os.urandom(64).hex(), *there).returncode == 1
    raw = volume.read_bytes()
    assert SECRET[:64] not in raw and b"secret-name" not in raw and b"sf-manifest" not in raw


def test_a_bucket_behind_rclones_crypt_keeps_nothing_that_its_keeper_can_read(
    disk: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    with servers.rclone(tmp_path, "a long sentence") as bucket:
        url = bucket.url("store")

        def run(*words: str) -> str:
            done = subprocess.run(sf(*words), env=settings, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run("store", "init", url, "--single-writer")
        run(
            "image",
            "push",
            "-q",
            "--input-format",
            "raw",
            "--single-writer",
            "--store",
            url,
            str(disk),
            "secret-name",
        )
        run("image", "pull", "-q", "--store", url, "secret-name", "-o", str(tmp_path / "again.raw"))
        assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()
        run("store", "verify", "--full", "--store", url)
        run("image", "gc", "--single-writer", "--store", url)
        with closing(SqliteStore(tmp_path / "sf" / "sf.db")):
            (tmp_path / "sf" / "installation.json").write_text('{"id": "0123abcd"}')
            run("state", "backup", url)
        assert "0123abcd-" in run("state", "check", url)
        kept = [path for path in (tmp_path / "rclone").rglob("*") if path.is_file()]
        assert len(kept) >= 7
        for path in kept:
            data = path.read_bytes()
            assert SECRET[:64] not in data and b"sf-" not in data and b"format" not in data
            assert "secret-name" not in str(path) and "manifests" not in str(path)
