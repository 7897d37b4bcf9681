"""What kind of image a file is, looked at before anything opens it as one; conversion by a qemu-img in a cage.

Signatures: qcow2 (docs/interop/qcow2.rst in QEMU), VMDK, VHDX, VDI and VHD as in oslo.utils' format_inspector,
which also judges the formats that qemu-img will open.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imagestore.disks.filesystems import HEAD_BYTES, signs
from imagestore.disks.lengths import check_whole, vhd_size
from imagestore.disks.unpack import check_amount
from imagestore.errors import Invalid, NoSpace
from imagestore.formats.manifest import MAX_DISK_BYTES

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vhd")
_KNOWN = (
    (0, b"QFI\xfb", "qcow2"), (0, b"KDMV", "vmdk"), (0, b"vhdxfile", "vhdx"), (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)  # fmt: skip
_OTHERS = (
    (0, b"QFI\xfb\0\0\0\1", "is a qcow image of version 1", "qemu-img convert -f qcow -O qcow2"),
    (0, b"conectix", "is a dynamic VHD image", "qemu-img convert -f vpc -O qcow2"),
    (0, b"QED\0", "is a QED image", "qemu-img convert -f qed -O qcow2"),
    (0, b"WithoutFreeSpace", "is a Parallels image", "qemu-img convert -f parallels -O qcow2"),
    (0, b"WithouFreSpacExt", "is a Parallels image", "qemu-img convert -f parallels -O qcow2"),
    (0, b"COWD", "is a VMDK image of ESX", "qemu-img convert -f vmdk -O qcow2"),
    (0, b"# Disk DescriptorFile", "describes a VMDK whose data is in other files (a flat or split one)",
     "qemu-img convert -f vmdk -O qcow2"),
    (0, b"Bochs Virtual HD Image", "is a Bochs image", "qemu-img convert -f bochs -O qcow2"),
    (0, b"\x3a\xff\x26\xed", "is a sparse image of Android", "simg2img"),
    (0, b"LUKS\xba\xbe", "is encrypted (LUKS)", "cryptsetup open"),
    (0, b"\x04\x22\x4d\x18", "is compressed (lz4)", "unlz4"), (0, b"LZIP", "is compressed (lzip)", "lzip -d"),
    (0, b"\x89LZO", "is compressed (lzop)", "lzop -d"), (0, b"PK\x03\x04", "is a zip archive", "unzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "7z x"), (0, b"Rar!", "is a RAR archive", "unrar x"),
    (257, b"ustar", "is a tar archive", "tar -xf"),
)  # fmt: skip
_CPU_S, _WALL_S, _MEMORY_BYTES = 600, 1800, 2 << 30


def sniff(descriptor: int, what: str, format_: str | None) -> str:
    """The format of an open file, one of FORMATS. Raises Invalid when it is none, or not the one named."""
    if format_ not in (None, *FORMATS):
        raise Invalid(f"unknown image format {format_!r}", hint=f"one of {', '.join(FORMATS)}")
    if format_ == "raw":
        return format_
    head = os.pread(descriptor, HEAD_BYTES, 0)
    for at, sign, said, command in _OTHERS:
        if head[at : at + len(sign)] == sign:
            raise Invalid(f"{what} {said}", hint=f"push what `{command}` makes of it")
    found = next((kind for at, sign, kind in _KNOWN if head[at : at + len(sign)] == sign), None)
    found = found or ("vhd" if vhd_size(descriptor, what) else None)
    if format_ not in (None, found):
        raise Invalid(f"{what} is no {format_} image")
    if found:
        return found
    tabled = head[510:512] == b"\x55\xaa" or b"EFI PART" in (head[512:520], head[4096:4104])
    if not tabled and not signs(head):
        hint = "it has no partition table or file system that sf knows; --input-format raw takes any bytes as a disk"
        raise Invalid(f"{what} is no disk image", hint=hint)
    return "raw"


@contextlib.contextmanager
def convert(image: int, path: Path, format_: str) -> Iterator[int]:
    """A descriptor of an unnamed raw copy of an open VMDK, VHDX or VDI image, made by a limited qemu-img.

    The descriptor that was judged is what qemu-img reads, whatever `path` leads to meanwhile.
    Raises Invalid when the image is unsafe, broken or means too much, NoSpace when the temporary directory is full.
    """
    _judge(image, path, format_)
    check_whole(image, str(path), format_)
    where = f"file.driver=file,file.locking=off,file.filename={_place(image)}"
    source = ["--image-opts", f"driver={format_},{where}"]
    told = json.loads(_qemu_img(image, path, ["info", "--output=json", *source], 1 << 20))
    size = told.get("virtual-size", 0)
    if not 0 < size <= MAX_DISK_BYTES:
        raise Invalid(f"{path}: a disk of {size >> 40} TiB is larger than the 64 TiB allowed")
    if told.get("backing-filename") or told.get("encrypted"):
        raise Invalid(f"{path}: the image has a backing file or is encrypted")
    amount = json.loads(_qemu_img(image, path, ["measure", "-O", "qcow2", "--output=json", *source], 1 << 20))
    check_amount(str(path), amount["required"], os.fstat(image).st_size)
    with tempfile.TemporaryFile(prefix="sf-convert-") as raw:
        target = ["convert", "-O", "raw", "-S", "4096", *source, _place(raw.fileno())]
        _qemu_img(image, path, target, size + (1 << 20), raw.fileno())
        yield raw.fileno()


def _judge(image: int, path: Path, format_: str) -> None:
    """oslo.utils' opinion: extents in other files, polyglots, headers that lie."""
    from oslo_utils.imageutils import format_inspector

    try:
        inspector = format_inspector.detect_file_format(_place(image))
        if inspector is None or str(inspector) != format_:
            raise Invalid(f"{path} looks like {inspector} and like {format_}: refused")
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        reasons = "; ".join(str(failure) for failure in error.failures.values())
        raise Invalid(f"{path} is refused: {reasons}") from error
    except format_inspector.ImageFormatError as error:
        raise Invalid(f"{path} is no good {format_} image: {error}") from error


def _place(image: int) -> str:
    """Where a process that has the descriptor opens the same file again."""
    return f"/proc/self/fd/{image}"


def _qemu_img(image: int, path: Path, arguments: list[str], file_bytes: int, *more: int) -> str:
    done = caged(["qemu-img", *arguments], file_bytes, pass_fds=(image, *more))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"qemu-img ended with {done.returncode}"])[-1]
        if "No space left" in last:
            raise NoSpace(f"{path}: no space for the converted disk in {tempfile.gettempdir()}")
        raise Invalid(f"{path}: {last.removeprefix('qemu-img: ').replace(_place(image), path.name)}")
    return done.stdout


def caged(
    argv: list[str], file_bytes: int, *, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program on what strangers made, within limits. Raises Invalid where it is not there or takes too long."""
    limits = [f"--cpu={_CPU_S}", f"--as={_MEMORY_BYTES}", f"--fsize={file_bytes}", "--core=0"]
    told: dict[str, str] = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            ["prlimit", *limits, *argv], capture_output=True, text=True, errors="replace",
            timeout=_WALL_S, stdin=subprocess.DEVNULL, pass_fds=pass_fds, env=told,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Invalid(f"this needs {argv[0]}, which is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise Invalid(f"{argv[0]} took longer than {_WALL_S} s") from error
