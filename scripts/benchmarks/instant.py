"""From `sf instance create`'s exec to a guest that runs, that has its address, and whose user data wrote a file.

The tiny guest, resumed from a warm state and booted, by turns on one machine, TCG where there is no KVM; then so many
resumed at once. Running is when its processors run: of one that resumes, as a copy that nobody can reach. Itself is the
event `started`; ready and written are lines on its console. `--rounds N`: so many of each.
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks._harness import ROOT, Bench, Failed
from scripts.private_libvirtd import PrivateHost
from tests.system.machine import Machine, within

_DATA = """#!/bin/sh
date >/run/wrote
"""
_SHAPES = {"resumed": "160", "booted": "176"}
_AT_ONCE, _CALM_S, _RUNS = 20, 5, "it runs, as a warm state of its image"


def run(bench: Bench) -> None:
    os.environ.setdefault("SF_ACCEL", "tcg")
    home, found = bench.dir("home"), dict[str, list[float]]()
    (home / "data").write_text(_DATA)
    tiny = subprocess.run(
        [sys.executable, ROOT / "scripts/build-image", "tiny", "--cached"], check=True, capture_output=True
    ).stdout
    with PrivateHost() as host:
        machine = Machine(host, home, SF_ACCEL=os.environ["SF_ACCEL"])
        machine.sf("image", "push", tiny.decode().strip(), "tiny:1")
        machine.start()
        try:
            machine.sf("network", "create", "lan", "10.42.0.0/24")
            began_s = time.monotonic()
            machine.sf("image", "warm", "tiny:1", "--memory", _SHAPES["resumed"])
            bench.number("warm_s", time.monotonic() - began_s, "s")
            for number in range(bench.rounds(50)):
                for kind, memory in _SHAPES.items():
                    _note(found, kind, _one(machine, f"{kind}-{number}", memory, home / "data", kind))
            time.sleep(_CALM_S)
            at_once = partial(_one, machine, memory=_SHAPES["resumed"], data=home / "data", kind="resumed")
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for took in list(pool.map(at_once, (f"at-once-{number}" for number in range(_AT_ONCE)))):
                    _note(found, "at_once", took)
        finally:
            machine.signal()
    for name, all_s in sorted(found.items()):
        bench.number(f"{name}_p50_s", statistics.median(all_s), "s")
        bench.number(f"{name}_max_s", max(all_s), "s")


def _note(found: dict[str, list[float]], kind: str, took: dict[str, float]) -> None:
    for what, took_s in took.items():
        found.setdefault(f"{kind}_{what}", []).append(took_s)


def _one(machine: Machine, name: str, memory: str, data: Path, kind: str) -> dict[str, float]:
    words = ("--image", "tiny:1", "--memory", memory, "--network", "lan", "--user-data", str(data))
    began_s = time.time()
    uuid = machine.listed("instance", "create", name, *words)["uuid"]
    took = {"asked": time.time() - began_s}
    console = machine.state / "instances" / uuid / "console.log"
    for what, line in (("ready", b"SF-GUEST-READY"), ("written", b"SF-GUEST-USER-DATA-DONE")):
        while not (console.exists() and line in console.read_bytes()):
            if time.time() > began_s + 120:
                raise Failed(f"{name} is not {what} after 120 s")
            time.sleep(0.005)
        took[what] = time.time() - began_s
    within(30, lambda: "started" in _events(machine, name), "it says that it has started")
    events = _events(machine, name)
    if (kind == "resumed") != any("began as a warm state" in message for message in events):
        raise Failed(f"{name} did not begin as it was to: {events}")
    machine.sf("instance", "delete", name)
    within(60, lambda: machine.sf("instance", "show", name, check=False).returncode, "it is gone")
    runs = events[_RUNS if kind == "resumed" else "started"]
    return took | {"running": runs - began_s, "itself": events["started"] - began_s}


def _events(machine: Machine, name: str) -> dict[str, float]:
    return {event["message"]: event["timestamp"] for event in machine.listed("instance", "events", name)}
