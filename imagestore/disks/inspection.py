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

from imagestore.errors import Invalid, NoSpace
from imagestore.formats.manifest import MAX_DISK_BYTES

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi")
_FOREIGN = {
    b"LUKS\xba\xbe": "is encrypted (LUKS)",
    b"conectix": "is a VHD image, which is not supported: convert it to VHDX or qcow2",
    b"QED\0": "is a QED image, which is not supported: convert it to qcow2",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
}
_DISK_SIGNS = (
    (510, b"\x55\xaa"), (1080, b"\x53\xef"), (0, b"XFSB"), (0x10040, b"_BHRfS_M"), (0x8001, b"CD001"),
    (0, b"hsqs"), (512, b"LABELONE"), (512, b"EFI PART"), (4086, b"SWAPSPACE2"), (1024, b"\xe2\xe1\xf5\xe0"),
)  # fmt: skip
_CPU_S, _WALL_S, _MEMORY_BYTES = 600, 1800, 2 << 30


def sniff(descriptor: int, what: str, format_: str | None) -> str:
    """The format of an open file, one of FORMATS. Raises Invalid when it is none, or not the one named."""
    head = os.pread(descriptor, 0x10048, 0)
    found = None
    if head[:4] == b"QFI\xfb":
        found = "qcow2"
    elif head[:4] == b"KDMV" or head[:21] == b"# Disk DescriptorFile":
        found = "vmdk"
    elif head[:8] == b"vhdxfile":
        found = "vhdx"
    elif head[0x40:0x44] == b"\x7f\x10\xda\xbe":
        found = "vdi"
    if format_ is not None:
        if format_ not in FORMATS:
            raise Invalid(f"unknown image format {format_!r}", hint=f"one of {', '.join(FORMATS)}")
        if format_ not in ("raw", found):
            raise Invalid(f"{what} is no {format_} image")
        return format_
    if found:
        return found
    for sign, reason in _FOREIGN.items():
        if head.startswith(sign):
            raise Invalid(f"{what} {reason}")
    if not any(head[at : at + len(sign)] == sign for at, sign in _DISK_SIGNS):
        hint = "it has no partition table or file system that sf knows; --input-format raw takes any bytes as a disk"
        raise Invalid(f"{what} is no disk image", hint=hint)
    return "raw"


@contextlib.contextmanager
def convert(path: Path, format_: str) -> Iterator[int]:
    """A descriptor of an unnamed raw copy of a VMDK, VHDX or VDI image, made by a limited qemu-img.

    Raises Invalid when the image is unsafe or broken, NoSpace when the temporary directory is full.
    """
    _judge(path, format_)
    source = [
        "--image-opts",
        f"driver={format_},file.driver=file,file.locking=off,file.filename={_escape(path)}",
    ]
    told = json.loads(_qemu_img(path, ["info", "--output=json", *source], 1 << 20))
    size = told.get("virtual-size", 0)
    if not 0 < size <= MAX_DISK_BYTES:
        raise Invalid(f"{path}: a disk of {size >> 40} TiB is larger than the 64 TiB allowed")
    if told.get("backing-filename") or told.get("encrypted"):
        raise Invalid(f"{path}: the image has a backing file or is encrypted")
    with tempfile.TemporaryDirectory(prefix="sf-convert-") as directory:
        raw = Path(directory) / "disk.raw"
        _qemu_img(path, ["convert", "-O", "raw", "-S", "4096", *source, str(raw)], size + (1 << 20))
        descriptor = os.open(raw, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _judge(path: Path, format_: str) -> None:
    """oslo.utils' opinion: extents in other files, polyglots, headers that lie."""
    from oslo_utils.imageutils import format_inspector

    try:
        inspector = format_inspector.detect_file_format(str(path))
        if inspector is None or str(inspector) != format_:
            raise Invalid(f"{path} looks like {inspector} and like {format_}: refused")
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        reasons = "; ".join(str(failure) for failure in error.failures.values())
        raise Invalid(f"{path} is refused: {reasons}") from error
    except format_inspector.ImageFormatError as error:
        raise Invalid(f"{path} is no good {format_} image: {error}") from error


def _escape(path: Path) -> str:
    """A file name inside qemu's comma-separated options."""
    return str(path.absolute()).replace(",", ",,")


def _qemu_img(path: Path, arguments: list[str], file_bytes: int) -> str:
    limits = [f"--cpu={_CPU_S}", f"--as={_MEMORY_BYTES}", f"--fsize={file_bytes}", "--core=0"]
    try:
        done = subprocess.run(
            ["prlimit", *limits, "qemu-img", *arguments],
            capture_output=True,
            text=True,
            timeout=_WALL_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise Invalid(f"{path}: this format needs qemu-img, which is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise Invalid(f"{path}: qemu-img took longer than {_WALL_S} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"qemu-img ended with {done.returncode}"])[-1]
        if "No space left" in last:
            raise NoSpace(f"{path}: no space for the converted disk in {tempfile.gettempdir()}")
        raise Invalid(f"{path}: {last.removeprefix('qemu-img: ')}")
    return done.stdout
