"""Small disks for tests: random data, text, holes and repetitions, the same for a seed."""

import subprocess
from pathlib import Path

import numpy as np


def make_raw(path: Path, *, seed: int = 1, size_bytes: int = 6 << 20, odd_bytes: int = 0) -> Path:
    """A sparse raw disk with a partition table's signature."""
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.truncate(size_bytes + odd_bytes)
        at = 0
        while at < size_bytes:
            length = min(int(random.integers(1, 400)) * 4096 // 3, size_bytes - at)
            match random.integers(0, 4):
                case 0:
                    data = random.bytes(length)
                case 1:
                    data = (b"%d lines of text\n" % length) * (length // 8)
                case 2:
                    data = bytes(length)
                case _:
                    at += length
                    continue
            file.seek(at)
            file.write(data[:length])
            at += length
        file.seek(510)
        file.write(b"\x55\xaa")
        if odd_bytes:
            file.seek(size_bytes)
            file.write(random.bytes(odd_bytes))
    return path


def convert(source: Path, target: Path, format_: str, *options: str, source_format: str = "raw") -> Path:
    """qemu-img convert."""
    command = ["qemu-img", "convert", "-f", source_format, "-O", format_, *options, str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def identical(one: Path, one_format: str, other: Path, other_format: str) -> bool:
    """qemu-img compare."""
    command = ["qemu-img", "compare", "-f", one_format, "-F", other_format, str(one), str(other)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
