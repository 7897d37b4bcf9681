"""A server's connections: a stranger who opens many, drips, or takes nothing goes before anybody else notices."""

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from imagestore import listening
from imagestore.listening import Buckets, Guarded, origin

ROOT = Path(__file__).resolve().parents[3]
GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
_FOREVER = 60


class Quick(Guarded):
    PATIENCE_S = 0.2
    STALLED_S = 0.4
    MOST_OF_ONE = 3
    MOST = 5


class Patient(Quick):
    PATIENCE_S = STALLED_S = 600.0


class App:
    """Answers /; /hold until it is let go; /big with more than any buffer holds."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.begun = threading.Semaphore(0)
        self.ended = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.release()
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        if message["type"] == "http.disconnect":
            return
        while scope["path"] == "/hold" and not self.free.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000 if scope["path"] == "/big" else 0):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})
        self.ended.set()


@contextlib.contextmanager
def serving(app: App, protocol: type[Guarded]) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    settings = listening.settings() | {"http": protocol, "timeout_keep_alive": 1, "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **settings))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        app.free.set()
        server.should_exit = True
        thread.join(30)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A connection that the server knows: it has answered one request."""
    link = socket.create_connection(("127.0.0.1", port), _FOREVER, source_address=(host, 0))
    ask(link)
    return link


def ask(link: socket.socket, path: bytes = b"") -> bytes:
    link.sendall(GET % path)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = link.recv(65536)
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def closed(link: socket.socket) -> bool:
    """Waits until the other side has closed it."""
    with contextlib.suppress(ConnectionError):
        while link.recv(65536):
            pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\r\n",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{",
        GET % b"" + b"GET / HT",
        GET % b"" + b"\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
    ],
    ids=repr,
)
def test_whoever_begins_and_does_not_go_on_is_gone(said: bytes) -> None:
    """E1."""
    with serving(App(), Quick) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(said)
        assert closed(link)


def test_a_head_that_drips_for_ever_is_cut_off() -> None:
    """E1."""
    with serving(App(), Quick) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                link.sendall(b"X: y\r\n")
                threading.Event().wait(0.02)


def test_a_head_without_end_is_refused() -> None:
    with serving(App(), Patient) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                link.sendall(b"X-%d: " % os.getpid() + b"y" * 10_000 + b"\r\n")
        assert closed(link)


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"]
)
def test_a_head_without_end_is_refused_however_slowly_it_comes_and_so_is_what_follows_a_body(
    begin: bytes,
) -> None:
    with serving(App(), Quick) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(begin)
        with pytest.raises(ConnectionError):
            for _ in range(200):  # more than LEAST_BYTES in each PATIENCE_S
                link.sendall(b"X: " + b"y" * 5000 + b"\r\n")
                threading.Event().wait(0.05)


def test_a_body_may_be_longer_than_a_head_and_so_may_many_requests_at_once() -> None:
    chunks = b"".join(b"2000\r\n%s\r\n" % bytes(0x2000) for _ in range(100))
    with serving(App(), Patient) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        link.sendall(GET % b"" * 2500)
        said, answers = b"", 0
        while answers < 2501:
            said = said[-11:] + link.recv(65536)
            answers += said.count(b"HTTP/1.1 200")


def test_who_takes_nothing_of_an_answer_is_gone() -> None:
    """E1."""
    app = App()
    with serving(app, Quick) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(GET % b"big")
        assert app.ended.wait(_FOREVER)


def test_an_answer_that_takes_its_time_is_waited_for() -> None:
    app = App()
    with serving(app, Quick) as port, socket.create_connection(("127.0.0.1", port), _FOREVER) as link:
        link.sendall(GET % b"hold")
        assert app.begun.acquire(timeout=_FOREVER)
        for _ in range(50):
            threading.Event().wait(0.02)
        app.free.set()
        assert link.recv(65536).startswith(b"HTTP/1.1 200")


def test_of_one_address_the_connection_that_waited_longest_makes_room_for_the_next() -> None:
    """E1."""
    with serving(App(), Patient) as port:
        first, second, third = (connect(port, "127.0.0.2") for _ in range(3))
        other = connect(port, "127.0.0.3")
        ask(first)
        fourth = connect(port, "127.0.0.2")
        assert closed(second)
        for link in (first, third, fourth, other):
            assert ask(link).startswith(b"HTTP/1.1 200")


def test_a_full_server_lets_the_next_address_in_and_keeps_what_is_at_work() -> None:
    """E1."""
    app = App()
    with serving(app, Patient) as port:
        busy = connect(port, "127.0.0.2")
        busy.sendall(GET % b"hold")
        idle = [connect(port, f"127.0.0.{3 + n}") for n in range(4)]
        newest = connect(port, "127.0.0.9")
        assert closed(idle[0])
        assert [ask(link)[:12] for link in (*idle[1:], newest)] == [b"HTTP/1.1 200"] * 4
        app.free.set()
        assert busy.recv(65536).startswith(b"HTTP/1.1 200")


def test_where_all_of_one_address_are_at_work_its_next_is_refused() -> None:
    app = App()
    with serving(app, Patient) as port:
        links = [connect(port) for _ in range(3)]
        for link in links:
            link.sendall(GET % b"hold")
        for _ in range(6):
            assert app.begun.acquire(timeout=_FOREVER)
        with pytest.raises(ConnectionError):
            connect(port)


def test_a_thousand_idle_connections_keep_nobody_from_the_api(tmp_path: Path) -> None:
    """E1: with 1,024 descriptors, which is what most machines give."""
    listening.raise_limits()

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with subprocess.Popen(
        [sys.executable, "-m", "tests.api_server", tmp_path / "state"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=few,
    ) as server, contextlib.ExitStack() as links:  # fmt: skip
        assert server.stdout
        url = server.stdout.readline().split()[0]
        port = int(url.rpartition(":")[2])
        for _ in range(1050):
            links.enter_context(socket.create_connection(("127.0.0.1", port), _FOREVER))
        for _ in range(3):
            with urllib.request.urlopen(f"{url}/livez", timeout=_FOREVER) as answer:
                assert answer.status == 200
        assert len(list(Path(f"/proc/{server.pid}/fd").iterdir())) < 600
        server.kill()


def test_a_process_takes_the_descriptors_that_it_may_have() -> None:
    code = (
        "import resource; from imagestore import listening; resource.setrlimit(7, (256, 2048));"
        "listening.raise_limits(); print(resource.getrlimit(7))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2048, 2048)"


@pytest.mark.parametrize(
    ("host", "whose"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_a_network_of_ipv6_counts_as_one_client(host: str, whose: str) -> None:
    assert origin(host) == whose


def test_a_bucket_gives_what_it_holds_and_takes_back_what_was_not_needed(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(listening.time, "monotonic", lambda: now[0])
    bucket = Buckets(per_second=2, burst=4)
    assert [bucket.take("a") for _ in range(5)] == [True] * 4 + [False]
    assert bucket.take("b")
    now[0] += 1
    assert [bucket.take("a") for _ in range(3)] == [True, True, False]
    bucket.take("a", -1)
    assert bucket.take("a")
    now[0] += 1000
    assert [bucket.take("a") for _ in range(5)] == [True] * 4 + [False]
    for n in range(20_000):
        bucket.take(n)
    assert len(bucket._left) <= 10_000
