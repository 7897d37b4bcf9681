"""Updates: what a version costs who holds another; whatever is wrong with one, the bytes are right."""

import base64
import gzip
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Object
from imagestore.backends.wrappers import Wrapper
from imagestore.cache.intake import Brought, bring
from imagestore.cache.partial import PartialImage
from imagestore.copy import copy_image
from imagestore.formats.digest import Digest
from imagestore.formats.keys import DELTAS, MANIFESTS, PACKS, SUMS, UPDATES
from imagestore.formats.pack import FRAME_BYTES
from imagestore.formats.update import Step, Update, encode_steps
from imagestore.mirror import signing
from imagestore.mirror.content import compute_sums, read_sums
from imagestore.mirror.replicate import replicate
from imagestore.pull import PullResult, Seed, pull
from imagestore.push import PushResult, push
from imagestore.store.frames import StoreOrigin
from imagestore.store.store import Store
from imagestore.updates.coding import File, files, pack_file, starts, unpack
from imagestore.updates.making import make_update
from imagestore.updates.using import UpdateOrigin, read_steps
from imagestore.verify import repair, verify_store
from tests.memory import Memory
from tests.world import World, disk, write_pages

PULL = sys.modules["imagestore.pull"]  # the module, not the function


class Versions:
    """Two versions of an image: nearly all chunks of the second are others, and nearly all of their bytes are not."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        old, random = bytearray(disk(1, 2, 3, 4)), np.random.default_rng(7)
        self.former = world.push("it", bytes(old))
        self.file = directory / "former.raw"
        self.file.write_bytes(old)
        for at in range(0, len(old), 24 << 10):
            old[at + 100 : at + 116] = random.bytes(16)
        self.digest = world.push("it", bytes(old) + disk(9, blocks=4))
        self.seed = Seed(world.store.manifest(self.former), self.file)

    def pull(self, seed: Seed | None = None) -> PullResult:
        out = self.directory / "out.raw"
        done = pull(
            self.world.store, self.digest, out, format_="raw", seeds=[seed or self.seed], durable=False
        )
        assert out.read_bytes() == self.world.images[self.digest]
        out.unlink()
        return done


@pytest.fixture(params=[False, True], ids=["whole", "pages"])
def versions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Versions]:
    write_pages() if request.param else None
    yield Versions(World(tmp_path / "world"), tmp_path)
    write_pages(None)


def made(versions: Versions) -> Step:
    step = make_update(versions.world.store, versions.former, versions.digest)
    assert step is not None
    return step


def test_who_holds_the_former_version_fetches_a_fraction_and_has_the_same_bytes(versions: Versions) -> None:
    frames = versions.pull()
    step = made(versions)
    update = versions.pull()
    assert update.fetched_bytes == step.size_bytes - step.head_bytes
    assert update.fetched_bytes < frames.fetched_bytes / 4
    assert versions.world.store.backend.stat(DELTAS.key(step.name)).size_bytes == step.size_bytes


def test_a_flipped_bit_in_what_is_held_costs_bytes_and_nothing_else(versions: Versions) -> None:
    made(versions)
    data = bytearray(versions.file.read_bytes())
    for at in range(50_000, len(data), 200_000):
        data[at] ^= 1
    versions.file.write_bytes(data)
    versions.pull()
    versions.file.write_bytes(data[: 1 << 20])
    versions.pull()


@pytest.mark.parametrize("at", [30, 0.6])
@pytest.mark.parametrize("how", ["flip", "cut", "zero", "gone"])
def test_a_damaged_update_brings_no_wrong_byte(versions: Versions, at: float, how: str) -> None:
    step, objects = made(versions), versions.world.memory.objects
    key = DELTAS.key(step.name)
    data = bytearray(objects[key].data)
    place = at if isinstance(at, int) else int(at * len(data))
    if how == "flip":
        data[place] ^= 4
    elif how == "cut":
        del data[place:]
    else:
        data[place : place + 500] = bytes(len(data[place : place + 500]))
    versions.world.store.backend.put(key, bytes(data))
    if how == "gone":
        del objects[key]
    versions.pull()
    report = verify_store(versions.world.store, full=True)
    assert {problem.key for problem in report.problems} == {UPDATES.key(versions.digest)}
    assert repair(versions.world.store, report, versions.world.store, full=True).problems == []


def test_a_hostile_update_is_refused_whatever_it_names(versions: Versions) -> None:
    """Its head is in order and has the right name; what it says is not so."""
    step, store = made(versions), versions.world.store
    whole = store.backend.get(DELTAS.key(step.name)).data
    head, frames = whole[: step.head_bytes], whole[step.head_bytes :]
    good = Update.decode(head, step.name, versions.former, versions.digest)
    columns = {
        name: getattr(good, name) for name in ("sizes", "counts", "base_counts", "chunks", "base_chunks")
    }
    for name, column in columns.items():
        for value in (0, 1, 7, 2**31, 2**32 - 1):
            wrong = {**columns, name: np.full_like(column, value)}
            bad = Update(good.base, good.to, *wrong.values(), good.hashes).encode()
            sealed = Step(Digest.of(bad), len(bad), len(bad) + len(frames))
            store.backend.put(DELTAS.key(sealed.name), bad + frames)
            store.backend.put(UPDATES.key(versions.digest), encode_steps({versions.former: sealed}))
            versions.pull()
    for data in (
        b"",
        b"{}",
        encode_steps({versions.digest: step}),
        encode_steps({versions.former: step})[:-9],
    ):
        store.backend.put(UPDATES.key(versions.digest), data)
        versions.pull()


def test_a_frame_that_is_said_to_be_huge_is_not_asked_for(versions: Versions) -> None:
    """Who serves updates need not say how long an answer is, so what is asked for is all that bounds it."""
    step, asked = made(versions), list[int]()
    data = versions.world.store.backend.get(DELTAS.key(step.name)).data
    good = Update.decode(data[: step.head_bytes], step.name, versions.former, versions.digest)
    head = replace(good, sizes=np.full_like(good.sizes, 1 << 31)).encode()
    sealed = Step(Digest.of(head), len(head), 1 << 40)
    versions.world.store.backend.put(DELTAS.key(sealed.name), head)
    versions.world.store.backend.put(UPDATES.key(versions.digest), encode_steps({versions.former: sealed}))

    class Counted(Wrapper):
        def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
            asked.append(length or 0)
            return super().get(key, start, length)

    store, out = Store(Counted(versions.world.memory), versions.world.store.info), versions.directory / "out"
    pull(store, versions.digest, out, format_="raw", seeds=[versions.seed], durable=False)
    assert out.read_bytes() == versions.world.images[versions.digest]
    assert len(head) in asked
    assert max(asked) <= 64 << 20


def test_a_node_that_holds_the_former_version_fills_the_next_from_the_update(versions: Versions) -> None:
    made(versions)
    store, manifest = versions.world.store, versions.world.store.manifest(versions.digest)
    partial = PartialImage(versions.directory / "it.part", versions.digest, manifest)
    update = UpdateOrigin(lambda: store, versions.digest, manifest, [versions.seed])
    other = StoreOrigin("a store", lambda: store, versions.digest, manifest)
    brought, chunks = Brought(), list(range(len(manifest.ids)))
    threads = [
        threading.Thread(target=bring, args=(partial, chunks[at::3], [update, other], {}, brought))
        for at in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(brought.kept) == chunks
    assert brought.error is None
    assert brought.received["update"]
    update.close()
    partial.close()


def test_mirrors_carry_updates_and_collectors_take_them_with_their_image(versions: Versions) -> None:
    step, world = made(versions), versions.world
    target = Store.init(Memory(clock=lambda: world.now_s), single_writer=True)
    assert {done.result for done in replicate(world.store, target)} == {"new"}
    assert read_steps(target, versions.digest) == {versions.former: step}
    assert verify_store(target, full=True).problems == []
    world.collect_for(100)
    assert world.store.has(DELTAS.key(step.name))
    world.push("it", disk(5))
    world.collect_for(200)
    assert not any(key.startswith(("deltas/", "updates/")) for key in world.memory.objects)
    world.check_all()


def test_a_mirror_that_has_the_former_version_brings_the_next_by_the_update(versions: Versions) -> None:
    made(versions)
    world = versions.world
    for bad in (False, True):
        memory, sent = Memory(), Counter[str]()
        target = Store.init(memory, single_writer=True)
        copy_image(world.store, target, versions.former)
        if bad:  # a flipped bit in what it has
            pack = PACKS.key(target.layout(versions.former).packs[0])
            data = bytearray(right := memory.objects[pack].data)
            data[100] ^= 1
            memory.put(pack, data)

        class Counted(Wrapper):
            def get(
                self, key: str, start: int = 0, length: int | None = None, sent: Counter[str] = sent
            ) -> Object:
                found = super().get(key, start, length)
                sent[key.partition("/")[0]] += len(found.data)
                return found

        source = Store(Counted(world.memory), world.store.info)
        copy_image(source, target, versions.digest)
        if bad:
            memory.put(pack, right)
        out = versions.directory / "out"
        pull(target, versions.digest, out, format_="raw", durable=False)
        assert out.read_bytes() == world.images[versions.digest]
        assert (sent["packs"] < 2 * FRAME_BYTES) is not bad
        assert verify_store(target, full=True).problems == []


def test_what_a_mirror_says_beside_an_image_replaces_nothing_of_ours(versions: Versions) -> None:
    """Nothing shows that it is right, and an image may be here by another name."""
    world, target = versions.world, Store.init(Memory(), single_writer=True)
    copy_image(world.store, target, versions.digest)
    sums = compute_sums(target, versions.digest)
    keys = [SUMS.key(digest) for digest in (versions.digest, versions.former)]
    for key in keys:
        world.memory.put(key, b"another's")
    world.store.names.set("former", "latest", "x86_64", versions.former)
    assert {done.result for done in replicate(world.store, target)} == {"new"}
    assert read_sums(target, versions.digest) == sums
    assert target.backend.get(keys[1]).data == b"another's"


def test_an_update_that_saves_nothing_is_not_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    base, to = world.push("it", disk(1, 2)), world.push("it", disk(3, 4))
    assert make_update(world.store, base, to) is None
    assert make_update(world.store, to, to) is None
    empty = world.push("it", bytes(1 << 20))
    assert make_update(world.store, empty, to) is None
    assert make_update(world.store, to, empty) is None


def test_a_push_makes_the_update_from_what_the_name_was(tmp_path: Path) -> None:
    world, path = World(tmp_path / "world"), tmp_path / "disk"
    data = bytearray(disk(1, 2))
    path.write_bytes(data)
    options = {"format_": "raw", "cache": tmp_path / "cache", "update": True}
    first = push(world.store, path, "it", **options)  # type: ignore[arg-type]
    assert first.update_bytes == 0
    for at in range(0, len(data), 50_000):
        data[at] ^= 1
    path.write_bytes(data)
    second = push(world.store, path, "it", **options)  # type: ignore[arg-type]
    assert 0 < second.update_bytes < second.written_bytes / 2
    assert read_steps(world.store, second.digest)[first.digest].size_bytes == second.update_bytes


def test_where_little_is_new_a_push_to_a_directory_makes_the_update_by_itself(tmp_path: Path) -> None:
    data = bytearray(disk(*range(8)))
    for number, changes in enumerate((1, 16)):
        store = Store.init(Directory(tmp_path / str(number)))
        path, done = tmp_path / "disk", list[PushResult]()
        for _ in range(2):
            path.write_bytes(data)
            options = {"format_": "raw", "cache": tmp_path / "cache", "update": None}
            done.append(push(store, path, "it", **options))  # type: ignore[arg-type]
            for at in range(changes):
                data[1000 + at * (256 << 10)] ^= 1
        assert done[0].update_bytes == 0
        assert bool(done[1].update_bytes) is (changes == 1)


def test_a_push_whose_update_cannot_be_made_is_a_push_that_says_so(tmp_path: Path) -> None:
    world, path = World(tmp_path / "world"), tmp_path / "disk"
    former = world.push("it", disk(1, 2))
    for pack in world.store.layout(former).packs:
        data = bytearray(world.memory.objects[PACKS.key(pack)].data)
        data[100] ^= 1
        world.memory.put(PACKS.key(pack), data)
    path.write_bytes(disk(3, 4))
    options = {"format_": "raw", "cache": tmp_path / "cache", "architecture": "x86_64", "update": True}
    done = push(world.store, path, "it", **options)  # type: ignore[arg-type]
    assert world.store.names.get("it").digest("x86_64") == done.digest
    assert (done.changed, done.update_bytes) == (True, 0)
    assert "no update" in done.notes[0]


def test_who_signs_a_name_anew_makes_the_update_from_what_it_was(versions: Versions) -> None:
    store, keys = versions.world.store, signing.Keyring(versions.directory / "keys")
    signing.init(store, keys)
    publisher = signing.Publisher(store, keys)
    name = ("it", "latest", "x86_64")
    publisher.publish({name: versions.former})
    assert read_steps(store, versions.former) == {}
    publisher.publish({name: versions.digest})
    steps = read_steps(store, versions.digest)
    assert list(steps) == [versions.former]
    versions.world.memory.objects.pop(DELTAS.key(steps[versions.former].name))
    publisher.publish({name: versions.digest})  # nothing changed, so nothing is made
    assert not store.has(DELTAS.key(steps[versions.former].name))
    versions.world.store.backend.delete(MANIFESTS.key(versions.digest))
    assert publisher.publish({name: versions.former}).changed == (name,)


def test_a_timestamp_that_is_renewed_while_an_update_is_made_keeps_nobody_from_publishing(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, keys = versions.world.store, signing.Keyring(versions.directory / "keys")
    signing.init(store, keys)
    publisher, name = signing.Publisher(store, keys), ("it", "latest", "x86_64")
    publisher.publish({name: versions.former})

    def slow(*told: Any) -> Step | None:
        publisher.refresh()  # as the timer does once a day
        return make_update(*told)

    monkeypatch.setattr(signing, "make_update", slow)
    assert publisher.publish({name: versions.digest}).changed == (name,)
    assert publisher.published()[0] == {name: versions.digest}
    assert list(read_steps(store, versions.digest)) == [versions.former]


def test_a_store_that_is_away_for_the_update_alone_costs_frames(versions: Versions) -> None:
    made(versions)

    class Without(Wrapper):
        def _do(self, verb: str, key: str, action):  # type: ignore[no-untyped-def]
            if key.startswith("deltas/"):
                raise OSError("hung up")
            return action()

    store = Store(Without(versions.world.memory), versions.world.store.info)
    out = versions.directory / "out.raw"
    pull(store, versions.digest, out, format_="raw", seeds=[versions.seed], durable=False)
    assert out.read_bytes() == versions.world.images[versions.digest]


def test_what_moved_far_and_changed_a_little_is_found(tmp_path: Path) -> None:
    """The dictionary of a frame is then from all over the former version, and several times as large as the frame."""
    world, random = World(tmp_path), np.random.default_rng(3)
    pieces = random.integers(0, 256, (64, 128 << 10), np.uint8)
    base = world.push("it", pieces.tobytes())
    pieces[:, 100::8192] ^= 1
    step = make_update(world.store, base, world.push("it", random.permutation(pieces).tobytes()))
    assert step is not None
    assert step.size_bytes < pieces.nbytes / 15


class Recompressed(Versions):
    """A file of gzip's among other things, and another build of it: a byte here and there, and its name."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        plain = bytearray(base64.b64encode(np.random.default_rng(5).bytes(8 << 20)))
        self.file, listed = directory / "former.raw", directory / "initrd"
        images = list[bytes]()
        for options in ("-n", "-N"):
            listed.write_bytes(plain)
            packed = subprocess.run(["gzip", "-c", options, listed], capture_output=True, check=True).stdout
            images.append(disk(1) + bytes(512) + packed + bytes(-(512 + len(packed)) % 4096) + disk(2))
            plain[::1_000_000] = b"!" * len(plain[::1_000_000])
        self.former, self.digest = (world.push("it", image) for image in images)
        self.file.write_bytes(images[0])
        self.seed = Seed(world.store.manifest(self.former), self.file)


