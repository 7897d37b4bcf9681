"""The sparse file and its bitmap, across kills and power cuts."""

import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.cache.images import list_images
from imagestore.cache.partial import PartialImage
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import Manifest
from imagestore.store.store import Store
from tests.memory import Memory
from tests.tiny_store import CHUNK, disk, put_image


class Forgetful:
    """`os`, but a power cut undoes unsynced writes, all or some, in any order."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._unsynced: list[tuple[int, int, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        old = os.pread(fd, len(data), offset)
        self._unsynced += [(fd, offset + at, old[at : at + 512]) for at in range(0, len(old), 512)]
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(bytes(b) for b in buffers), offset)

    def fdatasync(self, fd: int) -> None:
        self._unsynced = [write for write in self._unsynced if write[0] != fd]

    def power_cut(self) -> None:
        for fd, offset, old in self._unsynced:
            if self._rng.random() < 0.7:
                os.pwrite(fd, old, offset)
        self._unsynced.clear()


@contextlib.contextmanager
def booted(directory: Path, boot: str, files: Forgetful | None = None) -> Iterator[None]:
    """A boot of the machine with this id."""
    (directory / "boot_id").write_text(boot * 36)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("imagestore.cache.partial.BOOT_ID", directory / "boot_id")
        if files:
            patched.setattr("imagestore.cache.partial.os", files)
        yield


def image(data: bytes) -> tuple[Digest, Manifest]:
    store = Store.init(Memory())
    digest = put_image(store, data)
    return digest, store.manifest(digest)


def keep(partial: PartialImage, data: bytes, chunks: list[int]) -> None:
    pieces = [data[partial.starts[c] : partial.ends[c]] for c in chunks]
    partial.write(chunks, pieces)
    partial.mark(chunks)


DATA = disk(3, 40)
DIGEST, MANIFEST = image(DATA)
COUNT = len(MANIFEST.lengths)


def test_what_was_flushed_is_there_after_a_kill_and_reads_give_its_bytes(tmp_path: Path) -> None:
    raw = tmp_path / "image.part"
    first = PartialImage(raw, DIGEST, MANIFEST)
    keep(first, DATA, [0, 1, 2, 7])
    first.flush()
    keep(first, DATA, [9])
    first.close()
    again = PartialImage(raw, DIGEST, MANIFEST)
    assert [c for c in range(COUNT) if again.present[c]] == [0, 1, 2, 7]
    assert again.present_bytes == 4 * CHUNK
    assert bytes(again.read_now(100, 70_000) or b"") == DATA[100:70_100]
    assert bytes(again.read_now(10, 100) or b"") == DATA[10:110]
    assert not again.complete
    assert raw.stat().st_blocks * 512 < len(DATA)


@pytest.mark.parametrize("same_boot", [True, False], ids=["same boot id", "another boot id"])
@given(data=st.data())
def test_after_a_power_cut_no_chunk_counts_as_present_whose_bytes_are_not(
    tmp_path_factory: pytest.TempPathFactory, same_boot: bool, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    raw = directory / "image.part"
    files = Forgetful(random.Random(data.draw(st.integers(0, 1000))))
    order = data.draw(st.permutations(range(COUNT)))
    flushed: set[int] = set()
    steps = data.draw(st.lists(st.booleans(), max_size=COUNT))
    with booted(directory, "a", files):
        partial = PartialImage(raw, DIGEST, MANIFEST)
        for chunk, flush in zip(order, steps, strict=False):
            keep(partial, DATA, [chunk])
            if flush:
                partial.flush()
                flushed.update(order[: order.index(chunk) + 1])
        files.power_cut()
        partial.close()
    with booted(directory, "a" if same_boot else "b"):
        again = PartialImage(raw, DIGEST, MANIFEST)
    present = {c for c in range(COUNT) if again.present[c]}
    assert present >= flushed
    assert all(again.check(c, again.read_chunk(c)) for c in present)
    again.close()


def test_after_a_reboot_a_disk_that_lied_about_syncing_is_found_out(tmp_path: Path) -> None:
    raw = tmp_path / "image.part"
    with booted(tmp_path, "a"):
        partial = PartialImage(raw, DIGEST, MANIFEST)
    keep(partial, DATA, list(range(COUNT)))
    partial.flush()
    partial.close()
    with raw.open("r+b") as file:
        file.seek(partial.starts[5] + 100)
        file.write(b"\0" * 512)
    with booted(tmp_path, "b"):
        again = PartialImage(raw, DIGEST, MANIFEST)
    assert [c for c in range(COUNT) if not again.present[c]] == [5]
    again.close()
    with booted(tmp_path, "b"):
        once_more = PartialImage(raw, DIGEST, MANIFEST)
    assert once_more.present.find(0) == 5


def test_a_bitmap_of_another_image_or_a_damaged_one_means_that_nothing_is_present(tmp_path: Path) -> None:
    raw = tmp_path / "image.part"
    partial = PartialImage(raw, DIGEST, MANIFEST)
    keep(partial, DATA, list(range(COUNT)))
    partial.flush()
    partial.close()
    other, manifest = image(disk(4, 40))
    assert not any(PartialImage(raw, other, manifest).present)
    raw.with_suffix(".have").write_bytes(b"sf-have 1\n")
    assert not any(PartialImage(raw, DIGEST, MANIFEST).present)


def test_a_raw_file_that_vanished_takes_its_bitmap_with_it(tmp_path: Path) -> None:
    raw = tmp_path / "image.part"
    partial = PartialImage(raw, DIGEST, MANIFEST)
    keep(partial, DATA, [0])
    partial.flush()
    partial.close()
    raw.unlink()
    assert not any(PartialImage(raw, DIGEST, MANIFEST).present)


def test_a_failed_flush_makes_the_chunks_missing_again(tmp_path: Path) -> None:
    class Broken(Forgetful):
        def fdatasync(self, fd: int) -> None:
            raise OSError(5, "Input/output error")

    partial = PartialImage(tmp_path / "image.part", DIGEST, MANIFEST)
    keep(partial, DATA, [0, 1])
    with booted(tmp_path, "a", Broken(random.Random(1))), pytest.raises(OSError, match="Input/output"):
        partial.flush()
    assert not any(partial.present) and partial.present_bytes == 0


def test_what_a_failed_flush_lost_is_no_part_of_a_complete_image(tmp_path: Path) -> None:
    class Broken(Forgetful):
        def fdatasync(self, fd: int) -> None:
            raise OSError(5, "Input/output error")

    partial = PartialImage(tmp_path / "image.part", DIGEST, MANIFEST)
    keep(partial, DATA, list(range(COUNT)))
    with booted(tmp_path, "a", Broken(random.Random(1))), pytest.raises(OSError, match="Input/output"):
        partial.seal(tmp_path / "image.raw")
    with pytest.raises(OSError, match="lost"):
        partial.seal(tmp_path / "image.raw")
    assert partial.path.exists() and not (tmp_path / "image.raw").exists()
    keep(partial, DATA, list(range(COUNT)))
    partial.seal(tmp_path / "image.raw")
    assert (tmp_path / "image.raw").read_bytes() == DATA


def test_an_image_is_sealed_after_what_another_thread_has_begun_to_flush(tmp_path: Path) -> None:
    partial, raw = PartialImage(tmp_path / "image.part", DIGEST, MANIFEST), tmp_path / "image.raw"
    keep(partial, DATA, list(range(COUNT)))
    sealing, early = threading.Thread(target=partial.seal, args=(raw,)), list[bool]()

    class Slow(Forgetful):
        def fdatasync(self, fd: int) -> None:
            if not early:
                sealing.start()
                sealing.join(0.2)
                early.append(raw.exists())
            os.fdatasync(fd)

    with booted(tmp_path, "a", Slow(random.Random(1))):
        partial.flush()
        sealing.join()
    assert early == [False]
    assert raw.read_bytes() == DATA


def test_an_image_is_not_closed_under_a_write(tmp_path: Path) -> None:
    partial = PartialImage(tmp_path / "image.part", DIGEST, MANIFEST)
    closing = threading.Thread(target=partial.close)

    class Slow(Forgetful):
        def pwritev(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
            closing.start()
            closing.join(0.2)
            return os.pwritev(fd, buffers, offset)

    with booted(tmp_path, "a", Slow(random.Random(1))):
        partial.write([0], [DATA[: partial.ends[0]]])
    closing.join()
    assert partial.path.read_bytes()[: partial.ends[0]] == DATA[: partial.ends[0]]
    with pytest.raises(OSError, match="Bad file descriptor"):
        partial.write([1], [DATA[partial.starts[1] : partial.ends[1]]])


@given(st.integers(0, len(DATA) - 1), st.integers(1, 8 * CHUNK), st.integers(1, 20))
def test_extents_tell_holes_from_data_and_cover_the_range(
    tmp_path_factory: pytest.TempPathFactory, offset: int, length: int, limit: int
) -> None:
    length = min(length, len(DATA) - offset)
    partial = PartialImage(tmp_path_factory.mktemp("extents") / "image.part", DIGEST, MANIFEST)
    found = partial.extents(offset, length, limit)
    at = offset
    for run, hole in found:
        assert run > 0
        assert all(
            hole == (DATA[b - b % CHUNK : b - b % CHUNK + CHUNK] == bytes(CHUNK)) for b in (at, at + run - 1)
        )
        at += run
    assert at == offset + length or len(found) == limit
    assert all(a[1] != b[1] for a, b in itertools.pairwise(found))
    partial.close()


def test_a_complete_image_is_sealed_under_its_final_name_and_read_from_there(tmp_path: Path) -> None:
    raw = tmp_path / "image.raw"
    partial = PartialImage(tmp_path / "image.part", DIGEST, MANIFEST)
    keep(partial, DATA, list(range(COUNT)))
    assert partial.complete
    partial.seal(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["image.raw"]
    assert raw.read_bytes() == DATA and raw.stat().st_mode & 0o777 == 0o444
    assert bytes(partial.read_now(0, 70_000) or b"") == DATA[:70_000]
    again = PartialImage(raw, DIGEST, MANIFEST, whole=True)
    assert again.complete and bytes(again.read_now(5, 10) or b"") == DATA[5:15]


def test_an_image_that_is_completed_while_the_cache_is_listed_is_on_the_list(tmp_path: Path) -> None:
    part, raw = tmp_path / f"{DIGEST.hex()}.part", tmp_path / f"{DIGEST.hex()}.raw"
    with ThreadPoolExecutor(1) as pool:
        for microseconds in range(1000):
            part.touch()
            listing = pool.submit(list_images, tmp_path)
            time.sleep(microseconds % 200 / 1e6)
            part.rename(raw)
            assert [row["digest"] for row in listing.result()] == [str(DIGEST)]
            raw.unlink()
