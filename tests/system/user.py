"""Somebody at work: creates, stops, starts and deletes guests and networks, and pushes images, until a file appears.

    python -m tests.system.user NAME STATE_DIR LOG STOP SEED

Runs inside a machine, against http://127.0.0.1:13000. LOG gets a JSON line when an operation begins and one when it
ends: what was answered, or that nobody knows (the connection broke). At the end it says what it holds to be there.
"""

import http.client
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

from tests.api_server import Answer, Running

MOST_GUESTS = 4
SETTLED = ("created", "error")


class User:
    """`have`: guests that were answered for and not deleted since, name → uuid. `pushed`: images likewise.

    doubtful: guests whose delete was asked for and the answer lost: they may be there or not.
    """

    def __init__(self, name: str, state: Path, log: Path, stop: Path, seed: int) -> None:
        self.name, self.state, self.log, self.stop = name, state, log, stop
        self.rng = random.Random(seed)
        self.have: dict[str, str] = {}
        self.pushed: list[str] = []
        self.doubtful: list[str] = []
        self.number = 0
        key = (state / "auth" / "local-key").read_text().strip()
        self.api = Running("http://127.0.0.1:13000", key, None, None, None)  # type: ignore[arg-type]

    def say(self, **what: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"at": time.time(), "user": self.name, **what}) + "\n")

    def ask(self, verb: str, path: str, body: Any = None) -> Answer | None:
        """None: the connection broke or nobody was there; what became of it is not known."""
        try:
            return self.api.call(verb, path, body)
        except (OSError, urllib.error.URLError, http.client.HTTPException, KeyError, TypeError):
            self.api.tokens.clear()
            time.sleep(0.3)
            return None

    def wait(self, uuid: str, *states: str, seconds: float = 120) -> str:
        end = time.monotonic() + seconds
        state = ""
        while time.monotonic() < end:
            answer = self.ask("GET", f"/instances/{uuid}")
            if answer is not None:
                state = answer.body.get("state", "gone") if answer.status == 200 else "gone"
                if state in states or state == "gone":
                    return state
            time.sleep(0.2)
        return f"late:{state}"

    def create(self) -> str:
        self.number += 1
        name = f"{self.name}-{self.number}"
        network = [{"network_uuid": "lan"}] if self.rng.random() < 0.8 else []
        body = {"name": name, "cpus": 1, "memory": 64, "disk": [{"base": "sector:1"}], "network": network}
        answer = self.ask("POST", "/instances", body)
        if answer is None:
            return "unknown"
        if answer.status != 200:
            return f"refused {answer.status} {answer.body}"
        self.have[name] = answer.body["uuid"]
        return self.wait(answer.body["uuid"], *SETTLED)

    def delete(self) -> str:
        if not self.have:
            return "nothing"
        name = self.rng.choice(sorted(self.have))
        uuid = self.have.pop(name)
        answer = self.ask("DELETE", f"/instances/{uuid}")
        if answer is None:
            self.have[name] = uuid  # asked again later: a delete may be repeated
            self.doubtful.append(uuid)
            return "unknown"
        return self.wait(uuid, "deleted") if answer.status in (200, 404) else f"refused {answer.status}"

    def power(self) -> str:
        if not self.have:
            return "nothing"
        uuid = self.have[self.rng.choice(sorted(self.have))]
        verb = self.rng.choice(["poweroff", "poweron", "reboothard", "pause", "unpause"])
        answer = self.ask("POST", f"/instances/{uuid}/{verb}")
        return "unknown" if answer is None else f"{verb} {answer.status}"

    def network(self) -> str:
        name = f"net-{self.name}"
        made = self.ask("POST", "/networks", {"name": name, "netblock": f"10.{100 + len(self.name)}.0.0/24"})
        gone = self.ask("DELETE", f"/networks/{name}")
        return f"{made and made.status} {gone and gone.status}"

    def push(self) -> str:
        self.number += 1
        name = f"{self.name}-image:{self.number}"
        disk = self.log.with_name(f"{self.name}.raw")
        disk.write_bytes(self.rng.randbytes(2 << 20))
        environment = os.environ | {"SF_STATE_DIR": str(self.state)}
        argv = ["sf", "image", "push", "-q", "--input-format", "raw", str(disk), name]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            self.pushed.append(name)
            return "pushed"
        return f"exit {done.returncode} {done.stderr[-300:]}"

    def work(self) -> None:
        while not self.stop.exists():
            few = len(self.have) < MOST_GUESTS
            verbs = [self.create] * (5 if few else 0) + [self.delete] * 3 + [self.power] * 2
            verb = self.rng.choice([*verbs, self.network, self.push])
            self.say(op=verb.__name__, phase="begin")
            self.say(op=verb.__name__, phase="end", result=verb())
        self.say(op="", phase="over", have=self.have, doubtful=self.doubtful, pushed=self.pushed)


if __name__ == "__main__":
    User(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])).work()
