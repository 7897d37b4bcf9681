import random
import struct
import subprocess
import sys

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.disks.filesystems import look as look_at
from imagestore.disks.open import open_disk
from imagestore.formats.chunking import BLOCK
from imagestore.push import push
from imagestore.store.store import Store
from tests.drills import rounds, seed

MIB = 1 << 20


def filesystem(
    path, *options, size=64 * MIB, files=(40_000, 1 * MIB, 5_000_001, 3_000), offset=0, block=4096
):
    """A disk with an ext4 file system at `offset` that holds files of random bytes of these sizes."""
    tree = path.with_suffix(".tree")
    tree.mkdir()
    contents = {}
    for number, count in enumerate(files):
        contents[f"file{number}"] = np.random.default_rng(number).bytes(count)
        (tree / f"file{number}").write_bytes(contents[f"file{number}"])
    with path.open("wb") as file:
        file.truncate(size)
    where = ["-E", f"offset={offset}"] if offset else []
    command = ["mkfs.ext4", "-q", "-F", "-b", str(block), *where, *options, "-d", str(tree), str(path)]
    subprocess.run([*command, f"{(size - offset) // 1024}k"], check=True)
    return path, contents


def look(path, *, sparsify=False):
    with open_disk(path, "raw") as disk:
        return look_at(disk, sparsify=sparsify)


def places(path, contents):
    """Block at which each file starts, found by its bytes."""
    data = path.read_bytes()
    return {name: data.index(content[:BLOCK]) // BLOCK for name, content in contents.items()}


@pytest.mark.parametrize("options", [(), ("-O", "^64bit"), ("-I", "128"), ("-O", "^metadata_csum")])
def test_large_files_give_cuts_and_small_ones_hints(tmp_path, options):
    path, contents = filesystem(tmp_path / "disk", *options)
    special = look(path)
    for name, start in places(path, contents).items():
        blocks = -(-len(contents[name]) // BLOCK)
        found = special.cuts if blocks >= 8 else special.hints
        assert {start, start + blocks} <= set(found.tolist())


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_file_systems_in_partitions_are_found(tmp_path, table):
    path, contents = filesystem(tmp_path / "disk", offset=MIB)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole + MIB)
    subprocess.run(
        ["sfdisk", "-q", str(path)],
        input=f"label: {table}\nstart=2048, size={62 * 2048}\n",
        text=True,
        check=True,
    )
    assert set(places(path, contents).values()) <= set(look(path).hints.tolist())


def test_file_systems_that_are_not_understood_give_plain_cuts_and_say_so(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(32 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "meta_bg,^resize_inode", str(path)], check=True)
    special = look(path, sparsify=True)
    assert len(special.cuts) == len(special.free) == 0
    assert "meta_bg" in special.notes[0]


def test_the_same_file_elsewhere_on_another_disk_is_the_same_chunks(tmp_path):
    store = Store.init(Directory(tmp_path / "store"))
    one, _ = filesystem(tmp_path / "one", files=(5 * MIB, 4 * MIB))
    two, _ = filesystem(tmp_path / "two", "-O", "^has_journal", files=(5 * MIB, 4 * MIB), size=96 * MIB)
    push(store, one, "one", format_="raw", cache=tmp_path / "cache")
    result = push(store, two, "two", format_="raw", cache=tmp_path / "cache")
    assert result.new_bytes < MIB


MEASURED = """
import sys
from pathlib import Path
from imagestore.disks.filesystems import look
from imagestore.disks.open import open_disk
used = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
with open_disk(Path(sys.argv[1]), "raw") as disk:
    before = used()
    look(disk, sparsify=False)
print(used() - before)
"""


def test_tables_and_trees_of_gigabytes_take_little_memory(tmp_path):
    """A small file may say that it has them, as holes: a server would look at it when a user uploads it."""
    path, block, size = tmp_path / "disk", 65536, 4096
    with path.open("wb") as file:
        file.truncate(20 << 30)
    options = ["-O", "^metadata_csum,^uninit_bg,^has_journal,^resize_inode,^64bit", "-I", str(size)]
    more = ["-b", str(block), "-N", "65536", "-G", "1", "-E", "lazy_itable_init=1,nodiscard"]
    command = ["mkfs.ext4", "-q", "-F", *options, *more, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("r+b") as file:
        file.seek(block + 8)
        table = int.from_bytes(file.read(4), "little") * block
        for number in range(100, 5000):  # each is a file with a tree of four nodes, which are holes
            roots = b"".join(struct.pack("<IIHH", 0, 1000 + 4 * number + at, 0, 0) for at in range(4))
            file.seek(table + number * size)
            file.write(struct.pack("<HHI18xHII", 0x8000, 0, 1 << 20, 1, 0, 0x80000))
            file.seek(table + number * size + 40)
            file.write(struct.pack("<HHHHI", 0xF30A, 4, 4, 1, 0) + roots)
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300  # it was 2,767


@pytest.mark.drill
def test_hostile_metadata_costs_cuts_and_nothing_else(tmp_path):
    path, _ = filesystem(tmp_path / "disk", size=24 * MIB, files=(2 * MIB, 40_000))
    good = bytearray(path.read_bytes())
    random_ = random.Random(seed())
    for _ in range(rounds(500)):
        broken = bytearray(good)
        for _ in range(random_.randrange(1, 30)):
            at = random_.choice([1024 + random_.randrange(1024), random_.randrange(BLOCK, 40 * BLOCK)])
            broken[at : at + 4] = random_.choice([b"\xff" * 4, bytes(4), random_.randbytes(4)])
        path.write_bytes(broken)
        special = look(path)
        assert (np.diff(special.cuts) > 0).all()
        free = look(path, sparsify=True).free
        assert (free[:, 0] < free[:, 1]).all()
