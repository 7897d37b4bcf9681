"""Hostile tenants and strangers at the API's port, until a file appears.

    python -m tests.system.stranger STATE_DIR LOG STOP SEED

LOG gets a JSON line for each answer that no stranger may get (500, 502, 504, or one that belongs to somebody else), and
at the end how many requests of each kind were made.
"""

import base64
import contextlib
import http.client
import json
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.api_server import Running

HERE = ("127.0.0.1", 13000)
NEVER = (500, 502, 504)
IDLE = 60
PIECES = (b"", b"GET / HTTP/1.1\r\n", b"POST /auth HTTP/1.1\r\nContent-Length: 99\r\n")


class Stranger:
    """`tenant` has a key of its own namespace; the others have nothing."""

    def __init__(self, state: Path, log: Path, stop: Path, seed: int) -> None:
        self.log, self.stop, self.rng = log, stop, random.Random(seed)
        self.count: Counter[str] = Counter()
        self.idle: list[socket.socket] = []
        key = (state / "auth" / "local-key").read_text().strip()
        self.api = Running(f"http://{HERE[0]}:{HERE[1]}", key, None, None, None)  # type: ignore[arg-type]
        self.api.call(
            "POST", "/auth/namespaces", {"namespace": "evil", "key_name": "k", "key": "evil-key-evil"}
        )

    def say(self, **what: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"at": time.time(), **what}) + "\n")

    def ask(self, verb: str, path: str, body: Any = None, namespace: str = "evil") -> int:
        try:
            answer = self.api.call(verb, path, body, namespace=namespace, key="evil-key-evil")
        except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):
            self.api.tokens.pop("evil", None)
            return 0
        if answer.status in NEVER:
            self.say(asked=f"{verb} {path}", status=answer.status, body=str(answer.body)[:300])
        return answer.status

    def wrong_key(self) -> None:
        body = {
            "namespace": self.rng.choice(["system", "evil", "nobody"]),
            "key": self.rng.randbytes(8).hex(),
        }
        self.ask("POST", "/auth", body, namespace="")

    def odd_json(self) -> None:
        bodies = [
            b'{"key": "k", "value": NaN}', b'{"key": "k", "value": 1e999}', b'{"key": "k", "value": "\\ud800"}',
            b"[" * 5000, b'{"a":' * 900 + b"1" + b"}" * 900, b"\xff\xfe", b"", b"null", b'{"key": 7, "value": {}}',
        ]  # fmt: skip
        self.ask("POST", "/auth/namespaces/evil/metadata", self.rng.choice(bodies))

    def foreign(self) -> None:
        verb, path = self.rng.choice([
            ("GET", "/instances/count-n1"), ("DELETE", "/instances/count-n1"), ("GET", "/networks/lan"),
            ("DELETE", "/networks/lan"), ("POST", "/instances/count-n1/poweroff"), ("DELETE", "/nodes/n2"),
            ("POST", "/auth/namespaces/system/keys"), ("GET", "/instances/count-n2/consoledata"),
        ])  # fmt: skip
        status = self.ask(verb, path, {"key_name": "x", "key": "x" * 12} if path.endswith("keys") else None)
        if 200 <= status < 300:
            self.say(asked=f"{verb} {path}", status=status, body="a stranger was answered")

    def dns(self) -> None:
        self.ask("POST", "/networks/mine/dns", {"name": "a-" * 40 + "!", "value": "10.9.0.5"})

    def network(self) -> None:
        self.ask(
            "POST",
            "/networks",
            {"name": "mine", "netblock": self.rng.choice(["10.9.0.0/24", "0.0.0.0/0", "x"])},
        )
        self.ask("DELETE", "/networks/mine")

    def guest(self) -> None:
        """One that floods its console, for a moment."""
        body = {"name": "flood", "cpus": 1, "memory": 64, "disk": [{"base": "flood:1"}], "network": []}
        if self.ask("POST", "/instances", body) == 200:
            time.sleep(self.rng.uniform(3, 8))
        self.ask("GET", "/instances/flood/consoledata?length=100000")
        self.ask("DELETE", "/instances/flood")

    def odd_guest(self) -> None:
        data = self.rng.choice(["é", "A", base64.b64encode(b"#!" + b"x" * 70_000).decode(), "=" * 100])
        memory = self.rng.choice([1, -1, 10**30, 64])
        self.ask("POST", "/instances", {"name": "ignore", "cpus": 1, "memory": memory, "user_data": data,
                                        "disk": [{"base": "sector:1", "bus": "floppy"}]})  # fmt: skip
        self.ask("DELETE", "/instances/ignore")

    def connections(self) -> None:
        """Idle ones, half a request, and a header without an end."""
        for old in self.idle[: len(self.idle) // 2]:
            old.close()
        del self.idle[: len(self.idle) // 2]
        for _ in range(IDLE):
            with contextlib.suppress(OSError):
                made = socket.create_connection(HERE, 5)
                made.sendall(self.rng.choice(PIECES))
                self.idle.append(made)

    def work(self) -> None:
        verbs = [
            self.wrong_key,
            self.odd_json,
            self.foreign,
            self.dns,
            self.network,
            self.odd_guest,
            self.connections,
        ]
        last = 0.0
        while not self.stop.exists():
            verb = self.rng.choice(verbs)
            if time.monotonic() - last > 60:
                verb, last = self.guest, time.monotonic()
            verb()
            self.count[verb.__name__] += 1
            time.sleep(0.05)  # two cores carry all of it
        self.ask("DELETE", "/instances", {"confirm": True})
        self.say(over=dict(self.count))


if __name__ == "__main__":
    Stranger(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])).work()
