"""The process that serves DHCP and DNS to one network: dnsmasq in the network's namespace, fed from files (dnsmasq(8)).

It makes itself a daemon, so it dies neither with us nor with our process group, and is found again by its command
line. Addresses come to it by SIGHUP; when a guest went away or changed its address it starts anew (some 10 ms), because
it would keep the address for the old MAC until that lease ended. What the files say: net/plan/dhcp.py.
"""

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from net.errors import Failed
from net.plan.facts import Dnsmasq

_USER = "dnsmasq"
_END_MS = 2500


@dataclass(frozen=True, slots=True)
class Running:
    """A dnsmasq of ours."""

    pid: int
    namespace: str
    netns: int  # inode of the namespace it stands in


def running(prefix: str) -> list[Running]:
    """Every dnsmasq whose configuration names one of our namespaces and that this machine started.

    Machines that share a process table (nodes in containers or in tests) are told apart by their mount namespace.
    """
    found = []
    mine = Path("/proc/thread-self/ns/mnt").stat().st_ino
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(arguments[0])).name != "dnsmasq":
                continue
            config = next((a for a in arguments if a.startswith(b"--conf-file=")), b"")
            namespace = Path(os.fsdecode(config)).parent.name
            if namespace.startswith(prefix) and (path / "ns/mnt").stat().st_ino == mine:
                netns = (path / "ns/net").stat().st_ino
                found.append(Running(int(path.name), namespace, netns))
        except OSError:  # it ended while we looked
            continue
    return found


class Daemon:
    """The files and the process of one network's dnsmasq."""

    def __init__(self, directory: Path, namespace: str) -> None:
        self._directory = directory / namespace
        self._config = self._directory / "dnsmasq.conf"
        self._hosts = self._directory / "hosts"
        self._names = self._directory / "names"
        self._loaded = self._directory / "loaded"

    def settings(self) -> Dnsmasq:
        """What the process has read: empty where the files were changed since."""
        with suppress(FileNotFoundError):
            found = Dnsmasq(*(p.read_text() for p in (self._config, self._hosts, self._names)))
            if self._loaded.read_text() == repr(found):
                return found
        return Dnsmasq("", "", "")

    def start(self, wanted: Dnsmasq) -> None:
        """Starts it in the namespace where the calling thread stands; raises Failed with its words."""
        self._write(wanted)
        command = [
            "dnsmasq",
            f"--conf-file={self._config}",
            f"--dhcp-hostsfile={self._hosts}",
            f"--addn-hosts={self._names}",
            f"--pid-file={self._directory / 'pid'}",
            f"--user={self._user()}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd="/")
        except FileNotFoundError as error:
            raise Failed("dnsmasq is not installed", hint="install the package dnsmasq-base") from error
        except subprocess.TimeoutExpired as error:
            raise Failed("dnsmasq did not start within 20 s") from error
        if done.returncode != 0:
            raise Failed(f"dnsmasq did not start: {done.stderr.strip()}")
        self._loaded.write_text(repr(wanted))

    def reload(self, wanted: Dnsmasq, pid: int) -> None:
        """New hosts and names under the same configuration; nobody is dropped."""
        self._write(wanted)
        os.kill(pid, signal.SIGHUP)
        self._loaded.write_text(repr(wanted))

    def forget(self) -> None:
        """Removes the files. Twice is once."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._directory)

    def _write(self, wanted: Dnsmasq) -> None:
        # Killed between here and the last line of start or reload, the files do not match `loaded`, and the
        # next reconcile starts the process anew.
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o755)
        self._loaded.unlink(missing_ok=True)
        texts = (self._config, wanted.config), (self._hosts, wanted.hosts), (self._names, wanted.names)
        for path, text in texts:
            beside = path.with_suffix(".new")
            beside.write_text(text)
            beside.chmod(0o644)
            beside.rename(path)

    def _user(self) -> str:
        """Its own user, unless that one could not read the files: a state directory closed to others."""
        ways = (self._directory, *self._directory.parents)
        known = any(line.startswith(f"{_USER}:") for line in Path("/etc/passwd").read_text().splitlines())
        return _USER if known and all(way.stat().st_mode & 0o001 for way in ways) else "root"


def stop(pid: int) -> None:
    """Ends it and waits, at last without mercy. No such process is success."""
    with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid), "rb") as process:
        ended = select.poll()
        ended.register(process, select.POLLIN)  # also of one that nobody has waited for yet
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(process.fileno(), number)
            if ended.poll(_END_MS):
                return
        raise Failed(f"dnsmasq (process {pid}) does not end")


def upstream(
    paths: Sequence[Path] = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf")),
) -> tuple[IPv4Address, ...]:
    """The host's DNS servers from the first file that names one which is not loopback."""
    for path in paths:
        found = list[IPv4Address]()
        with suppress(OSError):
            for words in map(str.split, path.read_text().splitlines()):
                if words[:1] == ["nameserver"]:
                    with suppress(ValueError):  # IPv6
                        found += map(IPv4Address, words[1:2])
        if found := [address for address in found if not address.is_loopback]:
            return tuple(found)
    return ()
