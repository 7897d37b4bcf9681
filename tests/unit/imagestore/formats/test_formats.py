import dataclasses

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.chunking import BLOCK, ChunkerParams
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import MAX_DISK_BYTES, Manifest
from imagestore.formats.pack import Codec, Footer, Frame, compress, expand, make_pack
from imagestore.store.inventory import open_tail
from imagestore.store.placement import Known


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def manifest(**changes):
    values = {
        "size_bytes": 100 * BLOCK + 7,
        "architecture": "x86_64",
        "chunker": ChunkerParams(),
        "disk_id": Digest(bytes(32)),
        "run_offsets": np.array([0, 98 * BLOCK], np.uint64),
        "run_chunks": np.array([2, 1], np.uint32),
        "lengths": np.array([2 * BLOCK, 3 * BLOCK, 2 * BLOCK + 7], np.uint32),
        "ids": ids(3),
        "labels": (("team", "shop"),),
    }
    return Manifest(**{**values, **changes})


def test_a_manifest_comes_back_and_says_where_its_chunks_lie():
    one = manifest()
    again = Manifest.decode(one.encode())
    assert again.encode() == one.encode()
    assert again.offsets.tolist() == [0, 2 * BLOCK, 98 * BLOCK]
    assert [length for _, length, _ in again.chunks()] == one.lengths.tolist()
    assert again.data_bytes == 7 * BLOCK + 7


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": 60 << 50}, {"size_bytes": 99 * BLOCK}, {"size_bytes": 100 * BLOCK + 8},
        {"architecture": "../x"}, {"run_chunks": np.array([2, 2], np.uint32)},
        {"run_chunks": np.array([3, 0], np.uint32)}, {"run_offsets": np.array([0, 5 * BLOCK], np.uint64)},
        {"run_offsets": np.array([98 * BLOCK, 0], np.uint64)}, {"run_offsets": np.array([1, 98 * BLOCK], np.uint64)},
        {"run_offsets": np.array([0, 2**63], np.uint64)}, {"lengths": np.array([0, BLOCK, BLOCK], np.uint32)},
        {"lengths": np.array([BLOCK + 1, BLOCK, BLOCK + 7], np.uint32)},
        {"lengths": np.array([1 << 20, BLOCK, BLOCK + 7], np.uint32)}, {"labels": (("a", "x" * 2000),)},
        {"labels": (("a\n", "x"),)}, {"ids": ids(4)}, {"ids": ids(2)}, {"size_bytes": MAX_DISK_BYTES + 1},
    ],
)  # fmt: skip
def test_a_manifest_that_breaks_a_rule_is_corrupt(changes):
    with pytest.raises(Corrupt):
        Manifest.decode(manifest(**changes).encode())


def pack(count=20, seed=1, salt=""):
    random = np.random.default_rng(seed)
    frames, chunks = [], {}
    compressor = zstandard.ZstdCompressor(level=3)
    for _ in range(count):
        parts = [
            bytes(random.bytes(10)) * int(random.integers(1, 3000)) for _ in range(int(random.integers(1, 9)))
        ]
        plain = b"".join(parts)
        names = [Digest.of(part) for part in parts]
        chunks |= dict(zip(names, parts, strict=True))
        codec, data = compress(compressor, plain)
        frames.append(Frame(codec, data, Digest.of(data), [len(part) for part in parts], b"".join(names)))
    return *make_pack(frames, salt), chunks


@given(st.integers(1, 40), st.integers(0, 99))
def test_every_chunk_of_a_pack_is_found_through_its_footer(count, seed):
    digest, footer, pieces, chunks = pack(count, seed)
    data = b"".join(pieces)
    read = open_tail(data[footer.data_bytes :], digest, len(data))
    assert read.encode() == footer.encode()
    offsets = read.offsets
    for at, (frame, inner) in enumerate(zip(read.frame_of_chunk, read.offset_in_frame, strict=True)):
        stored = data[offsets[frame] : offsets[frame] + read.sizes[frame]]
        assert Digest.of(stored) == read.hashes[frame].tobytes()
        plain = expand(read.codecs[frame], stored, int(read.plain_sizes[frame]))
        assert bytes(plain[inner : inner + read.lengths[at]]) == chunks[read.ids[at].tobytes()]


def test_a_salt_changes_a_packs_name_and_nothing_else():
    one, two = pack(3), pack(3, salt="x")
    assert one[0] != two[0]
    assert one[2][:-1] == two[2][:-1]


@given(st.binary(max_size=300), st.data())
def test_broken_objects_are_corrupt_and_nothing_worse(junk, data):
    digest, footer, _, _ = pack(4)
    layout = one_layout(footer, digest)
    part = IndexPart(((digest, footer),))
    decoders = [
        (manifest().encode(), Manifest.decode),
        (footer.encode(), Footer.decode),
        (layout.encode(), lambda raw: Layout.decode(raw, layout.manifest)),
        (part.encode(), IndexPart.decode),
        (Hooks().with_part(digest, part, 7).encode(), Hooks.decode),
    ]
    raw, decode = data.draw(st.sampled_from(decoders))
    cut = data.draw(st.integers(0, len(raw) - 1))
    broken = [raw[:cut], raw + b"\0", raw[:cut] + junk + raw[cut + len(junk) :], junk]
    broken.append(raw[:cut] + bytes([raw[cut] ^ 1 << data.draw(st.integers(0, 7))]) + raw[cut + 1 :])
    for one in broken:
        try:
            again = decode(one)
        except Corrupt:
            continue
        assert again.encode() == one  # other bytes, but of canonical form: only its digest can tell


