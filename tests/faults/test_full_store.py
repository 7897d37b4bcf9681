"""A store on a disk that is full: a real one, a small tmpfs in a mount namespace of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
INSIDE = """
import contextlib, os, subprocess, sys
from pathlib import Path

disk, work = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[3]}", "sf-test", disk], check=True)
os.environ |= {"SF_STORE": f"file://{disk}/store", "SF_CACHE_DIR": str(work / "cache"), "SF_CONFIG": "/dev/null",
               "SF_STATE_DIR": str(work / "state")}

def sf(*words, code=0):
    done = subprocess.run([sys.argv[4], *words], capture_output=True, text=True)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout

def image(name, seed):
    path = work / name
    path.write_bytes(__import__("random").Random(seed).randbytes(3 << 20))
    return sf("image", "push", str(path), name, "--input-format", "raw", *MORE)

def fill():
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(256))

MORE = []
"""


def inside(tmp_path: Path, script: str, size: str = "32M") -> None:
    disk, work = tmp_path / "disk", tmp_path / "work"
    disk.mkdir(), work.mkdir()
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", INSIDE + script]
    sf = Path(sys.executable).parent / "sf"
    done = subprocess.run([*command, disk, work, size, sf], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_on_a_full_disk_images_are_removed_and_collected_again_and_again(tmp_path: Path) -> None:
    """D4: `image rm` and `gc` failed for ever, for want of a few KiB."""
    inside(
        tmp_path,
        """
for number in range(4):
    image(f"n{number}", number)
fill()
sf("image", "rm", "n0", "n1")
fill()
sf("image", "rm", "n2")
fill()
before = sum(path.stat().st_size for path in (disk / "store/packs").rglob("*"))
sf("image", "gc", "--grace", "0s")
fill()
sf("image", "gc", "--grace", "0s")
after = sum(path.stat().st_size for path in (disk / "store/packs").rglob("*"))
assert after < before / 2, (before, after)
assert "n3" in sf("image", "ls")
sf("store", "verify", "--full")
(disk / "filler").unlink()
image("n9", 9)
sf("store", "verify", "--full")
""",
    )


def test_a_push_that_does_not_fit_ends_with_6_and_does_not_take_what_is_set_aside(tmp_path: Path) -> None:
    """D5: the exit code; and what is set aside is for deletions alone."""
    inside(
        tmp_path,
        """
image("n0", 0)
fill()
(work / "big").write_bytes(os.urandom(3 << 20))
for _ in range(3):
    sf("image", "push", str(work / "big"), "big", "--input-format", "raw", code=6)
assert (disk / "store/.reserve").stat().st_size > 0
sf("image", "rm", "n0")
assert "n0" not in sf("image", "ls")
""",
    )


def test_a_repack_for_which_there_is_no_room_leaves_the_rest_of_the_collection_be(tmp_path: Path) -> None:
    """D4: its whole kind: what frees nothing now must not stop what does."""
    inside(
        tmp_path,
        """
import random
shared = random.Random(1).randbytes(5 << 20)
for name, more in (("both", 6 << 20), ("one", 0)):
    (work / name).write_bytes(shared + random.Random(2).randbytes(more))
    sf("image", "push", str(work / name), name, "--input-format", "raw")
image("alone", 5)
sf("image", "rm", "both", "alone")
sf("image", "gc", "--grace", "0s", "--repack-threshold", "1")
fill()
sf("image", "gc", "--grace", "0s", "--repack-threshold", "0.1")
sf("image", "ls")
sf("store", "verify", "--full")
for _ in range(2):
    sf("image", "gc", "--grace", "0s", "--repack-threshold", "0.1")
sf("store", "verify", "--full")
""",
        size="24M",
    )