@pytest.fixture
def slow_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which gzip is faster."""
    monkeypatch.setattr(PULL, "_GZIP_BYTES_S", 1 << 60)


@pytest.fixture
def recompressed(tmp_path: Path) -> Versions:
    return Recompressed(World(tmp_path / "world"), tmp_path)


def test_what_gzip_compressed_anew_costs_what_changed_in_it(
    recompressed: Versions, monkeypatch: pytest.MonkeyPatch, slow_line: None
) -> None:
    frames = recompressed.pull()
    step = made(recompressed)
    assert step.size_bytes < 50_000 < frames.fetched_bytes / 100
    assert recompressed.pull().fetched_bytes < 50_000 + 2 * FRAME_BYTES
    store, manifest = recompressed.world.store, recompressed.world.store.manifest(recompressed.digest)
    guest = UpdateOrigin(lambda: store, recompressed.digest, manifest, [recompressed.seed])
    few = [chunk for batch in guest.fetch(range(len(manifest.ids))) for chunk in batch.chunks]
    assert manifest.lengths[few].sum() < 4 << 20  # a guest does not wait for gzip
    guest.close()
    with monkeypatch.context() as fast:
        fast.setattr(PULL, "_GZIP_BYTES_S", 0)
        assert recompressed.pull().fetched_bytes > frames.fetched_bytes / 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert recompressed.pull().fetched_bytes > frames.fetched_bytes / 2
    assert store.backend.stat(DELTAS.key(step.name)).size_bytes < 50_000


def test_a_flipped_bit_in_the_old_file_brings_no_wrong_byte(recompressed: Versions, slow_line: None) -> None:
    made(recompressed)
    good = bytearray(recompressed.file.read_bytes())
    for at in (good.index(b"\x1f\x8b") + 1, len(good) // 2):
        wrong = good.copy()
        wrong[at] ^= 1
        recompressed.file.write_bytes(wrong)
        assert recompressed.pull().fetched_bytes > 4 << 20


def test_two_files_in_one_chunk_of_which_the_second_comes_without_gzip(
    tmp_path: Path, slow_line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagestore.updates.coding._LEAST", 1 << 20)
    world, former = World(tmp_path / "world"), tmp_path / "former.raw"
    plains = [bytearray(base64.b64encode(np.random.default_rng(size).bytes(size << 20))) for size in (2, 3)]
    digests = list[Digest]()
    for _ in range(2):
        image = disk(1)
        for plain in plains:
            packed = subprocess.run(["gzip", "-cn"], input=plain, capture_output=True, check=True).stdout
            image += packed + bytes(-len(packed) % 512)
            plain[::500_000] = b"!" * len(plain[::500_000])
        digests.append(world.push("it", image + bytes(512) + disk(2)))
    former.write_bytes(world.images[digests[0]])
    step = make_update(world.store, *digests)
    assert step is not None
    assert step.size_bytes < 2 << 20
    seed, out = Seed(world.store.manifest(digests[0]), former), tmp_path / "out.raw"
    done = pull(world.store, digests[1], out, format_="raw", seeds=[seed], durable=False)
    assert out.read_bytes() == world.images[digests[1]]
    assert done.fetched_bytes < 3 << 20


def test_a_file_that_is_mostly_zeros_ends_where_its_stream_ends() -> None:
    """Its stream is short, so its first look is all of it."""
    head, both = base64.b64encode(np.random.default_rng(5).bytes(120 << 10)), list[tuple[File, bytes]]()
    for plain in (head + bytes(9 << 20), head + bytes(8 << 20) + b"!" + bytes(1 << 20)):
        packed = subprocess.run(["gzip", "-cn"], input=plain, capture_output=True, check=True).stdout
        image = disk(1) + packed + bytes(-len(packed) % 4096) + disk(2, 3)
        firsts = np.arange(0, len(image) + 1, 4096)
        data = np.frombuffer(image, np.uint8)
        (one,) = files(data, firsts, list(starts(data)))
        begin, end = firsts[list(one[0])].tolist()
        assert end - begin == -(-len(packed) // 4096) * 4096
        both.append((one, image[begin:end]))
    (old, base), (new, wanted) = both
    assert unpack(pack_file(new, old), base, len(wanted)) == wanted


def test_a_hostile_frame_of_a_file_is_refused_whatever_it_says(
    recompressed: Versions, slow_line: None
) -> None:
    step, store = made(recompressed), recompressed.world.store
    whole = store.backend.get(DELTAS.key(step.name)).data
    good = Update.decode(whole[: step.head_bytes], step.name, recompressed.former, recompressed.digest)
    at = whole.index(b"sf-gzip2", step.head_bytes)
    frame = int(np.searchsorted(np.cumsum(good.sizes), at - step.head_bytes, "right"))
    end = at + int(good.sizes[frame])
    empty = gzip.compress(b"")
    body = zstandard.ZstdDecompressor().decompress(whole[at + 24 : end])
    shifts = 4 * -(-int.from_bytes(whole[at + 20 : at + 24], "little") // 256)
    for bad in (
        b"sf-gzip2",
        b"sf-gzip1" + whole[at + 8 : end],
        *(whole[at : at + 8 + 4 * n] + b"\xff\xff\xff\xff" + whole[at + 12 + 4 * n : end] for n in range(4)),
        *(whole[at : at + 8 + 4 * n] + b"\1\0\0\0" + whole[at + 12 + 4 * n : end] for n in range(4)),
        *(
            whole[at : at + 24] + zstandard.compress(word * (shifts // 4) + body[shifts:])
            for word in (b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff\xff\xff\xff")
        ),
        whole[at : at + 24] + zstandard.compress(body[:-1]),
        whole[at : at + 20] + bytes(4) + whole[at + 24 : end],
        whole[at : at + 12] + bytes(12) + zstandard.compress(b""),
        whole[at : at + 24] + whole[at:end],
        whole[at : at + 24] + empty,
        whole[at : at + 24],
        whole[at : end - 100],
    ):
        sizes, hashes = good.sizes.copy(), good.hashes.copy()
        sizes[frame], hashes[frame] = len(bad), np.frombuffer(Digest.of(bad), np.uint8)
        columns = (sizes, good.counts, good.base_counts, good.chunks, good.base_chunks, hashes)
        head = Update(good.base, good.to, *columns).encode()
        sealed = Step(Digest.of(head), len(head), len(head) + int(sizes.sum()))
        store.backend.put(DELTAS.key(sealed.name), head + whole[step.head_bytes : at] + bad + whole[end:])
        store.backend.put(UPDATES.key(recompressed.digest), encode_steps({recompressed.former: sealed}))
        assert recompressed.pull().fetched_bytes > 4 << 20


def test_what_resembles_nothing_is_left_to_frames_of_packs(tmp_path: Path) -> None:
    """A delta would only say the same again, in a store that has it."""
    world, former = World(tmp_path / "world"), tmp_path / "former.raw"
    old = bytearray(disk(1, 2))
    base, held = world.push("it", bytes(old)), bytes(old)
    old[::50_000] = b"!" * len(old[::50_000])
    to = world.push("it", bytes(old) + disk(6, 7, 8, 9))
    step = make_update(world.store, base, to)
    assert step is not None
    former.write_bytes(held)
    seed, out = Seed(world.store.manifest(base), former), tmp_path / "out.raw"
    done = pull(world.store, to, out, format_="raw", seeds=[seed], durable=False)
    assert out.read_bytes() == world.images[to]
    assert step.size_bytes < done.fetched_bytes // 2
