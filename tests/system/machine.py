"""One machine with `sf serve` on it, as a person would have it: namespaces of its own, libvirtd, the command line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.private_libvirtd import QEMU_CONF, PrivateHost

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = "instances/*/console.log"


def within(seconds: float, true: Callable[[], object], what: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def qemu_as_nobody() -> str:
    """A qemu.conf like those of Debian and Ubuntu: qemu is not root, and libvirt gives it its files."""
    conf = QEMU_CONF.replace('user = "root"', 'user = "nobody"').replace(
        'group = "root"', 'group = "nogroup"'
    )
    return conf.replace("dynamic_ownership = 0", "dynamic_ownership = 1")


def give_kvm_to_everybody(host: PrivateHost) -> None:
    """libvirt asks qemu anew at each call while a /dev/kvm is there that qemu's user may not open."""
    mine = "mknod -m 666 /run/kvm c 10 232 && mount --bind /run/kvm /dev/kvm"
    host.run(["sh", "-c", f"[ ! -e /dev/kvm ] || {{ {mine}; }}"])


def _says_ready(console: Path) -> bool:
    with contextlib.suppress(OSError):  # its guest is gone
        return b"SF-GUEST-READY" in console.read_bytes()
    return False


def send(number: int, *processes: int) -> None:
    """A signal to each that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


class Machine:
    """`sf` in namespaces of its own. `start` and `kill` as often as you like; guests do not mind."""

    def __init__(self, host: PrivateHost, home: Path, **settings: str) -> None:
        self.host, self.home, self.state = host, home, home / "sf"
        self.settings = {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "SF_STATE_DIR": str(self.state),
            "NO_COLOR": "1",
            **settings,
        }
        self.server: subprocess.Popen[bytes] | None = None

    def argv(self, *words: str) -> list[str]:
        """A command line in the machine with sf's settings."""
        variables = [f"{name}={value}" for name, value in self.settings.items()]
        return self.host.inside(["env", "--default-signal=INT", *variables, *words])

    def module(self, name: str, *words: str) -> list[str]:
        """A command line in the machine that runs a module of the tests.

        Entering the machine loses the working directory, and an installed sf does not carry its tests.
        """
        return self.argv("env", f"PYTHONPATH={ROOT}", "setsid", "-w", sys.executable, "-m", name, *words)

    def sf(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `sf` with these arguments."""
        done = subprocess.run(self.argv("sf", *words), capture_output=True, text=True, timeout=180)
        assert done.returncode == 0 or not check, f"sf {' '.join(words)}: {done.stderr}\n{self.said()}"
        return done

    def listed(self, *words: str) -> Any:
        """The JSON of a list or show."""
        return json.loads(self.sf(*words, "--format", "json").stdout)

    def start(self, *words: str) -> None:
        """`sf serve` (or what `words` say), in the background, until it answers."""
        with (self.home / "serve.log").open("ab") as log:
            self.server = subprocess.Popen(
                self.argv("setsid", "-w", "sf", *(words or ("serve",))),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if not words:
            within(60, lambda: self.sf("network", "ls", check=False).returncode == 0, "sf serve answers")

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to `sf serve` or `sf agent` itself, and wait for its end."""
        assert self.server is not None
        if self.server.poll() is None:
            asked = self.host.run(
                [
                    "pgrep",
                    "-f",
                    f"^{sys.executable.rsplit('/', 1)[0]}.*/bin/sf (serve|agent)|bin/sf (serve|agent)",
                ],
                check=False,
            )
            for pid in asked.stdout.split():
                self.host.run(["kill", f"-{int(number)}", pid], check=False)
        self.server.wait(30)

    def processes(self, what: str = "") -> list[int]:
        """All of this machine with `what` in their command line, as the test's machine numbers them."""
        space, found = Path(f"/proc/{self.host.pid}/ns/pid").readlink(), list[int]()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it is gone
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if (path / "ns/pid").readlink() == space and what in words:
                    found.append(int(path.name))
        return found

    def said(self) -> str:
        log = self.home / "serve.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""

    def instance(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.listed("instance", "show", name)
        return found

    def ready_line(self, name: str) -> str:
        """The guest's SF-GUEST-READY line, or ""."""
        # Not before some guest here or on a neighbour says so: each question takes a processor from those that boot.
        logs = [*self.state.glob(CONSOLE), *self.home.parent.glob(f"*/sf/{CONSOLE}")]
        if not any(map(_says_ready, logs)):
            return ""
        text = self.sf("instance", "console", name, check=False).stdout
        found = re.search(r"SF-GUEST-READY .*", text)
        return found.group().strip() if found else ""

    def traces(self) -> list[str]:
        """Everything of this installation that can be seen in the machine's kernel, libvirt, processes and files."""
        found = [f"namespace {line}" for line in self.host.run(["ip", "netns", "list"]).stdout.splitlines()]
        links = json.loads(self.host.run(["ip", "-j", "link"]).stdout)
        found += [f"link {link['ifname']}" for link in links if link["ifname"] not in ("lo", "eth0")]
        found += self.host.run(["nft", "list", "tables"]).stdout.splitlines()
        found += [f"domain {name}" for name in self.host.virsh("list", "--all", "--name").stdout.split()]
        processes = self.host.run(["ps", "-eo", "comm="]).stdout.split()
        found += [f"process {name}" for name in processes if "dnsmasq" in name or "qemu" in name]
        for place in ("instances", "net"):
            directory = self.state / place
            found += [f"file {path}" for path in directory.rglob("*")] if directory.is_dir() else []
        return found
