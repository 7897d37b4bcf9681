"""One parser of outsiders' bytes under atheris, in a process of its own: TARGET, then libFuzzer's arguments.

Whatever the bytes are, an error of ours may come out and nothing else; what is taken must be usable.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["imagestore"]):
    from imagestore.cache.nbd import server as nbd
    from imagestore.cache.nbd.handshake import MAX_REQUEST_BYTES
    from imagestore.disks import filesystems
    from imagestore.disks.disk import RawDisk, read_range
    from imagestore.disks.qcow2.reader import Qcow2
    from imagestore.errors import Corrupt, StoreError, Unsupported
    from imagestore.formats.digest import Digest
    from imagestore.formats.layout import Layout
    from imagestore.formats.manifest import Manifest
    from imagestore.formats.pack import Footer
    from imagestore.formats.sealed import seal
    from imagestore.listening import Guarded
    from imagestore.mirror.tree import Ranged, public
    from imagestore.outside import read_json
    from imagestore.store.names import NameRecord

import uvicorn
from uvicorn.server import ServerState

_RUNS = 32
_FILE = os.memfd_create("fuzz")


def _file(data: bytes) -> int:
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, data, 0)
    return _FILE


def qcow2(data: bytes) -> None:
    disk, at = Qcow2(_file(data), "fuzz"), 0
    for _ in range(_RUNS):
        run = disk.next_data(at)
        if run is None:
            break
        start, end = run[0], min(run[1], run[0] + 65536)
        assert at <= start < run[1]
        assert len(read_range(disk, start, end - start)) == end - start
        at = run[1]


def file_system(data: bytes) -> None:
    filesystems.look(RawDisk(_file(data), "fuzz"), sparsify=True)


def manifest(data: bytes) -> None:
    found = Manifest.decode(data)
    assert found.encode() == data
    assert found.data_bytes >= 0


def layout(data: bytes) -> None:
    found = Layout.decode(data, Digest(bytes(32)))
    assert found.encode() == data


def footer(data: bytes) -> None:
    found = Footer.decode(data)
    assert int(found.offsets[-1]) + int(found.sizes[-1]) == found.data_bytes


def text(data: bytes) -> None:
    try:
        found = read_json(data)
    except ValueError:
        return
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    if isinstance(found, dict):
        record = NameRecord.decode(seal(found))
        assert NameRecord.decode(record.encode()) == record


class Wire(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: Any) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def writelines(self, list_of_data: Any) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class Heads:
    """Requests as the mirror's server reads them."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.failed: list[Exception] = []
        self.config = uvicorn.Config(self.app, http=Guarded, lifespan="off", log_config=None)
        self.config.load()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        async def read(start: int, length: int, after: int) -> bytes:
            assert start >= 0 and length > 0 and after >= 0 and start + length + after <= 1000
            return bytes(length)

        try:
            public(scope["path"])
            await Ranged(1000, "x", 0.0, "no-cache", read, lambda _: 400)(scope, receive, send)
        except Exception as error:
            self.failed.append(error)
            raise

    def __call__(self, data: bytes) -> None:
        half = data[0] if data else 0
        link = Guarded(self.config, ServerState(), {}, self.loop)
        wire = Wire()
        link.connection_made(wire)
        for part in (data[1:half], data[max(1, half) :]):
            if part and not wire.closed:
                link.data_received(part)
                self.loop.run_until_complete(asyncio.sleep(0))
        link.connection_lost(None)
        self.loop.run_until_complete(asyncio.sleep(0))
        if self.failed:
            raise self.failed[0]


class Nothing:
    """A disk of zeros, of which every other 4 KiB have to be waited for."""

    size_bytes = 2 * MAX_REQUEST_BYTES
    zeros = memoryview(bytes(MAX_REQUEST_BYTES))

    def read_now(self, offset: int, length: int) -> memoryview | None:
        assert 0 < length <= MAX_REQUEST_BYTES and 0 <= offset <= self.size_bytes - length
        return None if offset & 4096 else self.zeros[:length]

    async def read(self, offset: int, length: int) -> memoryview:
        if offset & 8192:
            raise OSError
        return self.zeros[:length]

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        assert 0 < length <= self.size_bytes - offset and limit > 0
        return [(length, True)]

    def prefetch(self, offset: int, length: int) -> None:
        assert 0 < length <= self.size_bytes - offset


class Nbd:
    """What a client sends to the image service, in two pieces."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = nbd.NbdServer(Nothing(), Path("unused"))

    def __call__(self, data: bytes) -> None:
        self.loop.run_until_complete(self.talk(data))
        assert not self.server.connections

    async def talk(self, data: bytes) -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        half = data[0] if data else 0
        link, wire = nbd.Connection(self.server), Wire()
        link.connection_made(wire)
        for part in (data[1:half], data[max(1, half) :]):
            if part and not wire.closed:
                link.data_received(part)
                for _ in range(3):
                    await asyncio.sleep(0)
        link.connection_lost(None)
        await asyncio.sleep(0)
        assert not failures, failures


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "qcow2": lambda: qcow2,
    "ext4": lambda: file_system,
    "manifest": lambda: manifest,
    "layout": lambda: layout,
    "footer": lambda: footer,
    "json": lambda: text,
    "head": Heads,
    "nbd": Nbd,
}


def main() -> None:
    target = TARGETS[sys.argv[1]]()
    ours = (Corrupt, Unsupported) if target in (manifest, layout, footer, text) else StoreError

    def once(data: bytes) -> None:
        with contextlib.suppress(ours):
            target(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
