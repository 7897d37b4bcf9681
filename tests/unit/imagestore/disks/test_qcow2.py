import os
import random
import struct
import subprocess

import pytest

from imagestore.disks.disk import read_range
from imagestore.disks.inspection import FORMATS
from imagestore.disks.open import open_disk
from imagestore.errors import Conflict, Invalid, StoreError
from tests.drills import rounds, seed
from tests.unit.imagestore.images import convert, make_raw


def content(path, format_=None):
    with open_disk(path, format_) as disk:
        return read_range(disk, 0, disk.size_bytes)


def qemu_io(path, *commands):
    lines = [part for command in commands for part in ("-c", command)]
    # Some fail (compressed over allocated clusters): what they left is an image like another.
    subprocess.run(["qemu-io", "-f", "qcow2", *lines, str(path)], check=False, capture_output=True)


def damaged_by_qemu(path):
    """Whether QEMU marked it corrupt while it wrote (incompatible feature 1): 7.2 does that to some of its own."""
    header = path.read_bytes()[:80]
    return header[7] == 3 and header[79] & 2


def as_qemu_sees(path, directory):
    raw = directory / "as-qemu-sees.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


def generate(random_, path):
    """A qcow2 image that guests and tools could have made: writes, zeros, discards and snapshots in any order."""
    bits = random_.choice([9, 12, 14, 16, 16, 18, 21])
    size = random_.randrange(1, 40) * random_.choice([512, 4096, 65536, 1 << 20])
    size = min(size, 8 << 20) if bits == 9 else size
    options = [f"cluster_size={1 << bits}"]
    version = random_.choice(["0.10", "1.1", "1.1"])
    options.append(f"compat={version}")
    kind = "zlib"
    if version == "1.1":
        kind = random_.choice(["zlib", "zstd"])
        refcount_bits = random_.choice([1, 8, 16, 64])
        options += [f"compression_type={kind}", f"refcount_bits={refcount_bits}"]
        if random_.random() < 0.3:
            options.append("lazy_refcounts=on")
    if random_.random() < 0.2:
        options.append(f"preallocation={random_.choice(['metadata', 'falloc', 'full'])}")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options), str(path), str(size)]
    subprocess.run(create, check=True)
    commands = []
    for _ in range(random_.randrange(12)):
        at = random_.randrange(size) & ~511
        length = max(512, min(random_.randrange(1, 1 << 18) & ~511, size - at))
        pattern = random_.randrange(256)
        command = random_.choice(["write", "write", "compressed", "zero", "unmap", "discard"])
        if command == "compressed":
            at, length = at >> bits << bits, 1 << bits
            if at + length > size:
                continue
        commands.append(
            {
                "write": f"write -P {pattern} {at} {length}",
                "compressed": f"write -c -P {pattern} {at} {length}",
                "zero": f"write -z {at} {length}",
                "unmap": f"write -z -u {at} {length}",
                "discard": f"discard {at} {length}",
            }[command]
        )
        if "refcount_bits=1" not in options and random_.random() < 0.1:
            qemu_io(path, *commands)
            commands = []
            if damaged_by_qemu(path):
                return
            subprocess.run(["qemu-img", "snapshot", "-c", f"s{at}", str(path)], check=True)
    if commands:
        qemu_io(path, *commands)


@pytest.mark.drill
def test_images_of_every_kind_read_as_qemu_reads_them(tmp_path):
    for number in range(rounds(2000)):
        path = tmp_path / "image.qcow2"
        path.unlink(missing_ok=True)
        generate(random.Random(seed() + number), path)
        if damaged_by_qemu(path):
            with pytest.raises(Invalid, match="corrupt"):
                content(path)
            continue
        assert content(path) == as_qemu_sees(path, tmp_path), f"seed {seed()} + {number}"


@pytest.mark.drill
@pytest.mark.parametrize(
    "options", [("-c",), ("-c", "-o", "compression_type=zstd"), ("-o", "cluster_size=4k")]
)
def test_a_broken_image_gives_an_error_or_bytes_but_never_a_crash(tmp_path, options):
    raw = make_raw(tmp_path / "disk.raw", size_bytes=1 << 20)
    good = convert(raw, tmp_path / "good.qcow2", "qcow2", *options).read_bytes()
    random_ = random.Random(seed())
    path = tmp_path / "broken.qcow2"
    for _ in range(rounds(3000)):
        broken = bytearray(good)
        for _ in range(random_.randrange(1, 6)):
            where = random_.choice([112, 4096, len(broken)])
            at = random_.randrange(min(where, len(broken) - 8))
            match random_.randrange(3):
                case 0:
                    broken[at] = random_.randrange(256)
                case 1:
                    broken[at : at + 8] = struct.pack(
                        ">Q", random_.choice([0, 1, 2**63, 2**64 - 1, len(broken), at])
                    )
                case _:
                    del broken[max(at, 512) :]
        path.write_bytes(broken)
        try:
            with open_disk(path, "qcow2") as disk:
                at = 0
                while (stretch := disk.next_data(at)) is not None and at < 64 << 20:
                    assert stretch[0] >= at
                    assert at < stretch[1] <= disk.size_bytes
                    assert len(read_range(disk, stretch[0], min(stretch[1] - stretch[0], 1 << 20))) > 0
                    at = stretch[1]
        except Invalid as error:
            assert "\n" not in str(error)


