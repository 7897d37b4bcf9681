"""The image service as a process: killed, restarted, without its store, with little room."""

import asyncio
import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compute.agent import image_service
from compute.agent.image_service import ServedImages, Settings
from imagestore import Changes, open_store, push, push_changed
from imagestore.backends.directory import Directory
from imagestore.cache import images, open_images
from imagestore.cache.control import Away, ControlClient
from imagestore.cache.imaged import control_socket, unprivileged
from imagestore.cache.images import ImageCache
from imagestore.cache.open_images import Options
from imagestore.cache.partial import PartialImage
from imagestore.cache.service import ImageService
from imagestore.disks.disk import RawDisk
from imagestore.errors import Conflict, Invalid, NotFound
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TRACES
from imagestore.formats.pack import MAX_FRAME_BYTES
from imagestore.formats.trace import Trace
from imagestore.store.store import Store
from tests.drills import rounds, seed
from tests.imaged import Imaged
from tests.servers import free_ports
from tests.tiny_store import CHUNK, disk, put_image

DATA = disk(11, 600)


def make_store(path: Path, *disks: bytes) -> tuple[str, list[Digest]]:
    store = Store.init(Directory(path))
    return path.as_uri(), [put_image(store, data) for data in disks]


def qemu_io(socket: str, *commands: str, reconnect_s: int = 60) -> subprocess.Popen[str]:
    """qemu's own NBD client with the options that a guest's disk has."""
    delays = f"reconnect-delay={reconnect_s},open-timeout={reconnect_s}"
    options = f"driver=nbd,server.type=unix,server.path={socket},{delays}"
    arguments = [argument for command in commands for argument in ("-c", command)]
    return subprocess.Popen(
        ["qemu-io", "-r", "--image-opts", *arguments, options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def copy_by_nbd(socket: str, target: Path) -> None:
    url = f"nbd+unix:///?socket={socket}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", url, target], check=True, timeout=60)


