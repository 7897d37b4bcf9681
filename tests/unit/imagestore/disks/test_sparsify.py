"""`push --sparsify` leaves out what is free for certain, and nothing else."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagestore.backends.directory import Directory
from imagestore.disks import ext4
from imagestore.disks.disk import RawDisk, read_range
from imagestore.disks.filesystems import look as look_at
from imagestore.disks.open import open_disk
from imagestore.disks.partitions import read_partitions
from imagestore.formats.chunking import BLOCK
from imagestore.formats.digest import Digest
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.store import Store
from tests.unit.imagestore.disks.test_ext4 import MIB, filesystem, look, places

FAULTS = Path(__file__).parents[3] / "fixtures/faults"


def thinned(path, tmp_path, *, format_=None):
    """A push with --sparsify, and the disk that comes back from it."""
    store = Store.init(Directory(tmp_path / "store"))
    result = push(store, path, "thin", format_=format_, sparsify=True, cache=tmp_path / "cache")
    pull(store, result.digest, tmp_path / "out", format_="raw")
    return result, (tmp_path / "out").read_bytes()


def disk_of(path):
    with open_disk(path) as disk:
        return read_range(disk, 0, disk.size_bytes)


def partitioned(path, script, size=64 * MIB):
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", "--no-reread", str(path)], input=script, text=True, check=True)
    return path


def put(path, source, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(source.read_bytes())


@pytest.mark.parametrize("name", ["stale-whole", "stale-gpt"])
def test_files_in_the_partitions_in_use_are_kept_whatever_an_old_table_or_file_system_says(name, tmp_path):
    """B1: an ext4 or a GPT that nobody uses any more called the blocks of live files free."""
    before = disk_of(FAULTS / f"{name}.qcow2")
    result, after = thinned(FAULTS / f"{name}.qcow2", tmp_path)
    start = int.from_bytes(before[454:458], "little") * 512
    (tmp_path / "partition").write_bytes(after[start:])
    subprocess.run(["e2fsck", "-fn", tmp_path / "partition"], check=True, capture_output=True)
    for number, data in enumerate((before, after)):
        (tmp_path / "partition").write_bytes(data[start:])
        out = tmp_path / f"data{number}"
        subprocess.run(["debugfs", "-R", f"dump /data.bin {out}", tmp_path / "partition"], check=True)
    assert (tmp_path / "data0").stat().st_size > 500_000
    assert (tmp_path / "data0").read_bytes() == (tmp_path / "data1").read_bytes()
    assert result.notes == ()


@pytest.mark.parametrize(
    ("name", "why"), [("nojournal-notclean", "not unmounted cleanly"), ("badbitmap", "sum of a block bitmap")]
)
def test_a_file_system_that_is_not_clean_or_whose_sums_are_wrong_is_stored_whole(name, why, tmp_path):
    """B1: metadata that nobody had checked was believed."""
    result, after = thinned(FAULTS / f"{name}.qcow2", tmp_path)
    assert after == disk_of(FAULTS / f"{name}.qcow2")
    assert why in result.notes[0]


def test_sparsify_leaves_out_deleted_files_and_keeps_the_others(tmp_path):
    path, contents = filesystem(tmp_path / "disk")
    subprocess.run(["debugfs", "-w", "-R", "rm file2", str(path)], check=True, capture_output=True)
    result, data = thinned(path, tmp_path, format_="raw")
    assert contents["file2"][: 4 * BLOCK] not in data
    assert (
        subprocess.run(["e2fsck", "-fn", str(tmp_path / "out")], check=False, capture_output=True).returncode
        == 0
    )
    assert all(content in data for name, content in contents.items() if name != "file2")
    assert Digest.of(data) != Digest.of(path.read_bytes())
    assert result.notes == ()


LAYOUTS = {
    "blocks of 1 KiB": ((), 1024), "blocks of 2 KiB": ((), 2048), "bigalloc": (("-O", "bigalloc"), 4096),
    "bigalloc in 1 KiB": (("-O", "bigalloc"), 1024), "smaller groups": (("-g", "8192"), 4096),
    "no sums": (("-O", "^metadata_csum"), 4096), "old sums": (("-O", "^metadata_csum,uninit_bg"), 1024),
    "old sums, 32 bits": (("-O", "^metadata_csum,^64bit,uninit_bg"), 4096), "ext3": (("-t", "ext3"), 1024),
    "ext2": (("-t", "ext2"), 4096), "large inodes": (("-I", "1024"), 4096),
    "no groups of groups": (("-O", "^flex_bg"), 4096),
    "seed": (("-O", "metadata_csum_seed"), 4096), "inline": (("-O", "inline_data"), 4096),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_ext4_is_thinned_and_stays_whole(layout, tmp_path):
    """B2: blocks of 1 and 2 KiB, bigalloc and other sizes of groups were passed over without a word."""
    options, block = LAYOUTS[layout]
    files = (40_000, 1 * MIB, 5_000_001, 3_000, *range(1000, 60_000, 1777))
    path, _ = filesystem(tmp_path / "disk", *options, files=files, block=block)
    subprocess.run(["debugfs", "-w", "-R", "rm file2", str(path)], check=True, capture_output=True)
    special = look(path, sparsify=True)
    assert (special.free[:, 1] - special.free[:, 0]).sum() * BLOCK > 4_900_000
    assert special.notes == ()
    data = bytearray(path.read_bytes())
    for start, end in special.free.tolist():
        data[start * BLOCK : end * BLOCK] = bytes((end - start) * BLOCK)
    (tmp_path / "thin").write_bytes(data)
    subprocess.run(["e2fsck", "-fn", str(tmp_path / "thin")], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump / {tmp_path / 'out'}", tmp_path / "thin"], check=True, capture_output=True
    )
    for number in {*range(len(files))} - {2}:
        name = f"file{number}"
        assert (tmp_path / "out" / name).read_bytes() == (path.with_suffix(".tree") / name).read_bytes(), name


@pytest.mark.parametrize("script", [
    "label: dos\nstart=2048, size=96256\n",
    "label: dos\nstart=63, size=96256\n",
    "label: gpt\nstart=2048, size=96256\n",
    "label: gpt\nsector-size: 4096\nstart=256, size=12032\n",
    "label: dos\nstart=2048, size=2048\nstart=6144, type=5\nstart=8192, size=1024, type=83\nstart=12288, size=96256\n",
])  # fmt: skip
def test_file_systems_are_found_in_every_kind_of_partition(script, tmp_path):
    """B2: sectors of 4 KiB, logical partitions and those that start between two blocks were passed over."""
    source, _ = filesystem(tmp_path / "fs", size=47 * MIB)
    subprocess.run(["debugfs", "-w", "-R", "rm file2", str(source)], check=True, capture_output=True)
    path = partitioned(tmp_path / "disk", script)
    with path.open("rb") as file:
        region = read_partitions(RawDisk(file.fileno(), "disk")).regions[-1]
    put(path, source, region.start)
    special = look(path, sparsify=True)
    assert (special.free[:, 1] - special.free[:, 0]).sum() * BLOCK > 4_900_000
    _, after = thinned(path, tmp_path, format_="raw")
    (tmp_path / "partition").write_bytes(after[region.start : region.end])
    subprocess.run(["e2fsck", "-fn", str(tmp_path / "partition")], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("at", "sign", "said"),
    [
        (0, b"XFSB", "XFS"), (512, b"LABELONE", "LVM"), (0x10040, b"_BHRfS_M", "btrfs"), (0, b"random", "nothing"),
        (54, b"FAT16   ", "FAT"),
    ],
)  # fmt: skip
def test_what_is_not_looked_into_is_said(at, sign, said, tmp_path):
    """B2: of XFS, LVM and others not a word was said."""
    path = partitioned(tmp_path / "disk", "label: gpt\nstart=2048, size=96256\n")
    (tmp_path / "sign").write_bytes(sign)
    put(path, tmp_path / "sign", MIB + at)
    (note,) = look(path, sparsify=True).notes
    assert note.startswith("partition 1: it holds") and said in note
    assert look(path).notes == ()


DOS = "label: dos\nstart=2048, size=96256\n"
GPT = "label: gpt\nstart=2048, size=96256\n"
CHAIN = "label: dos\nstart=2048, type=5\nstart=4096, size=4096, type=83\n"
SECOND = struct.pack("<8sII", b"\0\0\0\0\x83\0\0\0", 4096, 99)
CONTRADICTIONS = {
    "overlap": (DOS, 462, SECOND, "overlap"),
    "past the end": (DOS, 458, struct.pack("<I", 1 << 20), "larger than it is"),
    "empty": ("label: dos\n", 0, b"", "empty"),
    "a boot sector": ("label: dos\n", 446, b"\x12", "no partition table"),
    "an erased MBR": (GPT, 0, bytes(512), "no partition table"),
    "a hybrid MBR": (GPT, 462, SECOND, "hybrid"),
    "a damaged GPT": (GPT, 1024 + 33, b"\x09", "damaged"),
    "a copy of a GPT": (GPT, 512 + 24, b"\x02", "damaged"),
    "a broken chain": (CHAIN, 2048 * 512 + 510, b"x", "extended"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_doubtful_partition_table_means_that_all_is_stored(case, tmp_path):
    """B1: the partition table decides where file systems are."""
    script, at, value, said = CONTRADICTIONS[case]
    path, _ = filesystem(
        tmp_path / "disk", "-E", "nodiscard", size=62 * MIB
    )  # an old one over the whole disk
    partitioned(path, script)
    (tmp_path / "value").write_bytes(value)
    put(path, tmp_path / "value", at)
    special = look(path, sparsify=True)
    assert len(special.free) == 0
    assert len(special.notes) == 1 and said in special.notes[0]


def patched(path, at, value):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


def test_orphans_errors_and_journals_that_hold_something_are_doubts(tmp_path):
    """B1: clean state, no errors flag, an empty journal."""
    path, _ = filesystem(tmp_path / "disk", "-O", "^metadata_csum")
    assert len(look(path, sparsify=True).free)
    good = path.read_bytes()
    place = subprocess.run(["debugfs", "-R", "bmap <8> 0", path], check=True, capture_output=True, text=True)
    journal = int(place.stdout.split()[-1]) * BLOCK
    for at, value, said in (
        (1024 + 0x3A, b"\0", "cleanly"), (1024 + 0x3A, b"\3", "errors"), (1024 + 0xE8, b"\x0c", "cleanly"),
        (1024 + 0x60, bytes([good[1024 + 0x60] | 4]), "cleanly"), (journal + 0x1C, b"\0\0\0\1", "journal"),
        (1024 + 0x5A, b"\1", "copy"), (1024 + 0x62, b"\x80", "features"), (1024 + 4, b"\xff\xff", "larger"),
    ):  # fmt: skip
        path.write_bytes(good)
        patched(path, at, value)
        special = look(path, sparsify=True)
        assert len(special.free) == 0 and said in special.notes[0], (at, special.notes)
        assert len(special.cuts) or said == "larger"


def test_bitmaps_without_sums_are_believed_only_where_files_and_metadata_agree(tmp_path):
    """B1: no extent of any inode, and none of the metadata, lies in what the bitmap calls free."""
    path, contents = filesystem(tmp_path / "disk", "-O", "^metadata_csum")
    said = subprocess.run(["dumpe2fs", path], check=True, capture_output=True, text=True).stdout
    bitmap = int(said.split("Block bitmap at ")[1].split()[0])
    good = path.read_bytes()
    bits = np.unpackbits(
        np.frombuffer(good[bitmap * BLOCK : bitmap * BLOCK + BLOCK], np.uint8), bitorder="little"
    )
    free = int(np.flatnonzero(bits == 0)[-1])
    for used, why in ((places(path, contents)["file1"] + 3, "files"), (bitmap, "metadata")):
        wrong = bits.copy()
        wrong[used], wrong[free] = 0, 1  # the numbers of free blocks agree
        path.write_bytes(good)
        patched(path, bitmap * BLOCK, np.packbits(wrong, bitorder="little").tobytes())
        special = look(path, sparsify=True)
        assert len(special.free) == 0 and why in special.notes[0]
        wrong[free] = 0
        patched(path, bitmap * BLOCK, np.packbits(wrong, bitorder="little").tobytes())
        assert "counts" in look(path, sparsify=True).notes[0]


def test_free_blocks_in_more_pieces_than_anybody_has_are_a_doubt(tmp_path, monkeypatch):
    """Groups that share one bitmap cost a stranger nothing; each of its runs would cost a reader memory."""
    path, _ = filesystem(tmp_path / "disk")
    assert len(look(path, sparsify=True).free)
    monkeypatch.setattr(ext4, "MAX_ROWS", 0)
    special = look(path, sparsify=True)
    assert len(special.free) == 0 and "pieces" in special.notes[0]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A disk with a partition whose files are known, over an older file system; and the blocks of the files."""
    directory = tmp_path_factory.mktemp("mutated")
    path, _ = filesystem(directory / "disk", size=26 * MIB, files=(MIB,))
    shutil.rmtree(path.with_suffix(".tree"))
    inner, contents = filesystem(directory / "inner", size=20 * MIB, files=(2 * MIB, 300_000, 9_000))
    partitioned(path, "label: gpt\nstart=4096, size=40960\n", size=26 * MIB)
    put(path, inner, 2 * MIB)
    data = path.read_bytes()
    used = {
        (data.index(content[:BLOCK]) + at) // BLOCK
        for content in contents.values()
        for at in range(0, len(content), BLOCK)
    }
    return data, used


SPOTS = [*range(0, 1024, 2), *range(1024, 2048, 16), *(2 * MIB + at for at in range(1024, 60 * BLOCK, 4))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(SPOTS), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6
    )
)
def test_no_block_of_a_live_file_is_left_out_whatever_bytes_are_changed(live, changes, tmp_path):
    """B1."""
    data, used = live
    broken = bytearray(data)
    for at, value in changes:
        broken[at : at + len(value)] = value
    path = tmp_path / "disk"
    path.write_bytes(broken)
    with path.open("rb") as file:
        special = look_at(RawDisk(file.fileno(), "disk"), sparsify=True)
    left = {block for start, end in special.free.tolist() for block in range(start, end)}
    assert not left & used
