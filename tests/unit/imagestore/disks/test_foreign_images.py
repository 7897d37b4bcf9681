"""Files of other formats: whole, cut, or not what they seem; made by qemu-img."""

import os
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from imagestore.disks import unpack
from imagestore.disks.disk import read_range
from imagestore.disks.open import open_disk
from imagestore.errors import Invalid
from tests.unit.imagestore.disks.test_ext4 import filesystem

FAULTS = Path(__file__).parents[3] / "fixtures/faults"
MIB = 1 << 20


def content(path, format_=None):
    with open_disk(path, format_) as disk:
        return read_range(disk, 0, disk.size_bytes)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A partitioned disk of 8 MiB, the first half full of random bytes, and the very last sector not empty."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    data = bytearray(8 * MIB)
    data[: 4 * MIB] = np.random.default_rng(1).bytes(4 * MIB)
    data[-512:] = b"\x01" * 512
    path.write_bytes(data)
    subprocess.run(["sfdisk", "-q", path], input="label: dos\nstart=2048\n", text=True, check=True)
    return path


def made(raw, path, format_, *options):
    given = [argument for option in options for argument in ("-o", option)]
    subprocess.run(["qemu-img", "convert", "-O", format_, *given, raw, path], check=True)
    return path


KINDS = {
    "vmdk": ("vmdk",), "stream": ("vmdk", "subformat=streamOptimized"),
    "vdi": ("vdi",), "vdi-static": ("vdi", "static=on"),
    "vhdx": ("vhdx",), "vhd": ("vpc", "subformat=fixed,force_size=on"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_image_of_another_format_is_the_disk_that_qemu_was_given(kind, raw, tmp_path):
    """B4: a fixed VHD was stored with its footer as a sector more."""
    assert content(made(raw, tmp_path / "image", *KINDS[kind])) == raw.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_was_cut_anywhere_is_refused_and_never_padded_with_zeros(kind, raw, tmp_path):
    """B3."""
    path = made(raw, tmp_path / "image", *KINDS[kind])
    whole = path.read_bytes()
    data_ends = whole.rstrip(b"\0")
    for length in (len(whole) // 2, len(whole) * 3 // 4 // 512 * 512, len(data_ends) - 100):
        os.truncate(path, length)
        with pytest.raises(Invalid):
            content(path)
        path.write_bytes(whole)


def test_the_files_that_showed_it_are_refused_and_recognised():
    """B3 and B4."""
    with pytest.raises(Invalid, match="cut short"):
        content(FAULTS / "cut.vmdk")
    with open_disk(FAULTS / "fixed.vhd") as disk:
        assert disk.size_bytes == (FAULTS / "fixed.vhd").stat().st_size - 512
    assert content(FAULTS / "fixed.vhd", "vhd") == (FAULTS / "fixed.vhd").read_bytes()[:-512]


def test_a_fixed_vhd_whose_footer_is_wrong_is_refused(tmp_path):
    """B4."""
    good = (FAULTS / "fixed.vhd").read_bytes()
    for broken, said in (
        (good[:-400] + b"\xff" + good[-399:], "damaged"),
        (good[:512] + good[1024:], "no whole VHD"),
    ):
        (tmp_path / "image").write_bytes(broken)
        with pytest.raises(Invalid, match=said):
            content(tmp_path / "image")


@pytest.mark.parametrize("table", ["dos", "gpt", "", "logical"])
def test_a_raw_disk_that_was_cut_is_refused_unless_raw_was_asked_for(table, tmp_path):
    """B3: of a raw file only its partition table or file system knows how long it was."""
    path, _ = filesystem(tmp_path / "disk", size=24 * MIB, files=(40_000,))
    script = f"label: {table}\nstart=2048\n"
    if table == "logical":
        script = "label: dos\nstart=2048, type=5\nstart=4096, type=83\n"
    if table:
        subprocess.run(["sfdisk", "-q", "--no-reread", path], input=script, text=True, check=True)
    content(path)
    os.truncate(path, 24 * MIB - 4096 if table != "gpt" else 24 * MIB - 512)
    with pytest.raises(Invalid, match="cut short") as caught:
        content(path)
    assert "--input-format raw" in caught.value.hint
    assert len(content(path, "raw")) == path.stat().st_size


def iso(path):
    (path.parent / "tree").mkdir()
    (path.parent / "tree/file").write_bytes(bytes(range(256)) * 4000)
    subprocess.run(
        ["genisoimage", "-quiet", "-o", path, path.parent / "tree"], check=True, capture_output=True
    )


def test_an_iso_that_was_cut_is_refused(tmp_path):
    """B3."""
    iso(tmp_path / "disk.iso")
    content(tmp_path / "disk.iso")
    os.truncate(tmp_path / "disk.iso", (tmp_path / "disk.iso").stat().st_size // 2)
    with pytest.raises(Invalid, match="cut short"):
        content(tmp_path / "disk.iso")


def archive_zip(raw, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(raw)


def written(data):
    return lambda raw, path: path.write_bytes(data)


NAMED = {
    "dynamic VHD": (lambda raw, path: made(raw, path, "vpc"), "dynamic VHD", "-f vpc"),
    "qcow1": (lambda raw, path: made(raw, path, "qcow"), "qcow image of version 1", "-f qcow "),
    "parallels": (lambda raw, path: made(raw, path, "parallels"), "Parallels", "-f parallels"),
    "qed": (lambda raw, path: made(raw, path, "qed"), "QED", "-f qed"),
    "flat VMDK": (lambda raw, path: made(raw, path, "vmdk", "subformat=monolithicFlat"), "in other files", "-f vmdk"),
    "split VMDK": (lambda raw, path: made(raw, path, "vmdk", "subformat=twoGbMaxExtentSparse"), "files", "-f vmdk"),
    "lz4": (lambda raw, path: subprocess.run(["lz4", "-q", raw, path], check=True), "lz4", "unlz4"),
    "zip": (archive_zip, "zip", "unzip"),
    "7z": (written(b"7z\xbc\xaf\x27\x1c" + bytes(4096)), "7z", "7z x"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_a_file_that_is_no_disk_is_called_by_its_name_with_what_to_do(kind, raw, tmp_path):
    """B5."""
    make, name, command = NAMED[kind]
    make(raw, tmp_path / "image")
    for format_ in (None, "qcow2", "vmdk"):
        with pytest.raises(Invalid, match=name) as caught:
            content(tmp_path / "image", format_)
        assert command in caught.value.hint


def test_a_tar_is_a_tar(tmp_path):
    """B5."""
    with tarfile.open(tmp_path / "image", "w") as archive:
        archive.add(__file__, "notes.txt")
    with pytest.raises(Invalid, match="tar archive"):
        content(tmp_path / "image")


def test_the_file_that_was_judged_is_the_one_that_qemu_reads(raw, tmp_path, monkeypatch):
    """F: a VMDK swapped between the look and qemu-img put another file into the image."""
    from imagestore.disks import inspection

    path = made(raw, tmp_path / "image.vmdk", "vmdk")
    other = tmp_path / "secret.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", other, "8M"], check=True)
    judge = inspection._judge

    def swapped(*arguments):
        judge(*arguments)
        other.replace(path)

    monkeypatch.setattr(inspection, "_judge", swapped)
    assert content(path) == raw.read_bytes()


def test_one_block_named_again_and_again_is_not_written_out(tmp_path, monkeypatch):
    """A megabyte of VDI may say that a disk of terabytes is full of it."""
    monkeypatch.setattr(unpack, "LEAST_DATA_BYTES", MIB)
    path = tmp_path / "image.vdi"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", path, "128M"], check=True)
    write = ["qemu-io", "-f", "vdi", "-c", "write -P 7 0 1M", path]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    assert content(path) == b"\7" * MIB + bytes(127 * MIB)
    with path.open("r+b") as file:
        file.seek(struct.unpack("<340xI", file.read(344))[0])
        file.write(bytes(4 * 128))
    with pytest.raises(Invalid, match="mean more than"):
        content(path)


def test_hostile_tables_of_a_vmdk_are_bounded(raw, tmp_path):
    """B3."""
    path = made(raw, tmp_path / "image.vmdk", "vmdk")
    good = path.read_bytes()
    for at, value in ((12, 1 << 62), (20, 0), (56, 1 << 62), (12, 1 << 40)):
        path.write_bytes(good[:at] + struct.pack("<Q", value) + good[at + 8 :])
        with pytest.raises(Invalid):
            content(path)
    # A file of 128 MiB could have a quarter of a million of such tables, of 64 MiB each.
    path.write_bytes(good[:44] + struct.pack("<I", 4096) + good[48:] + bytes(MIB))
    with pytest.raises(Invalid, match="tables that are too large"):
        content(path)