def test_a_reader_gets_the_image_at_once_and_the_raw_file_when_it_is_complete(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        first = imaged.ask("attach", image=str(digest), reader="web-vda", fill="never")
        assert first["kind"] == "nbd" and first["size_bytes"] == len(DATA)
        assert imaged.ask("attach", image=str(digest), reader="web-vda", fill="never") == first
        copy_by_nbd(first["path"], tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DATA
        imaged.wait_complete(digest)
        events = imaged.ask("watch", after=0, wait_s=5)
        assert events[-1]["readers"] == ["web-vda"]
        raw = Path(events[-1]["complete"])
        assert raw.read_bytes() == DATA
        assert imaged.row(digest)["received"]["store"] > 0
        second = imaged.ask("attach", image=str(digest), reader="db-vda")
        assert second == {"kind": "raw", "path": str(raw), "size_bytes": len(DATA)}
        imaged.ask("settle", reader="web-vda")
        assert not Path(first["path"]).exists()
        assert imaged.row(digest)["readers"] == ["db-vda", "web-vda"]
        assert imaged.ask("prune", limit_bytes=0) == []
        imaged.ask("detach", reader="web-vda")
        imaged.ask("sync", readers=[])
        assert imaged.ask("prune", limit_bytes=0) == [str(digest)]
        assert not list((tmp_path / "state" / "cache").glob(f"{digest.hex()}*"))


def test_wrong_questions_get_an_error_and_harm_nothing(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        with pytest.raises(NotFound):
            imaged.ask("attach", image="b3:" + "0" * 64, reader="a")
        with pytest.raises(Invalid):
            imaged.ask("attach", image=str(digest), reader="../a")
        with pytest.raises(Invalid):
            imaged.ask("attach", image=str(digest), reader="a", fill="sometimes")
        with pytest.raises(Invalid):
            imaged.ask("explode")
        with pytest.raises(Invalid):
            imaged.ask("attach")
        imaged.ask("attach", image=str(digest), reader="a", fill="never")
        with pytest.raises(Conflict):
            imaged.ask("attach", image="b3:" + "0" * 64, reader="a")
        assert not (tmp_path / "a").exists()


@pytest.mark.drill
def test_killed_at_any_moment_it_goes_on_where_it_was_and_readers_only_wait(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    rng = random.Random(seed())
    imaged = Imaged(tmp_path / "state", url, SF_FILL_RATE="6M").start()
    try:
        socket = imaged.ask("attach", image=str(digest), reader="vda")["path"]
        for _ in range(rounds(full=30)):
            blocks = [rng.randrange(len(DATA) // 4096) for _ in range(200)]
            reader = qemu_io(socket, *(f"read -v {block * 4096} 64" for block in blocks))
            time.sleep(rng.random() * 0.4)
            imaged.kill()
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.3)
            imaged.start()
            shown = reader.communicate(timeout=120)[0]
            assert reader.returncode == 0 and "error" not in shown, shown
            for block in blocks[:5]:
                line = DATA[block * 4096 : block * 4096 + 16].hex(" ")
                assert f"{block * 4096:08x}:  {line}" in shown.lower()
        imaged.kill()
        imaged.environment["SF_FILL_RATE"] = "0"
        imaged.start()
        imaged.wait_complete(digest)
        copy_by_nbd(socket, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DATA
        assert (imaged.state / "cache" / f"{digest.hex()}.raw").read_bytes() == DATA
    finally:
        imaged.stop()


def test_a_store_that_is_away_for_a_while_makes_readers_wait_and_for_ever_an_io_error(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="never", patience_s=4)["path"]
        (tmp_path / "store" / "packs").rename(tmp_path / "away")
        reader = qemu_io(socket, "read 0 4k")
        time.sleep(1)
        assert reader.poll() is None
        (tmp_path / "away").rename(tmp_path / "store" / "packs")
        assert reader.wait(20) == 0
        (tmp_path / "store" / "packs").rename(tmp_path / "away")
        shown = qemu_io(socket, f"read {300 * CHUNK} 4k").communicate(timeout=30)[0]
        assert "Input/output error" in shown
        assert any("gave up a read after 4 s" in message for message in imaged.messages())
        assert "error" not in qemu_io(socket, "read 0 4k").communicate(timeout=30)[0]
        assert imaged.row(digest)["exports"]["vda"]["failures"] == 1


def test_a_second_store_takes_over_in_the_middle_of_a_boot(tmp_path: Path) -> None:
    first, (digest,) = make_store(tmp_path / "store", DATA)
    second, _ = make_store(tmp_path / "mirror", DATA)
    with Imaged(tmp_path / "state", first, second) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="never")["path"]
        assert qemu_io(socket, "read 0 64k").wait(20) == 0
        (tmp_path / "store").rename(tmp_path / "gone")
        copy_by_nbd(socket, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DATA
        assert any("store" in message for message in imaged.messages())


def test_when_the_store_is_away_what_is_complete_is_served_without_asking_it(tmp_path: Path) -> None:
    url, (digest, other) = make_store(tmp_path / "store", DATA, disk(12, 50))
    with Imaged(tmp_path / "state", url) as imaged:
        imaged.ask("prefetch", image=str(digest))
        imaged.wait_complete(digest)
        socket = imaged.ask("attach", image=str(other), reader="other", fill="now")["path"]
        imaged.wait_complete(other)
    (tmp_path / "store").rename(tmp_path / "gone")
    with Imaged(tmp_path / "state", url) as imaged:
        assert imaged.ask("attach", image=str(digest), reader="vda")["kind"] == "raw"
        copy_by_nbd(socket, tmp_path / "copy.raw")  # its guest was never moved
        assert (tmp_path / "copy.raw").read_bytes() == disk(12, 50)
        assert imaged.ask("attach", image=str(other), reader="other")["kind"] == "raw"
        assert not Path(socket).exists()


def test_a_boot_leaves_a_trace_in_the_store_that_the_next_node_replays(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "one", url) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="never")["path"]
        places = [5, 400, 90, 300]
        assert qemu_io(socket, *(f"read {at * CHUNK} 4k" for at in places)).wait(20) == 0
        imaged.ask("booted", reader="vda", settle_s=0)
        store = Store.open(Directory(tmp_path / "store"))
        deadline = time.monotonic() + 10
        while not (tmp_path / "store" / TRACES.key(digest)).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        manifest = store.manifest(digest)
        trace = Trace.decode(store.backend.get(TRACES.key(digest)).data)
        assert [int(manifest.offsets[c]) // CHUNK for c in trace.chunks(manifest.ids)][-4:] == places
    with Imaged(tmp_path / "two", url) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="never")["path"]
        deadline = time.monotonic() + 10
        while imaged.row(digest)["present_bytes"] < 4 * CHUNK:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        assert qemu_io(socket, *(f"read {at * CHUNK} 4k" for at in places)).wait(20) == 0
        assert imaged.row(digest)["exports"]["vda"]["waits"] == 0


@pytest.mark.system
def test_a_full_disk_stops_the_fill_and_not_the_guest(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "none", state], check=True)
    try:
        with Imaged(state, url) as imaged:
            socket = imaged.ask("attach", image=str(digest), reader="vda")["path"]
            copy_by_nbd(socket, tmp_path / "copy.raw")
            assert (tmp_path / "copy.raw").read_bytes() == DATA
            assert any("disk is full" in message for message in imaged.messages())
            subprocess.run(["mount", "-o", "remount,size=64M", state], check=True)
            imaged.wait_complete(digest)
            assert (state / "cache" / f"{digest.hex()}.raw").read_bytes() == DATA
    finally:
        subprocess.run(["umount", state], check=True)


def test_a_suspended_client_and_one_that_hammers_leave_the_others_alone(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        asked = [imaged.ask("attach", image=str(digest), reader=f"vd{n}", fill="never") for n in range(3)]
        sockets = [one["path"] for one in asked]
        imaged.ask("prefetch", image=str(digest))  # not before all have their sockets
        imaged.wait_complete(digest)
        bench = ["qemu-img", "bench", "-f", "raw", "-c", "100000000", "-d", "64", "-s", "65536"]
        greedy = [
            subprocess.Popen([*bench, f"nbd+unix:///?socket={s}"], stdout=subprocess.DEVNULL)
            for s in sockets[:2]
        ]
        try:
            time.sleep(0.3)
            os.kill(greedy[1].pid, signal.SIGSTOP)
            assert imaged.process
            copy_by_nbd(sockets[2], tmp_path / "copy.raw")
            assert (tmp_path / "copy.raw").read_bytes() == DATA
            resident = int(
                Path(f"/proc/{imaged.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]
            )
            assert resident < 400 << 10  # KiB, of it the mapped image
        finally:
            for process in greedy:
                process.kill()
                process.wait()


@pytest.mark.system
def test_started_by_root_it_runs_as_a_user_who_may_read_everything_only_where_he_must(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    (tmp_path / "store").chmod(0o700)
    state = tmp_path / "state"
    with Imaged(state, url) as imaged:  # what root's service left is its own from then on
        imaged.ask("attach", image=str(digest), reader="vda", fill="never")
    imaged.prefix, closed = unprivileged(state, [url])
    assert closed
    with imaged:
        assert imaged.process
        lines = Path(f"/proc/{imaged.process.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert len(set(status["Uid"])) == 1 and status["Uid"] == status["Gid"] != ["0"] * 4
        assert status["Groups"] == [] and status["NoNewPrivs"] == ["1"]
        assert {int(status[kind][0], 16) for kind in ("CapEff", "CapPrm", "CapBnd")} == {1 << 2}
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="now")["path"]
        copy_by_nbd(socket, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DATA
        imaged.wait_complete(digest)
        assert imaged.ask("attach", image=str(digest), reader="vda")["kind"] == "raw"


def join(nodes: list[Imaged], secret: str = "5e" * 32) -> None:
    base = free_ports(len(nodes), first=28000)
    peers = {f"node{n}": f"127.0.0.1:{base + n}" for n in range(len(nodes))}
    for number, node in enumerate(nodes):
        node.ask("join", me=f"node{number}", listen=peers[f"node{number}"], peers=peers, secret=secret)


def test_a_crowd_draws_an_image_from_the_store_once(tmp_path: Path) -> None:
    data = disk(13, 1500)
    url, (digest,) = make_store(tmp_path / "store", data)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Imaged(tmp_path / f"n{n}", url)) for n in range(4)]
        join(nodes)
        for node in nodes:
            node.ask("attach", image=str(digest), reader="vda", fill="now")
        rows = list[dict[str, int]]()
        for node in nodes:
            node.wait_complete(digest)
            rows.append(node.row(digest)["received"])
            assert (node.state / "cache" / f"{digest.hex()}.raw").read_bytes() == data
        stored = sum(
            path.stat().st_size for path in (tmp_path / "store" / "packs").rglob("*") if path.is_file()
        )
        assert sum(row["store"] for row in rows) <= 1.2 * stored
        assert all(row["peer"] > 0 for row in rows)


def test_peers_that_are_away_or_know_another_secret_cost_time_and_nothing_else(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(Imaged(tmp_path / f"n{n}", url)) for n in range(2))
        join([one, other])
        other.ask("join", me="node1", listen="127.0.0.1:0", peers={}, secret="00")
        other.ask("prefetch", image=str(digest))
        other.wait_complete(digest)
        socket = one.ask("attach", image=str(digest), reader="vda", fill="never")["path"]
        copy_by_nbd(socket, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DATA
        assert "peer" not in one.row(digest)["received"]


def test_a_node_whose_store_is_away_reads_on_from_its_peers(tmp_path: Path) -> None:
    data = disk(14, 1500)
    first, (digest,) = make_store(tmp_path / "store", data)
    second, _ = make_store(tmp_path / "mirror", data)
    with Imaged(tmp_path / "n0", first) as one, Imaged(tmp_path / "n1", second) as other:
        join([one, other])
        socket = other.ask("attach", image=str(digest), reader="vda", fill="now")["path"]
        (tmp_path / "mirror" / "packs").rename(tmp_path / "away")
        copy_by_nbd(socket, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == data
        other.wait_complete(digest)  # the fill went on as well
        received = other.row(digest)["received"]
        assert received["peer"] > received.get("store", 0)


def test_nodes_that_all_lost_their_stores_do_not_wait_for_each_other(tmp_path: Path) -> None:
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Imaged(tmp_path / f"n{n}", url)) for n in range(3)]
        join(nodes)
        asked = {"image": str(digest), "reader": "vda", "fill": "never", "patience_s": 2}
        sockets = [node.ask("attach", **asked)["path"] for node in nodes]
        (tmp_path / "store" / "packs").rename(tmp_path / "away")
        places = [f"read {at * CHUNK} 4k" for at in (0, 150, 300, 450)]
        readers = [qemu_io(socket, *places) for socket in sockets]
        for reader in readers:  # a node that waited for a node's time-out would need four times 20 s
            assert reader.communicate(timeout=40)[0].count("Input/output error") == len(places)
        (tmp_path / "away").rename(tmp_path / "store" / "packs")
        for socket in sockets:
            copy_by_nbd(socket, tmp_path / "copy.raw")
            assert (tmp_path / "copy.raw").read_bytes() == DATA


def test_an_image_in_the_cache_is_read_by_qemus_group_and_by_no_other_user(tmp_path: Path) -> None:
    """F5"""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o711)
    (tmp_path / "state" / "cache").mkdir(parents=True)
    (tmp_path / "state" / "cache").chmod(0o711)  # as earlier versions made it

    def reads(group: int) -> bool:
        who = ["setpriv", "--reuid=65534", f"--regid={group}", "--clear-groups"]
        return subprocess.run([*who, "head", "-c1", path], capture_output=True).returncode == 0

    with Imaged(tmp_path / "state", url) as imaged:
        imaged.ask("prefetch", image=str(digest))
        imaged.wait_complete(digest)
        path = imaged.row(digest)["path"]
        assert not reads(65534)
        ServedImages(ImageCache(tmp_path / "state/cache", {}), tmp_path / "state", Settings(tuple)).admit(
            4711
        )
        assert reads(4711) and not reads(65534)


def test_a_reader_that_cannot_be_served_again_yet_is_served_when_its_store_is_back(tmp_path: Path) -> None:
    """E7"""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        socket = Path(imaged.ask("attach", image=str(digest), reader="a", fill="never")["path"])
        imaged.kill()
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "state/cache" / f"{digest.hex()}.manifest").unlink()
        (tmp_path / "state/cache/readers/b.json").write_text("[" * 100_000)
        socket.unlink()
        imaged.start()
        assert [
            word in message
            for word in "ab"
            for message in imaged.messages()
            if f"reader {word} yet" in message
        ]
        assert not socket.exists()
        (tmp_path / "away").rename(tmp_path / "store")
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        copy_by_nbd(str(socket), tmp_path / "copy.raw")
        assert len([message for message in imaged.messages() if "reader b yet" in message]) == 1


def test_what_others_left_in_the_cache_is_in_nobodys_way(tmp_path: Path) -> None:
    """E7"""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    cache = tmp_path / "state" / "cache"
    for name in ("x" * 64 + ".raw", "notes.raw", "0" * 64 + ".part", "readers/x.json"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"what is this")
    (cache / ("1" * 64 + ".raw")).mkdir()
    (cache / ("2" * 64 + ".raw")).symlink_to("nowhere")
    with Imaged(tmp_path / "state", url) as imaged:
        assert imaged.ask("attach", image=str(digest), reader="a", fill="now")["kind"] == "nbd"
        imaged.wait_complete(digest)
        imaged.ask("detach", reader="a")
        imaged.ask("prune", limit_bytes=0)
        assert not (cache / f"{digest.hex()}.raw").exists()
    ImageCache(cache, {}).seeds()


@contextlib.asynccontextmanager
async def in_process(place: Path, url: str) -> AsyncIterator[ImageService]:
    """A service of a store whose parts a test can break."""
    for name in ("state/cache/readers", "state/cache/traces", "run"):
        (place / name).mkdir(parents=True)
    service = ImageService(place / "state/cache", place / "run", [url], Options())
    await service.start()
    yield service
    await service.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_of_an_image_made_of_one_that_is_here_only_what_is_new_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """A snapshot on the node that its guest moves to. Its base counts, however many images are newer."""
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(images, "_SEEDS_BYTES", 1)
    url, path = (tmp_path / "store").as_uri(), tmp_path / "disk"
    store, data = open_store(url, create=True), bytearray(random.Random(1).randbytes(16 << 20))
    path.write_bytes(data)
    base = push(store, path, "base", format_="raw")
    path.write_bytes(DATA)
    newer = push(store, path, "newer", format_="raw").digest
    data[5 << 20 : 6 << 20] = random.Random(2).randbytes(1 << 20)
    path.write_bytes(data)
    with path.open("rb") as file:
        changes = Changes(base.digest, np.array([(5 << 20, 6 << 20)], np.int64))
        made = push_changed(store, RawDisk(file.fileno(), "disk"), changes, {})

    async def story() -> None:
        async with in_process(tmp_path, url) as service:

            async def whole(digest: Digest) -> Path:
                await service.attach(str(digest), digest.hex()[:9])
                while not (found := tmp_path / f"state/cache/{digest.hex()}.raw").exists():
                    await asyncio.sleep(0.02)
                return found

            raw = await whole(base.digest)
            await whole(newer)
            for digest in (base.digest, newer):
                await service.settle(digest.hex()[:9])
            if damaged:
                raw.chmod(0o644)
                with raw.open("r+b") as file:
                    file.seek(1 << 20)
                    file.write(bytes([data[1 << 20] ^ 1]))
            assert (await whole(made.digest)).read_bytes() == data
            received = service.images.row(made.digest)["received"]
            assert 0 < received["store"] <= made.written_bytes + damaged * MAX_FRAME_BYTES
            assert received["local"] == len(data) - made.new_bytes

    asyncio.run(asyncio.wait_for(story(), 60))


def test_an_image_that_cannot_be_completed_now_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E7"""
    monkeypatch.setattr(open_images, "_SEAL_S", 0.1)
    url, (digest,) = make_store(tmp_path / "store", DATA)
    seal, tries = PartialImage.seal, []

    def failing(image: PartialImage, path: Path) -> None:
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(image, path)

    monkeypatch.setattr(PartialImage, "seal", failing)

    async def story() -> None:
        async with in_process(tmp_path, url) as service:
            await service.images.prefetch(str(digest))
            while not tries or not tries[0].exists():
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(story(), 60))
    assert len(tries) == 3


def test_what_a_failing_disk_lost_of_an_image_is_fetched_again_before_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_images, "_SEAL_S", 0.1)
    url, (digest,) = make_store(tmp_path / "store", DATA)
    fdatasync, failed = os.fdatasync, list[int]()

    def failing(descriptor: int) -> None:
        if not failed and Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".part":
            failed.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", failing)

    async def story() -> None:
        async with in_process(tmp_path, url) as service:
            await service.images.prefetch(str(digest))
            while not any("complete" in event for event in await service.watch(0, 0.1)):
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(story(), 20))
    assert failed
    assert ImageCache(tmp_path / "state/cache", {}).path(digest).read_bytes() == DATA


def test_an_image_that_is_open_comes_from_the_stores_that_were_added_since(tmp_path: Path) -> None:
    """I3"""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    other, _ = make_store(tmp_path / "other", DATA)
    with Imaged(tmp_path / "state", url) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="a", fill="never", patience_s=30)["path"]
        (tmp_path / "store").rename(tmp_path / "gone")
        imaged.ask("use", stores=[url, other])
        copy_by_nbd(socket, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == DATA


def test_a_service_of_an_earlier_version_is_replaced_by_the_next_agent(tmp_path: Path) -> None:
    """I3: it knows only the old list, and the new words not at all."""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    older = (
        "from imagestore.cache import control; from imagestore.cache.imaged import main\n"
        "control.OPERATIONS -= {'use', 'readable'}; main()"
    )
    state, client = tmp_path / "state", ControlClient(control_socket(tmp_path / "state"))

    async def pid() -> int:
        while True:
            with contextlib.suppress(Away):
                return int((await client.ask("ls"))["pid"])
            await asyncio.sleep(0.05)

    async def story() -> None:
        process = subprocess.Popen([sys.executable, "-c", older, state, "{}", "file:///nowhere"])
        assert await pid() == process.pid
        images = ServedImages(ImageCache(state / "cache", {}), state, Settings(lambda: (url,), "never"))
        assert (await images.backing("a", str(digest))).socket
        assert await pid() != process.pid
        process.wait()
        await images.tell("sync", readers=[])
        await images.tell("leave")
        assert images._process
        await asyncio.to_thread(images._process.wait)

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_service_that_is_killed_over_a_question_is_asked_again_for_who_asks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a snapshot of a guest that is off does: it was in error for good."""
    url, (digest,) = make_store(tmp_path / "store", DATA)
    state, killed = tmp_path / "state", list[int]()
    images = ServedImages(ImageCache(state / "cache", {}), state, Settings(lambda: (url,), "never"))
    ask = images._client.ask

    async def asked(op: str, **more: Any) -> Any:
        if op == "attach" and not killed:
            killed.append((await ask("ls"))["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return await ask(op, **more)

    async def story() -> None:
        monkeypatch.setattr(images._client, "ask", asked)
        assert (await images.backing("a", str(digest))).socket
        await images.tell("sync", readers=[])
        await images.tell("leave")
        assert images._process and images._process.pid not in killed
        await asyncio.to_thread(images._process.wait)

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_service_that_cannot_start_is_tried_with_growing_pauses_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """E7"""
    monkeypatch.setattr(image_service, "_START_S", 2.0)
    monkeypatch.setattr(image_service, "_RETRY_S", 0.01)
    pauses = []

    def spawn() -> subprocess.Popen[bytes]:
        pauses.append(images._pause_s)
        return subprocess.Popen(["false"])

    images = ServedImages(ImageCache(tmp_path / "cache", {}), tmp_path, Settings(tuple))
    monkeypatch.setattr(images, "_spawn", spawn)

    async def story() -> None:
        listening = asyncio.create_task(images.listen(lambda reader, message: None))
        while len(pauses) < 7:
            await asyncio.sleep(0.05)
        listening.cancel()

    asyncio.run(asyncio.wait_for(story(), 60))
    assert pauses[:7] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert caplog.text.count("does not start") == 1
