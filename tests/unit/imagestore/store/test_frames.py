"""The one reader of chunks: its requests, and what it does when packs move or lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.backends.directory import Directory
from imagestore.copy import copy_image
from imagestore.errors import Corrupt, NotFound
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, MANIFESTS, PACKS
from imagestore.formats.layout import Layout
from imagestore.push import push
from imagestore.store.frames import Frames, ImageReader, load, plan_requests
from imagestore.store.inventory import Inventory, read_tail
from imagestore.store.store import Store


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Digest, bytes]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    data = np.random.default_rng(5).bytes(6 << 20)
    (tmp_path / "disk.raw").write_bytes(data)
    store = Store.init(Directory(tmp_path / "store"))
    return store, push(store, tmp_path / "disk.raw", "a", format_="raw").digest, data


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), max_size=40),
    st.integers(1, 200),
    st.booleans(),
)
def test_requests_hold_every_range_once_in_order_and_without_bulk_no_gap(
    ranges: list[tuple[int, int]], limit: int, bulk: bool
) -> None:
    at, starts, ends = 0, [], []
    for gap, size in ranges:
        starts.append(at + gap)
        at = starts[-1] + size
        ends.append(at)
    requests = plan_requests(np.array(starts, np.int64), np.array(ends, np.int64), limit, bulk=bulk)
    assert [n for request in requests for n in range(request.start, request.stop)] == list(range(len(ranges)))
    for request in requests:
        several = request.stop - request.start > 1
        assert not several or ends[request.stop - 1] - starts[request.start] <= limit
        assert bulk or starts[request.start + 1 : request.stop] == ends[request.start : request.stop - 1]


def test_no_request_reaches_from_one_pack_into_the_next(world: tuple[Store, Digest, bytes]) -> None:
    store, digest, _ = world
    manifest, layout = store.manifest(digest), store.layout(digest)
    half = layout.frames.copy()
    half["pack"][len(half) // 2 :] = 1
    half["offset"][len(half) // 2 :] -= half["offset"][len(half) // 2]
    two = replace(layout, packs=(layout.packs[0], Digest.of(b"second")), frames=half)
    frames = Frames.of_image(manifest, two, range(len(manifest.lengths)))
    for request in frames.requests():
        assert len(set(frames.table["pack"][request].tolist())) == 1


def test_a_reader_looks_once_more_where_a_pack_went_and_goes_on_with_the_rest(
    world: tuple[Store, Digest, bytes], tmp_path: Path
) -> None:
    store, digest, data = world
    manifest = store.manifest(digest)
    reader = ImageReader(lambda: store, digest, manifest)
    old = reader.layout()
    # What a repack leaves: the same frames in a pack of another name, and a layout that says so.
    pack = store.backend.get(PACKS.key(old.packs[0])).data
    moved = Digest.of(b"moved")
    store.backend.put(PACKS.key(moved), pack)
    store.backend.delete(PACKS.key(old.packs[0]))
    store.backend.put(LAYOUTS.key(digest), replace(old, packs=(moved,)).encode())
    found: dict[int, bytes] = {}
    for loaded in reader.load(range(len(manifest.lengths))):
        chunks = loaded.frames.chunks[loaded.frames.rows(loaded.request)].tolist()
        pieces = [bytes(piece) for frame in loaded.pieces for piece in frame]
        found.update(zip(chunks, pieces, strict=True))
    assert b"".join(found[chunk] for chunk in range(len(found))) == data
    store.backend.delete(PACKS.key(moved))
    with pytest.raises(NotFound):
        list(reader.load([0]))


def test_a_copy_takes_no_frame_whose_chunks_are_not_what_the_source_says(
    world: tuple[Store, Digest, bytes], tmp_path: Path
) -> None:
    """A lying source could otherwise have later pushes find chunks that nobody can read."""
    store, digest, _ = world
    manifest, layout = store.manifest(digest), store.layout(digest)
    ids = manifest.ids.copy()
    ids[:] = np.roll(ids, 1, axis=0)
    liar = replace(manifest, ids=ids)
    name = Digest.of(liar.encode())
    store.backend.put(MANIFESTS.key(name), liar.encode())
    store.backend.put(LAYOUTS.key(name), replace(layout, manifest=name).encode())
    target = Store.init(Directory(tmp_path / "target"))
    with pytest.raises(Corrupt):
        copy_image(store, target, name)
    assert not Inventory.read(target).packs
    copy_image(store, target, digest)
    assert isinstance(target.layout(digest), Layout)


def test_chosen_chunks_of_a_pack_come_in_their_frames_whole_where_most_is_wanted(
    world: tuple[Store, Digest, bytes],
) -> None:
    store, digest, data = world
    pack = store.layout(digest).packs[0]
    footer, _ = read_tail(store.backend, pack)
    chosen = np.zeros(len(footer.lengths), np.bool_)
    chosen[::2] = True
    for split_above, whole in ((1.0, True), (0.01, False)):
        frames = Frames.of_pack(pack, footer, chosen, split_above=split_above)
        assert all(frames.whole(slice(0, len(frames.table)))) == whole
        for loaded in load(store, [frames]):
            for frame in loaded.pieces:
                assert all(bytes(piece) in data for piece in frame)