def one_layout(footer, digest, manifest_digest=None):
    return Layout(
        manifest=manifest_digest or Digest(bytes(32)),
        packs=(digest,),
        frames=footer.frames(),
        chunk_frames=footer.frame_of_chunk.astype(np.uint32),
        chunk_offsets=footer.offset_in_frame.astype(np.uint32),
    )


def test_a_layout_comes_back_and_belongs_to_one_manifest():
    digest, footer, _, _ = pack(5)
    layout = one_layout(footer, digest)
    assert Layout.decode(layout.encode(), layout.manifest).encode() == layout.encode()
    with pytest.raises(Corrupt):
        Layout.decode(layout.encode(), Digest(b"x" * 32))


@pytest.mark.parametrize(
    ("column", "value"),
    [("pack", 1), ("offset", 1 << 30), ("size", 0), ("chunk_frames", 9), ("plain", 1 << 30)],
)  # fmt: skip
def test_a_layout_that_points_outside_is_corrupt(column, value):
    digest, footer, _, _ = pack(5)
    layout = one_layout(footer, digest)
    if column == "chunk_frames":
        broken = dataclasses.replace(layout, chunk_frames=np.full_like(layout.chunk_frames, value))
    else:
        broken = dataclasses.replace(layout, frames=layout.frames.copy())
        broken.frames[column] = value
    with pytest.raises(Corrupt):
        Layout.decode(broken.encode(), layout.manifest)


def test_a_layout_whose_chunks_leave_their_frames_does_not_fit_its_manifest():
    one = manifest()
    digest, footer, _, _ = pack(5)
    layout = dataclasses.replace(
        one_layout(footer, digest),
        chunk_frames=np.zeros(3, np.uint32),
        chunk_offsets=np.full(3, footer.plain_sizes[0], np.uint32),
    )
    with pytest.raises(Corrupt):
        layout.check(one)


@pytest.mark.parametrize("level", [1, 19])
def test_a_frame_that_would_grow_too_large_is_refused_before_it_does(level):
    bomb = zstandard.ZstdCompressor(level=level).compress(bytes(64 << 20))
    streamed = zstandard.ZstdCompressor(level=level, write_content_size=False).compress(bytes(64 << 20))
    for data in (bomb, streamed, b"", b"no frame"):
        with pytest.raises(Corrupt):
            expand(Codec.ZSTD, data, 256 << 10)
    with pytest.raises(Corrupt):
        expand(Codec.ZSTD, bomb, 64 << 20)
    with pytest.raises(Corrupt):
        expand(7, b"x", 1)


def test_what_does_not_compress_is_stored_as_it_is():
    data = np.random.default_rng(1).bytes(100_000)
    assert compress(zstandard.ZstdCompressor(level=3), data) == (Codec.RAW, data)


def test_hooks_find_the_part_that_shares_chunks_and_forget_it():
    parts = [IndexPart((pack(60, seed)[:2],)) for seed in range(6)]
    names = [Digest.of(part.encode()) for part in parts]
    hooks = Hooks()
    for name, part in zip(names, parts, strict=True):
        hooks = hooks.with_part(name, part, 100)
    hooks = Hooks.decode(hooks.encode())
    for name, part in zip(names, parts, strict=True):
        assert [found for found, _ in hooks.matching(part.footers[0][1].ids)] == [name]
    left = hooks.without(names[:3])
    assert left.parts == tuple(names[3:])
    assert left.matching(parts[0].footers[0][1].ids) == []
    assert [found for found, _ in left.matching(parts[5].footers[0][1].ids)] == [names[5]]
    assert left.without(names).encode() == Hooks().encode()


@given(st.lists(st.integers(1, 300), max_size=12))
def test_known_chunks_are_found_at_their_oldest_usable_place(sizes):
    known, everything = Known(), ids(300)
    place = {}
    for frame, size in enumerate(sizes):
        known.add(everything[:size], np.full(size, frame), np.arange(size))
        place = dict.fromkeys(range(size), frame) | place
    found = known.find(everything)
    assert [int(known.rows["frame"][row]) if row >= 0 else None for row in found] == [
        place.get(at) for at in range(300)
    ]
    assert (known.find(ids(50, seed=9)) == -1).all()
    if sizes:
        usable = np.arange(len(sizes)) != 0
        rows = known.find(everything, usable)
        assert all(known.rows["frame"][row] != 0 for row in rows if row >= 0)


def test_the_first_bytes_alone_prove_nothing():
    known = Known()
    one = ids(1)
    known.add(one, np.array([3]), np.array([0]))
    other = one.copy()
    other[0, 31] ^= 1
    assert columns.keys(other)[0] == columns.keys(one)[0]
    assert known.find(other).tolist() == [-1]
