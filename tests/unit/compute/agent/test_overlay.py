"""Overlays that we write ourselves, as qemu reads them."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.agent.guest import overlay
from compute.agent.guest.disks import Disks
from compute.agent.guest.record import DisksHeld
from compute.errors import Invalid
from compute.wire.spec import DiskSpec
from imagestore import Digest
from imagestore.cache.images import ImageCache


def info(path: Path) -> dict[str, object]:
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", path], capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("size_bytes", [512, 1 << 20, (1 << 29) + 512, 8 << 30, 16 << 40])
def test_qemu_img_finds_no_fault_in_an_empty_disk(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "vda.qcow2"
    overlay.create(path, size_bytes, None)
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True, capture_output=True)
    assert info(path)["virtual-size"] == size_bytes == overlay.virtual_size(path)


def test_an_overlay_shows_its_image_and_takes_writes_of_its_own(tmp_path: Path) -> None:
    image, path = tmp_path / "image.raw", tmp_path / "vda.qcow2"
    image.write_bytes(bytes(range(256)) * 5000 + b"odd")
    image.chmod(0o444)
    overlay.create(path, 0, image, image.stat().st_size)
    found = info(path)
    assert (found["virtual-size"], found["full-backing-filename"]) == (1280512, str(image))
    assert found["backing-filename-format"] == "raw"
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read -P 0x01 1 1", "-c", "write -P 0x5a 1M 64k", path],
        check=True,
        capture_output=True,
    )
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True, capture_output=True)
    read = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 1M 64k", "-c", "read -P 0x03 3 1", path],
        capture_output=True,
        text=True,
    )
    assert "failed" not in read.stdout and read.returncode == 0


def test_a_disk_that_is_there_is_never_written_again(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"a guest's data")
    overlay.create(path, 1 << 20, None)
    assert path.read_bytes() == b"a guest's data"


def test_a_disk_smaller_than_its_image_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="its image 1024"):
        overlay.create(tmp_path / "vda.qcow2", 512, tmp_path / "image.raw", 1000)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(min_value=-5, max_value=1 << 50).filter(lambda n: n <= 0 or n % 512))
def test_a_size_that_is_no_multiple_of_512_is_refused(size_bytes: int) -> None:
    with pytest.raises(Invalid):
        overlay.qcow2(size_bytes)


def test_a_disk_stands_on_what_its_header_says(tmp_path: Path) -> None:
    """A guest that resumed stands on the disk of that moment, and not on the image of its record."""
    cache, own = ImageCache(tmp_path / "cache", {}), Digest.of(b"a warm state's disk")
    host: Any = SimpleNamespace(directory=tmp_path)
    held: Any = SimpleNamespace(now=DisksHeld())
    disks, disk = Disks(host, "web", held, print), DiskSpec("vda", str(Digest.of(b"the record's image")))
    (tmp_path / "web").mkdir()
    overlay.create(disks.overlay("vda"), 1 << 20, cache.path(own))
    assert disks.image(disk) == str(own)
