"""A push that is killed or meets a full disk leaves a store that verifies and that a rerun completes."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagestore.backends.directory import Directory
from imagestore.errors import NotFound
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.store import Store
from imagestore.verify import verify_store
from tests.drills import rounds, seed
from tests.unit.imagestore.images import identical, make_raw

_PUSH = """
import sys
from pathlib import Path
from imagestore.store import packing
from imagestore.backends.directory import Directory
from imagestore.push import push
from imagestore.store.store import Store
packing.PACK_BYTES = 1 << 20  # many packs: many moments
push(Store.open(Directory(Path(sys.argv[1]))), Path(sys.argv[2]), "debian", "12", cache=Path(sys.argv[3]))
"""


def pushing(tmp_path, disk, **options):
    command = [sys.executable, "-c", _PUSH, str(tmp_path / "store"), str(disk), str(tmp_path / "cache")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def assert_whole(store):
    problems = list(verify_store(store, full=True).problems)
    assert problems == []


@pytest.fixture
def disk(tmp_path):
    return make_raw(tmp_path / "disk.raw", size_bytes=48 << 20)


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_a_push_killed_at_any_moment_leaves_a_store_that_verifies_and_a_rerun_that_succeeds(tmp_path, disk):
    expected = push(Store.init(Directory(tmp_path / "other")), disk, "debian", cache=tmp_path / "c").digest
    store = Store.init(Directory(tmp_path / "store"))
    began = time.monotonic()
    assert pushing(tmp_path, disk).wait() == 0
    whole_s = time.monotonic() - began
    random_, killed = random.Random(seed()), 0
    for _ in range(rounds(50)):
        subprocess.run(["rm", "-rf", tmp_path / "store", tmp_path / "cache"], check=True)
        store = Store.init(Directory(tmp_path / "store"))
        process = pushing(tmp_path, disk)
        # The first part is Python's own start: look closer at what comes after.
        time.sleep(random_.uniform(whole_s * 0.3, whole_s))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert_whole(store)
        arrived = sum(stat.size_bytes for stat in store.backend.list("packs/"))
        result = push(store, disk, "debian", "12", cache=tmp_path / "cache")
        assert result.digest == expected
        stored = sum(stat.size_bytes for stat in store.backend.list("packs/"))
        # Nothing that arrived is sent again (packs of part of an image are cut a little differently).
        assert result.written_bytes <= stored - arrived
        assert_whole(store)
        pull(store, expected, tmp_path / "out.raw", format_="raw")
        assert identical(disk, "raw", tmp_path / "out.raw", "raw")
    assert killed or rounds(50) < 10  # by a slow machine's first run, a few moments may all be after the end


@pytest.mark.parametrize("room_bytes", [0, 20_000, 1 << 20, 5 << 20])
def test_a_full_disk_ends_a_push_with_one_line_and_a_store_that_verifies(tmp_path, disk, room_bytes):
    store = Store.init(Directory(tmp_path / "store"))

    def limit():
        # Stands in for a full disk: what is written past the limit is refused with an error.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))

    process = pushing(tmp_path, disk, preexec_fn=limit)
    _, errors = process.communicate()
    if process.returncode:
        assert b"NoSpace" in errors
    assert_whole(store)
    assert push(store, disk, "debian", "12", cache=tmp_path / "cache").digest
    assert_whole(store)


@pytest.mark.system
@pytest.mark.parametrize("size_mib", [1, 4, 9])
def test_a_store_on_a_full_file_system_still_verifies(tmp_path, disk, size_mib):
    mount = tmp_path / "small"
    mount.mkdir()
    script = f"mount -t tmpfs -o size={size_mib}m none {mount} && exec {sys.executable} -"
    program = f"""
import sys
from pathlib import Path
from imagestore.backends.directory import Directory
from imagestore.errors import NoSpace
from imagestore.push import push
from imagestore.store.store import Store
from imagestore.verify import verify_store
store = Store.init(Directory(Path({str(mount)!r}) / "store"))
try:
    push(store, Path({str(disk)!r}), "debian", cache=Path({str(tmp_path / "cache")!r}))
except NoSpace as error:
    assert "\\n" not in str(error)
else:
    sys.exit("it had room")
assert not list(verify_store(store, full=True).problems)
assert not list(store.names.list())
left = [path for path in Path({str(mount)!r}).rglob(".tmp/*")]
assert not left, left
"""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        input=program, text=True, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_push_that_fails_sets_no_name(tmp_path, disk):
    store = Store.init(Directory(tmp_path / "store"))

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(store, disk, "debian", progress=stop)
    with pytest.raises(NotFound):
        store.names.get("debian")
    assert_whole(store)
