"""Real etcd members for tests, on loopback: each can be killed, paused, and started again on its data."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.servers import free_ports


class Members:
    """As many members as asked for, of one cluster."""

    def __init__(
        self, directory: Path, count: int, *options: str, tls: Path | None = None, safe: bool = False
    ) -> None:
        ports = free_ports(2 * count, first=24000)
        self.trust = (
            {"verify": f"{tls}/mine.crt", "cert": (f"{tls}/mine.crt", f"{tls}/mine.key")} if tls else {}
        )
        self.clients = [f"http{'s' if tls else ''}://127.0.0.1:{ports + 2 * n}" for n in range(count)]
        peers = [f"http://127.0.0.1:{ports + 2 * n + 1}" for n in range(count)]
        cluster = ",".join(f"m{n}={peer}" for n, peer in enumerate(peers))
        self.commands = [
            [
                *("etcd", f"--name=m{n}", f"--data-dir={directory}/m{n}", "--logger=zap"),
                *(f"--listen-client-urls={self.clients[n]}", f"--advertise-client-urls={self.clients[n]}"),
                *(f"--listen-peer-urls={peers[n]}", f"--initial-advertise-peer-urls={peers[n]}"),
                *(f"--initial-cluster={cluster}", *([] if safe else ["--unsafe-no-fsync"]), *options),
            ]
            for n in range(count)
        ]
        self.logs = [directory / f"m{n}.log" for n in range(count)]
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * count

    @property
    def url(self) -> str:
        return "etcd://" + ",".join(client.partition("://")[2] for client in self.clients)

    def start(self, n: int) -> None:
        with self.logs[n].open("ab") as log:
            self.processes[n] = subprocess.Popen(
                self.commands[n], stdout=log, stderr=log, start_new_session=True
            )

    def ready(self, n: int) -> None:
        """Until a member answers what all have to agree on."""
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.RequestException), requests.Session() as session:
                session.trust_env = False
                asked = {"json": {"key": "eA=="}, "timeout": 10, **self.trust}
                if session.post(f"{self.clients[n]}/v3/kv/range", **asked).ok:
                    return
            process = self.processes[n]
            assert process is not None and process.poll() is None, self.logs[n].read_text()[-2000:]
            assert time.monotonic() < deadline, (
                f"etcd does not become ready: {self.logs[n].read_text()[-2000:]}"
            )
            time.sleep(0.05)

    def signal(self, n: int, number: signal.Signals) -> None:
        if (process := self.processes[n]) is not None:
            process.send_signal(number)

    def kill(self, n: int) -> None:
        """As a power cut would."""
        if (process := self.processes[n]) is not None:
            process.kill()
            process.wait()
        self.processes[n] = None


@contextlib.contextmanager
def members(count: int = 1, *options: str, tls: Path | None = None, safe: bool = False) -> Iterator[Members]:
    """Running, and ready. tls: where mine.crt and mine.key are, which the members and we show. safe: with fsync."""
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd (Debian: etcd-server)")
    with tempfile.TemporaryDirectory(prefix="sf-etcd-") as directory:
        made = Members(Path(directory), count, *options, tls=tls, safe=safe)
        try:
            for n in range(count):
                made.start(n)
            for n in range(count):
                made.ready(n)
            yield made
        finally:
            for n in range(count):
                made.kill(n)
