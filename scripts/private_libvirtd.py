#!/usr/bin/env python3
"""A machine of one's own on this one: mount, process and (if wanted) network namespaces with a libvirtd inside.

For tests, and for the demo where neither systemd nor libvirtd runs. The user's /etc/libvirt, /var/lib/libvirt and
services are neither read nor changed; when the namespaces' first process ends, everything in them is gone.

    with PrivateHost() as host:
        libvirt.open(host.uri)                 # reachable from outside, through a socket in host.directory
        host.run(["ip", "link"])               # inside

From a shell: `private_libvirtd.py start DIR [--network]` prints the URI and leaves it running, `stop DIR` ends it.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_OWN_DIRECTORIES = ("run", "etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt")

QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
namespaces = []
cgroup_controllers = []
dynamic_ownership = 0
remember_owner = 0
user = "root"
group = "root"
"""

# The first process of the namespaces; everything else enters them with nsenter.
_FIRST = """\
set -e
for d in run etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p /$d; mount --bind "$1/$d" /$d
done
mount -t proc proc /proc
mkdir -p /run/netns /run/lock
if [ "$2" = own ]; then mount -t sysfs sysfs /sys; ip link set lo up; fi
echo ready
sleep infinity >/dev/null &
wait  # process 1 must reap orphans: libvirt waits until a qemu that it ended is really gone
"""


def _capability_cache() -> Path:
    """Where libvirt's knowledge of this machine's qemu is kept between runs: probing anew takes 8 s."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "sf" / "libvirt-capabilities"


class PrivateHost:
    """Namespaces with a libvirtd of their own; a context manager. `directory` is short (socket paths are ≤ 108)."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        network: bool = True,
        linger: bool = False,
        libvirtd: bool = True,
        settings: str = QEMU_CONF,
    ) -> None:
        self._made = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="sf-host-"))
        self._network = network
        self._linger = linger
        self._with_libvirtd = libvirtd
        self._settings = settings
        self._holder: subprocess.Popen[str] | None = None
        self.uri = f"qemu:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The first process of the namespaces, as this machine numbers it."""
        return int((self.directory / "pid").read_text())

    def start(self) -> None:
        """Make the namespaces and start libvirtd in them; again after `stop` it is a reboot (/run is empty)."""
        shutil.rmtree(self.directory / "run", ignore_errors=True)
        for name in _OWN_DIRECTORIES:
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        etc = self.directory / "etc/libvirt"
        (etc / "qemu.conf").write_text(self._settings)
        if not (etc / "libvirtd.conf").exists():
            (etc / "libvirtd.conf").write_text(f'auth_unix_rw = "none"\nhost_uuid = "{uuid.uuid4()}"\n')
        argv = ["unshare", "-m", "-p", *(["-n"] if self._network else [])]
        argv += ["-f", "--kill-child", "--propagation", "private"]
        argv += ["sh", "-c", _FIRST, "sh", str(self.directory), "own" if self._network else "shared"]
        if not self._linger:  # a test run that is killed takes its machines with it
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with (self.directory / "first.log").open("wb") as log:
            self._holder = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError("the namespaces could not be made (root is needed)")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        (self.directory / "pid").write_text(children[0])
        if self._with_libvirtd:
            self.start_libvirtd()

    def stop(self) -> None:
        """Kill everything in the namespaces at once, like a loss of power. The directory stays."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._holder is not None:
            self._holder.wait(30)
            assert self._holder.stdout is not None
            self._holder.stdout.close()
            self._holder = None
        (self.directory / "pid").unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, and remove the directory if it was made here."""
        self.stop()
        if self._made:
            shutil.rmtree(self.directory, ignore_errors=True)

    def inside(self, argv: list[str]) -> list[str]:
        """The command line that runs `argv` inside."""
        network = ["-n"] if self._network else []
        return ["nsenter", "-t", str(self.pid), "-m", "-p", *network, "--", *argv]

    def run(self, argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside; its text output is captured, a failure raises CalledProcessError."""
        options = {"check": True, "capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run(self.inside(argv), **options)

    def popen(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside."""
        return subprocess.Popen(self.inside(argv), **options)

    def start_libvirtd(self) -> None:
        """Start libvirtd inside and wait until it answers."""
        cache, kept = self.directory / "var/cache/libvirt", _capability_cache()
        if kept.is_dir() and not any(cache.iterdir()):
            shutil.copytree(kept, cache, dirs_exist_ok=True)
        socket = self.directory / "run/libvirt/libvirt-sock"
        socket.unlink(missing_ok=True)  # a killed libvirtd leaves it, and the next one would not start
        with (self.directory / "var/log/libvirt/libvirtd.log").open("ab") as log:
            self.popen(
                ["setsid", "-f", "libvirtd", "-p", "/run/libvirtd.pid"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ).wait(30)
        deadline = time.monotonic() + 60
        while self.virsh("capabilities", check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"libvirtd does not start: see {self.directory}/var/log/libvirt/libvirtd.log"
                )
            time.sleep(0.05)
        if not kept.is_dir():
            shutil.copytree(cache, kept, dirs_exist_ok=True)

    def kill_libvirtd(self, number: int = 9) -> None:
        """kill -9, as the out-of-memory killer would; -15 as an upgrade does."""
        pid = (self.directory / "run/libvirtd.pid").read_text().strip()
        self.run(["kill", f"-{number}", pid])
        while self.run(["kill", "-0", pid], check=False).returncode == 0:
            time.sleep(0.01)

    def virsh(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run virsh inside."""
        return self.run(["virsh", "-q", "-c", "qemu:///system", *argv], **options)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--network", action="store_true", help="a network namespace of its own as well")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    host = PrivateHost(options.directory.resolve(), network=options.network, linger=True)
    if options.action == "start":
        host.start()
        print(host.uri)
    else:
        host.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