def patched(source, target, offset, format_, value):
    data = bytearray(source.read_bytes())
    struct.pack_into(format_, data, offset, value)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("offset", "format_", "value", "says"),
    [
        (4, ">I", 9, "version"), (8, ">Q", 512, "backing file"), (20, ">I", 30, "clusters"),
        (24, ">Q", 60 << 50, "virtual size"), (32, ">I", 2, "encrypted"), (36, ">I", 0, "L1 table"),
        (36, ">I", 1 << 30, "L1 table"), (40, ">Q", 1 << 40, "cut short"), (40, ">Q", 100, "cut short"),
        (72, ">Q", 1, "closed cleanly"), (72, ">Q", 2, "corrupt"), (72, ">Q", 4, "external file"),
        (72, ">Q", 16, "subclusters"), (72, ">Q", 1 << 40, "feature 40"), (104, ">B", 7, "compressed"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_with_the_reason(tmp_path, offset, format_, value, says):
    good = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "good.qcow2", "qcow2")
    with pytest.raises(Invalid, match=says):
        content(patched(good, tmp_path / "bad.qcow2", offset, format_, value))


@pytest.mark.parametrize(
    "arguments",
    [
        ("-o", "backing_file=base.qcow2,backing_fmt=qcow2"), ("-o", "data_file=data.raw"),
        ("-o", "extended_l2=on"),
        ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
    ],
)  # fmt: skip
def test_images_that_need_another_file_or_a_key_are_refused(tmp_path, arguments):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M"], check=True, cwd=tmp_path)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *arguments, "image.qcow2", "1M"]
    # LUKS measures the CPU to choose its iterations, and gives up where the clock is too coarse for that.
    assert any(subprocess.run(command, cwd=tmp_path).returncode == 0 for _ in range(20))
    with pytest.raises(Invalid):
        content(tmp_path / "image.qcow2")


@pytest.mark.parametrize("options", [(), ("-c",)])
def test_a_truncated_image_is_refused_and_never_padded_with_zeros(tmp_path, options):
    good = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "good.qcow2", "qcow2", *options)
    whole = good.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.95):
        (tmp_path / "cut.qcow2").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(Invalid):
            content(tmp_path / "cut.qcow2", "qcow2")


def test_two_clusters_in_one_place_are_refused(tmp_path):
    good = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "good.qcow2", "qcow2")
    data = bytearray(good.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    entry = next(data[at : at + 8] for at in range(l2, l2 + 65536, 8) if any(data[at : at + 8]))
    for at in range(l2, l2 + 640, 8):
        data[at : at + 8] = entry
    good.write_bytes(data)
    with pytest.raises(Invalid, match="share"):
        content(good)


def test_a_vmdk_that_names_another_file_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"root" * 1000)
    (tmp_path / "disk.vmdk").write_text(
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW 7 FLAT "{tmp_path / "secret"}" 0\n'
    )
    with pytest.raises(Invalid):
        content(tmp_path / "disk.vmdk")


@pytest.mark.parametrize("format_", ["vmdk", "vdi", "vhdx"])
def test_broken_foreign_images_are_invalid_in_one_line(tmp_path, format_):
    good = convert(make_raw(tmp_path / "disk.raw", size_bytes=1 << 20), tmp_path / f"good.{format_}", format_)
    whole, random_ = good.read_bytes(), random.Random(seed())
    for share in (0.01, 0.5):
        (tmp_path / "bad").write_bytes(whole[: int(len(whole) * share)])
        try:
            content(tmp_path / "bad", format_)
        except Invalid as error:
            assert "\n" not in str(error)
    for _ in range(3):
        broken = bytearray(whole)
        broken[600 : 600 + 2000] = random_.randbytes(2000)
        (tmp_path / "bad").write_bytes(broken)
        try:
            content(tmp_path / "bad", format_)
        except Invalid as error:
            assert "\n" not in str(error)


def test_an_unknown_format_and_a_wrong_one_are_refused(tmp_path):
    raw = make_raw(tmp_path / "disk.raw")
    for format_ in ("qcow", "", *FORMATS[1:]):
        with pytest.raises(Invalid):
            content(raw, format_)


@pytest.mark.parametrize("path", ["nothing-here", ".", "fifo"])
def test_a_path_that_cannot_be_read_is_an_error_of_ours(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError):
        content(tmp_path / path, "raw")


def test_a_disk_that_a_running_qemu_holds_is_refused(tmp_path):
    path = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "disk.qcow2", "qcow2")
    drive = f"file={path},format=qcow2,if=none,id=d"
    command = [
        "qemu-system-x86_64",
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-qmp",
        "stdio",
    ]
    command += ["-machine", "q35,accel=tcg", "-m", "32", "-drive", drive, "-device", "virtio-blk-pci,drive=d"]
    qemu = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        qemu.stdout.readline()
        with pytest.raises(Conflict, match="running guest"):
            content(path)
    finally:
        qemu.kill()
        qemu.wait()
    assert len(content(path)) == 6 << 20


def test_a_disk_of_no_bytes_is_empty_wherever_its_table_is_said_to_be(tmp_path):
    good = convert(make_raw(tmp_path / "disk.raw"), tmp_path / "good.qcow2", "qcow2")
    bad = patched(patched(good, tmp_path / "a", 24, ">Q", 0), tmp_path / "bad", 40, ">Q", 2**64 - 512)
    with pytest.raises(Invalid, match="empty"):
        content(bad)
