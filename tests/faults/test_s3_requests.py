"""What commands ask of an S3 server: through a proxy that counts requests, and resets connections when told to."""

import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from imagestore.backends.wrappers import innermost
from imagestore.formats.keys import INFO
from imagestore.push import push
from imagestore.store.open import open_backend, open_store
from imagestore.store.store import Store
from imagestore.verify import verify_store
from tests.servers import Server, tool
from tests.world import disk

_REQUEST = re.compile(rb"(GET|PUT|HEAD|DELETE|POST) /(\S*) HTTP/1\.1\r\n")


class Proxy:
    """Between a client and a server; requests with a body of up to 64 KiB come in one or two pieces."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[tuple[str, str]] = []
        self.reset_at, self.lost = -1, False
        """The request at which the connection is reset; lost: after it arrived, so that only its answer is lost."""
        self._mute: set[socket.socket] = set()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def count(self, *verbs: str) -> int:
        return sum(verb in verbs for verb, _ in self.requests)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                for verb, path in _REQUEST.findall(data) if up else ():
                    self.requests.append((verb.decode(), path.decode()))
                    if len(self.requests) - 1 == self.reset_at:
                        if self.lost:
                            self._mute.add(target)
                            target.sendall(data)
                            time.sleep(0.2)
                        source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        source.close()
                        target.close()
                        return
                if source not in self._mute:
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(seaweedfs: Server) -> Iterator[Proxy]:
    made = Proxy(int(seaweedfs.endpoint.rpartition(":")[2]))
    yield made
    made.close()


def through(proxy: Proxy | None, bucket: str, server: Server | None = None) -> str:
    endpoint = f"http://127.0.0.1:{proxy.port}" if proxy else server.endpoint if server else ""
    return f"s3://{bucket}/x?endpoint_url={quote(endpoint, safe='')}&region=us-east-1"


@pytest.mark.parametrize("lost", [False, True], ids=["lost request", "lost answer"])
def test_a_reset_at_any_request_of_the_probe_is_no_failure_and_no_other_answer(
    seaweedfs: Server, proxy: Proxy, lost: bool
) -> None:
    """D3: one reset ended `store init`; and a repeated write met itself and was taken for a missing feature."""
    url = through(proxy, seaweedfs.bucket())
    for at in range(7):
        backend = open_backend(url)
        proxy.requests.clear()
        proxy.reset_at, proxy.lost = at, lost
        assert innermost(backend).conditions == "delete"  # type: ignore[attr-defined]
        proxy.reset_at = -1
        assert len(proxy.requests) > 7
        assert [stat.key for stat in backend.list("probe/")] == []
        backend.close()


def test_a_store_at_another_address_is_probed_by_the_first_writer_alone(
    seaweedfs: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D9: every command, reading or writing, probed with six writes where the address was not that of the init."""
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    bucket = seaweedfs.bucket()
    url = through(proxy, bucket)
    direct = open_backend(url.replace(str(proxy.port), seaweedfs.endpoint.rpartition(":")[2]))
    Store.init(direct)
    direct.close()
    for write, wanted in ((False, 0), (False, 0), (True, 6), (True, 0), (False, 0)):
        proxy.requests.clear()
        store = open_store(url)
        if write:
            store.check_writable()
        list(store.names.list())
        store.backend.close()
        assert proxy.count("PUT", "DELETE") == wanted, proxy.requests


@pytest.mark.parametrize("same", [False, True], ids=["six disks", "one disk and name"])
def test_six_first_pushes_at_once_into_a_new_bucket_all_arrive(
    seaweedfs: Server, tmp_path: Path, same: bool
) -> None:
    """D1, D2 on a real server: three of six failed, and who pushed the same lost to the other."""
    url = through(None, seaweedfs.bucket(), seaweedfs)
    failures, start = list[BaseException](), threading.Barrier(6)

    def first(number: int) -> None:
        path = tmp_path / f"disk{number}"
        path.write_bytes(disk(1 if same else number, blocks=8))
        start.wait()
        try:
            store = open_store(url, create=True)
            push(
                store, path, "one" if same else f"n{number}", format_="raw", cache=tmp_path / f"cache{number}"
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the test says it
            failures.append(error)

    threads = [threading.Thread(target=first, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store = open_store(url)
    assert len(list(store.names.list())) == (1 if same else 6)
    assert verify_store(store, full=True).problems == []


def test_a_list_of_images_asks_once_for_what_it_does_not_know_yet(
    seaweedfs: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D8: `sf image ls` asked three times per name, each time."""
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SF_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SF_CONFIG", "/dev/null")
    bucket = seaweedfs.bucket()
    store = open_store(through(proxy, bucket), create=True)
    path = tmp_path / "disk"
    path.write_bytes(disk(1, blocks=1))
    digests = []
    for number in range(3):
        digests.append(
            push(store, path, "name", f"v{number}", format_="raw", labels={"n": str(number)}).digest
        )
    for number in range(300):
        store.names.set("many", f"v{number}", "x86_64", digests[number % 3])

    def listed() -> str:
        proxy.requests.clear()
        url = through(proxy, bucket)
        command = [tool("sf") or "sf", "image", "ls", "--store", url, "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = listed()
    assert len(proxy.requests) <= 2 + 303 + 2 * 3  # names; manifests that are shorter than asked for
    assert listed() == first
    assert len(proxy.requests) == 2  # store.json and a listing
    store.names.set("many", "v7", "x86_64", digests[0])
    store.names.remove("many", "v8")
    again = listed()
    assert len(proxy.requests) == 4
    assert again.count('"many:v7"') == 1 and '"many:v8"' not in again and again.count("size_bytes") == 302
    assert [path for verb, path in proxy.requests if INFO.tree in path] != []
