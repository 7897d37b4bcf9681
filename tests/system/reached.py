"""What can be reached of a network's guests, and when: who asks for an address by what name, who answers to ssh.

python -m tests.system.reached    # in the network's namespace: a line of JSON for whatever is seen, until killed
"""

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.system.machine import ROOT, Machine, send

_EVERYTHING, _AGAIN_S = 3, 1.0  # ETH_P_ALL
_CLIENT, _NAME = 61, 12  # options of DHCP
_SSH = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=30")


@cache
def _space(machine: Machine, network: str) -> str:
    vni = machine.listed("network", "show", network)["vxlan_id"]
    listed = machine.host.run(["ip", "netns", "list"]).stdout.split()
    (space,) = (name for name in listed if name.endswith(f"-{vni:06x}"))
    return space


def inside(machine: Machine, *words: str, network: str = "lan") -> list[str]:
    """A command line in a network's namespace, as its gateway."""
    return machine.argv("ip", "netns", "exec", _space(machine, network), *words)


def login(machine: Machine, key: Path, address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command by ssh; its stderr names the host's key."""
    argv = inside(machine, "ssh", "-v", "-i", str(key), *_SSH, f"debian@{address}", *words)
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


class Reached:
    """A context in which a network is watched."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._path = machine, machine.home / "reached.json"

    def __enter__(self) -> Self:
        words = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.system.reached")
        with self._path.open("w") as file:
            self._process = subprocess.Popen(inside(self._machine, *words), stdout=file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        send(signal.SIGKILL, *self._machine.processes("-m tests.system.reached"))
        self._process.wait(30)

    def said(self, what: str) -> list[dict[str, Any]]:
        """All that was seen of one kind: `asks` (mac, name, client; by DHCP), `answers` (mac, key; by ssh)."""
        lines = self._path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["what"] == what]


def _asked(frame: bytes) -> dict[str, str]:
    """Of a question by DHCP, who asks."""
    ip = frame[14:]
    udp = ip[(ip[0] & 15) * 4 :] if ip[:1] and ip[9] == 17 else b""
    if udp[2:4] != b"\0\x43":
        return {}
    at, options = 8 + 240, dict[int, bytes]()
    while at + 1 < len(udp) and udp[at] != 255:
        options[udp[at]] = udp[at + 2 : at + 2 + udp[at + 1]]
        at += 2 + udp[at + 1]
    name, client = options.get(_NAME, b"").decode(errors="replace"), options.get(_CLIENT, b"").hex()
    return {"what": "asks", "mac": frame[6:12].hex(":"), "name": name, "client": client}


def _key(address: str) -> str:
    with contextlib.suppress(OSError), socket.create_connection((address, 22), 0.2):
        argv = ["ssh-keyscan", "-T", "20", "-t", "ed25519", address]
        words = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.split()
        return words[-1] if words else ""
    return ""


def main() -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERYTHING))
    known, said_s = dict[str, str](), dict[str, float]()  # address → MAC, when it answered
    while True:
        while select.select([wire], [], [], 0.05)[0]:
            frame = wire.recv(2048)
            if frame[12:14] == b"\x08\0" and (row := _asked(frame)):
                print(json.dumps(row), flush=True)
            if frame[12:14] == b"\x08\x06" and any(frame[28:32]):
                known[socket.inet_ntoa(frame[28:32])] = frame[22:28].hex(":")
        for address, mac in known.items():
            if said_s.get(address, 0) + _AGAIN_S < time.monotonic() and (key := _key(address)):
                said_s[address] = time.monotonic()
                print(json.dumps({"what": "answers", "mac": mac, "key": key}), flush=True)


if __name__ == "__main__":
    main()
