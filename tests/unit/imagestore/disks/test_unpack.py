"""Compressed files and OVAs are the disk that is in them; what is broken or means too much is refused."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import tempfile

import numpy as np
import pytest
import zstandard

from imagestore.disks import unpack
from imagestore.disks.disk import read_range
from imagestore.disks.open import open_disk
from imagestore.errors import Invalid

MIB = 1 << 20


def content(path, format_=None):
    with open_disk(path, format_) as disk:
        return read_range(disk, 0, disk.size_bytes)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """8 MiB with a partition table, data, a hole of 5 MiB, data."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    data = bytearray(8 * MIB)
    data[: 2 * MIB] = np.random.default_rng(1).bytes(2 * MIB)
    data[7 * MIB :] = b"end " * (MIB // 4)
    path.write_bytes(data)
    subprocess.run(["sfdisk", "-q", path], input="label: dos\nstart=2048\n", text=True, check=True)
    return path


def converted(raw, path, format_, *options):
    given = [argument for option in options for argument in ("-o", option)]
    subprocess.run(["qemu-img", "convert", "-O", format_, *given, raw, path], check=True)
    return path.read_bytes()


def ova(*disks, name="web.ovf"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        members = [(name, b"<Envelope/>"), *((f"../../disk{n}.vmdk", d) for n, d in enumerate(disks))]
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


PACKED = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("inner", ["raw", "qcow2"])
def test_a_compressed_file_is_the_disk_that_is_in_it_whole_or_in_several_streams(kind, inner, raw, tmp_path):
    data = converted(raw, tmp_path / "inner", inner)
    half = len(data) // 2
    for streams in ([data], [data[:half], data[half:]]):
        packed = b"".join(map(PACKED[kind], streams))
        (tmp_path / "disk").write_bytes(packed)
        assert content(tmp_path / "disk") == raw.read_bytes()
        (tmp_path / "disk").write_bytes(packed[:-9])
        with pytest.raises(Invalid, match=r"cut short|unpacked"):
            content(tmp_path / "disk")
    packed = bytearray(PACKED[kind](data))
    packed[len(packed) // 2] ^= 0x55
    (tmp_path / "disk").write_bytes(packed)
    if kind == "zst":  # its frames have no sum unless the writer asks for one
        return
    with pytest.raises(Invalid, match=r"cut short|unpacked"):
        content(tmp_path / "disk")


def test_an_ova_is_its_one_disk_compressed_or_not_and_names_in_it_lead_nowhere(raw, tmp_path):
    vmdk = converted(raw, tmp_path / "disk.vmdk", "vmdk", "subformat=streamOptimized")
    for data in (ova(vmdk), gzip.compress(ova(vmdk)), ova(gzip.compress(vmdk))):
        (tmp_path / "web.ova").write_bytes(data)
        assert content(tmp_path / "web.ova") == raw.read_bytes()
        assert content(tmp_path / "web.ova", "vmdk") == raw.read_bytes()
        with pytest.raises(Invalid, match="no qcow2 image"):
            content(tmp_path / "web.ova", "qcow2")
    for data, said in (
        (ova(), "0 disks"),
        (ova(vmdk, vmdk), "2 disks"),
        (ova(vmdk)[: len(vmdk) // 2], "cut short"),
        (ova(vmdk)[:1148] + b"7" * 11 + ova(vmdk)[1159:], "cut short"),
        (ova(vmdk)[:1148] + b"-77" + ova(vmdk)[1151:], "damaged OVA"),
    ):
        (tmp_path / "web.ova").write_bytes(data)
        with pytest.raises(Invalid, match=said):
            content(tmp_path / "web.ova")


def test_raw_means_the_bytes_as_they_are(raw, tmp_path):
    (tmp_path / "disk.gz").write_bytes(gzip.compress(raw.read_bytes()))
    assert content(tmp_path / "disk.gz", "raw") == (tmp_path / "disk.gz").read_bytes()


def test_holes_stay_holes_and_progress_is_told(raw, tmp_path):
    (tmp_path / "disk.gz").write_bytes(gzip.compress(raw.read_bytes()))
    said = []
    with open_disk(tmp_path / "disk.gz", None, said.append) as disk:
        assert disk.next_data(3 * MIB)[0] >= 6 * MIB
    assert said and said[-1].stage == "unpack" and said[-1].done_bytes == said[-1].total_bytes


@pytest.mark.parametrize(
    ("kind", "filling"), [(k, f) for k in PACKED for f in (b"\0", b"x") if (k, f) != ("gz", b"\0")]
)  # gzip makes a thousandth of zeros at most: so much is allowed
def test_a_small_file_that_means_too_much_is_given_up_and_nothing_stays(kind, filling, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "LEAST_DATA_BYTES", MIB)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    size = 48 * MIB if filling == b"\0" else 16 * MIB
    (tmp_path / "bomb").write_bytes(PACKED[kind](filling * size))
    with pytest.raises(Invalid, match="mean more than"):
        content(tmp_path / "bomb")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_window_that_takes_too_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    (tmp_path / "disk").write_bytes(lzma.compress(b"x" * MIB, filters=filters))
    with pytest.raises(Invalid, match="Memory usage limit"):
        content(tmp_path / "disk")
