"""An image service of its own for a test: a real process under a state directory, and questions to it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from imagestore.cache.control import ControlClient
from imagestore.cache.imaged import control_socket
from imagestore.errors import StoreError

SF = [sys.executable, "-c", "from cli.main import main; main()"]


class Imaged:
    def __init__(self, state: Path, *stores: str, **settings: str) -> None:
        self.state, self.process = state, None
        self.environment = os.environ | {"SF_STATE_DIR": str(state), "SF_STORE": " ".join(stores)} | settings
        self.client = ControlClient(control_socket(state))
        self.log = state / "imaged.log"
        self.prefix: list[str] = []

    def start(self) -> "Imaged":
        self.state.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [*self.prefix, *SF, "imaged"], env=self.environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if self.ask("ls")["pid"] == self.process.pid:
                    return self
            except StoreError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.02)
        raise AssertionError("the image service does not answer")

    def ask(self, op: str, **arguments: Any) -> Any:
        return asyncio.run(self.client.ask(op, **arguments))

    def row(self, digest: object) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.ask("ls")["images"] if row["digest"] == str(digest))
        return found

    def messages(self) -> list[str]:
        return [event["message"] for event in self.ask("watch", after=0, wait_s=0)]

    def wait_complete(self, digest: object, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.row(digest)["complete"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(30) == 0, self.log.read_text()

    def __enter__(self) -> "Imaged":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
