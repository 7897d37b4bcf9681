"""Taps: making one, who holds one open, and giving one back to a process whose tap somebody removed.

Who holds a tap open keeps its descriptor when the device goes (with its namespace, or by `ip link del`); every read of
it is an error from then on (Linux, drivers/net/tun.c). A copy of that descriptor (pidfd_getfd(2)) is attached to a new
tap of the same name, flags and header, and the guest behind it goes on without having seen anything but silence.
"""

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from net.errors import NetError
from net.kernel.netns import NetlinkError, Netns
from net.plan.facts import HOST, Observed

_SYS_PIDFD_GETFD = 438
_TUNSETIFF, _TUNSETPERSIST, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454CB, 0x400454D8
_TUNGETIFF, _TUNGETVNETHDRSZ = 0x800454D2, 0x800454D7
_TAP = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_ASKED = _TAP | 0x0100  # IFF_MULTI_QUEUE
_DETACH_S = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


def create_tap(name: str, alias: str) -> None:
    """A persistent tap in the calling thread's namespace, down."""
    with Path("/dev/net/tun").open("r+b", buffering=0) as device:
        _attach(device, name, alias, _TAP)


def _attach(device: IO[bytes], name: str, alias: str, flags: int, header_bytes: int = 0) -> None:
    """The alias is set before the tap is made to last, so that whoever is killed in between leaves nothing."""
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    if header_bytes:
        fcntl.ioctl(device, _TUNSETVNETHDRSZ, struct.pack("i", header_bytes))
    with Netns(HOST) as host:
        host.mark(name, alias)
    fcntl.ioctl(device, _TUNSETPERSIST, 1)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process's descriptor of a tap, and how it was attached."""

    pid: int
    fd: int
    flags: int
    header_bytes: int


class Holders:
    """Who held which tap when it was last looked at. One per Plane, under its lock."""

    def __init__(self) -> None:
        self._held: dict[str, Holder] = {}

    def put_back(self, wanted: Mapping[str, str], observed: Observed) -> list[str]:
        """Make those of `wanted` (name to alias) anew that are nowhere and whose holder waits; which were made.

        They are in the calling thread's namespace then, and down.
        """
        links = [link for facts in observed.namespaces.values() for link in facts.links.values()]
        there = {link.name: link.carrier for link in links if link.kind == "tun"}
        lost = {name: held for name, held in self._held.items() if name in wanted and name not in there}
        done = []
        for name, held in lost.items():
            with suppress(OSError, NetlinkError, NetError):  # it ended, or the next look tries again
                done += [name] if _put_back(name, wanted[name], held) else []
        self._held = lost | self._holding({name for name, carrier in there.items() if carrier})
        return done

    def _holding(self, names: Collection[str]) -> dict[str, Holder]:
        seen = ((name, _look(held.pid, held.fd, name)) for name, held in self._held.items() if name in names)
        found = {name: held for name, held in seen if held}
        if found.keys() != set(names):
            for link in Path("/proc").glob("[0-9]*/fd/*"):
                pid, fd = int(link.parts[2]), int(link.name)
                name = _attached(pid, fd)
                if name and name in names and (now := _look(pid, fd, name)):
                    found[name] = now
        return found


def _put_back(name: str, alias: str, held: Holder) -> bool:
    """A new tap for who lost one; False if nobody waits for it."""
    deadline = time.monotonic() + _DETACH_S
    while (attached := _attached(held.pid, held.fd)) == name and time.monotonic() < deadline:
        time.sleep(0.02)  # a namespace that lost its name frees its devices a little later
    if attached != "":
        return False
    with _copy(held.pid, held.fd) as device:
        _attach(device, name, alias, held.flags, held.header_bytes)
    return True


def _attached(pid: int, fd: int) -> str | None:
    """The tap behind a descriptor, "" if it has lost it, None if it is no tap's (any more)."""
    try:
        if str(Path(f"/proc/{pid}/fd/{fd}").readlink()) != "/dev/net/tun":
            return None
        lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return None
    return next((line[4:].strip() for line in lines if line.startswith("iff:")), None)


def _look(pid: int, fd: int, name: str) -> Holder | None:
    if _attached(pid, fd) != name:
        return None
    try:
        with _copy(pid, fd) as copy:
            (flags,) = struct.unpack_from("H", fcntl.ioctl(copy, _TUNGETIFF, bytes(40)), 16)
            (header,) = struct.unpack("i", fcntl.ioctl(copy, _TUNGETVNETHDRSZ, bytes(4)))
    except OSError:
        return None
    return Holder(pid, fd, flags & _ASKED, header)


def _copy(pid: int, fd: int) -> IO[bytes]:
    """The same open file, by a descriptor of ours. Raises OSError."""
    with os.fdopen(os.pidfd_open(pid), "rb") as process:
        copy = _libc.syscall(_SYS_PIDFD_GETFD, process.fileno(), fd, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return os.fdopen(copy, "r+b", buffering=0)
