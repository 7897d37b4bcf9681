"""Images of strangers, of which an update is made, or none: with the work and the room that they are worth."""

import base64
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagestore.formats.digest import Digest
from imagestore.updates import making
from imagestore.updates.coding import starts
from imagestore.updates.making import make_update
from imagestore.updates.similar import samples
from tests.world import World, disk


def begun(count: int) -> bytes:
    """Large files of which only the beginning is there."""
    random, parts = np.random.default_rng(5), list[bytes]()
    for _ in range(count):
        packed = zlib.compressobj(6, 8, 31).compress(random.bytes(300 << 10))[: 270 << 10]
        parts.append(packed + bytes(-len(packed) % 512))
    return b"".join(parts)


@pytest.mark.parametrize("former", [False, True])
def test_a_file_is_looked_for_where_one_may_be_and_what_was_looked_at_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool
) -> None:
    monkeypatch.setattr("imagestore.updates.coding._LEAST", 1 << 20)
    monkeypatch.setattr(making, "_FILES", 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = base64.b64encode(np.random.default_rng(3).bytes(2 << 20))
    file = subprocess.run(["gzip", "-cn"], input=text, capture_output=True, check=True).stdout
    world, looks, real = World(tmp_path / "world"), list[tuple[int, int]](), making.files

    def look(data: Any, firsts: Any, heads: Any, **more: Any) -> Any:
        looks.append((len(heads), len(list(tmp_path.glob("sf-update-*/*")))))
        return real(data, firsts, heads, **more)

    monkeypatch.setattr(making, "files", look)
    base = world.push("it", disk(1) + (file + bytes(-len(file) % 512) if former else b"") + disk(2))
    make_update(world.store, base, world.push("it", disk(1) + begun(9) + disk(3)))
    # The former version's, and so many of the new one's, each where it begins; no file beside the one that is read.
    assert len(looks) == (4 if former else 1)
    assert max(heads for heads, _ in looks) <= 1
    assert min(left for _, left in looks) == 0


def test_a_block_in_which_everything_seems_to_begin_a_file_costs_no_more_than_a_few() -> None:
    """Each sector begins one whose first block leads past all others, to the same zeros without end."""
    count, zeros = 120, zlib.compressobj(9, 8, -15).compress(bytes(40 << 20))
    sectors = list[bytes]()
    for rest in range(count * 512 - 15, 0, -512):
        hop = b"\0" + struct.pack("<HH", rest, rest ^ 0xFFFF)
        sectors.append(b"\x1f\x8b\x08\0\1\1\1\1\0\3" + hop + b"n" * 497)
    assert 1 <= len([*starts(np.frombuffer(b"".join(sectors) + zeros, np.uint8))]) < 10


def test_bytes_whose_hash_is_nothing_are_no_error_where_nothing_is_held_against_them(tmp_path: Path) -> None:
    head = bytes([77, 0]) + b"abcdef"
    odd = head + struct.pack("<Q", -int.from_bytes(head, "little") * 0x9E3779B97F4A7C15 % (1 << 64))
    new = b"\xff" * 100 + odd + b"\xff" * (8192 - 116)
    assert samples(np.frombuffer(new, np.uint8))[0].tolist() == [0]
    world = World(tmp_path)
    base = world.push("it", b"\xfe" * 8192)
    make_update(world.store, base, world.push("it", new))


def test_a_file_that_only_its_size_says_is_the_former_one_is_left_to_frames_of_packs(tmp_path: Path) -> None:
    world, digests, made = World(tmp_path), list[Digest](), list[bytes]()
    for seed in (1, 2):
        plain = base64.b64encode(np.random.default_rng(seed).bytes(7 << 20))
        made.append(subprocess.run(["gzip", "-cn"], input=plain, capture_output=True, check=True).stdout)
        digests.append(world.push("it", disk(1) + made[-1] + bytes(-len(made[-1]) % 512) + disk(2)))
    step = make_update(world.store, *digests)
    assert step is None or step.size_bytes < len(made[1]) / 4
