"""The only door to libvirt. Synchronous: callers cross with `asyncio.to_thread` or an executor of their own.

libvirt's events run in one thread per process; `notify(uuid, what)` is called from it, "" meaning "list again" (after
a reconnect, when events may have been missed). A libvirtd that dies takes no guest with it: every call then raises
Unavailable until `connect` has succeeded again.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from compute.agent.hypervisor import domain
from compute.errors import ComputeError, Conflict, NotFound, Unavailable

Notify = Callable[[str, str], None]

_MOVE_S, _PICTURE_BYTES = 60.0, (64 << 20) + 1
_CHANGED, _UNPLUGGED = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED
_AGENT = libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE
_EVENT_THREAD_LOCK = threading.Lock()

_ENDING_S = 0.5
_LOCKED = "if it stays so: stop libvirtd, remove /run/libvirt/qemu/{}.xml, start libvirtd; guests run on"
"""libvirt 9.0, killed between writing that file and qemu's start, never lets go: it passes over what has no pid."""


class Refused(ComputeError):
    """libvirt or qemu said no; the message is theirs."""


@dataclass(frozen=True, slots=True)
class DomainState:
    """How a domain is. `ended` says why one that is off stopped: halted, crashed, destroyed, failed or unknown."""

    power: str
    ended: str = ""
    reason: str = ""


FULL = "the node's file system for disks is full; it goes on when there is room"  # all that werror=enospc stops for
_PAUSED_REASONS = {
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: FULL,
    libvirt.VIR_DOMAIN_PAUSED_WATCHDOG: "the guest's watchdog",
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: "the guest's kernel crashed",
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP: "starting",
}
_ENDED = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "halted",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "failed",
}


@cache  # libvirt has one event loop per process, whoever connects
def _start_events() -> None:
    libvirt.virEventRegisterDefaultImpl()
    libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; it would print them as well

    def turn() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=turn, name="libvirt-events", daemon=True).start()


class Hypervisor:
    """The domains of one installation on one libvirtd."""

    def __init__(self, uri: str, installation: str, notify: Notify) -> None:
        self._uri, self._installation, self._notify = uri, installation, notify
        self._connection: Any = None
        self._heard: list[int] = []
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Connect unless connected. Raises Unavailable."""
        with self._lock:
            with contextlib.suppress(libvirt.libvirtError):
                if self._connection is not None and self._connection.isAlive():
                    return
            with _EVENT_THREAD_LOCK:
                _start_events()
            heard: list[int] = []
            try:
                connection = libvirt.open(self._uri)
                connection.setKeepAlive(5, 3)
                connection.registerCloseCallback(lambda *_: self._notify("", "disconnected"), None)
                for event in (_CHANGED, _UNPLUGGED, _AGENT):
                    callback = partial(self._heard_of, event)
                    heard.append(connection.domainEventRegisterAny(None, event, callback, None))
            except libvirt.libvirtError as err:
                why = f"libvirt at {self._uri} does not answer: {err}"
                raise Unavailable(why, hint="is libvirtd running?") from err
            self._connection, self._heard = connection, heard
        self._notify("", "connected")

    def close(self) -> None:
        """Let the connection go, closed by the last call that uses it (closed under one, that one crashes us)."""
        with self._lock, contextlib.suppress(libvirt.libvirtError):
            connection, self._connection = self._connection, None
            heard, self._heard = self._heard, []
            if connection is not None:
                connection.unregisterCloseCallback()
                for number in heard:  # each holds the connection, which would stay open
                    connection.domainEventDeregisterAny(number)

    def _ours(self, found: Any) -> str:
        prefix = domain.name(self._installation, "")
        name: str = found.name()
        return name.removeprefix(prefix) if name.startswith(prefix) else ""

    def _heard_of(self, event: int, _connection: Any, found: Any, what: int | str, *_: Any) -> None:
        if uuid := self._ours(found):
            connected = what == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
            self._notify(uuid, "" if event != _AGENT else "agent ready" if connected else "agent gone")

    @contextlib.contextmanager
    def calling(self, name: str = "") -> Iterator[Any]:
        connection = self._connection
        if connection is None:
            raise Unavailable(f"not connected to libvirt at {self._uri}")
        try:
            yield connection
        except libvirt.libvirtError as err:
            code = err.get_error_code()
            if code == libvirt.VIR_ERR_NO_DOMAIN:
                raise NotFound(str(err)) from err
            if code == libvirt.VIR_ERR_OPERATION_INVALID:
                raise Conflict(str(err)) from err
            if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
                hint = "does qemu-guest-agent run in it? sf instance console shows what it is at"
                raise Unavailable("the agent in the guest does not answer", hint=hint) from err
            if code == libvirt.VIR_ERR_OPERATION_TIMEOUT or not self._stays(connection):
                hint = _LOCKED.format(name) if name and code == libvirt.VIR_ERR_OPERATION_TIMEOUT else ""
                raise Unavailable(f"libvirt at {self._uri} went away or is busy: {err}", hint=hint) from err
            raise Refused(str(err)) from err

    def _stays(self, connection: Any) -> bool:
        """Whether a refusal was libvirt's own word: one that is ending finds many for it, and answers a moment yet."""
        try:
            connection.getLibVersion()
            time.sleep(_ENDING_S)
            connection.getLibVersion()
        except libvirt.libvirtError:
            return False
        return True

    @contextlib.contextmanager
    def _domain(self, uuid: str) -> Iterator[Any]:
        name = domain.name(self._installation, uuid)
        with self.calling(name) as connection:
            yield connection.lookupByName(name)

    def qemu_group(self) -> int:
        """The group that qemu runs as, which may be nobody's but libvirt's (security model dac); 0 is root."""
        with self.calling() as connection:
            return domain.qemu_group(connection.getCapabilities())

    def others(self, known: Collection[str], machine: str, directory: Path) -> list[str]:
        """Uuids of all domains but the known, running or not, with the ids of the installation and of this node.

        One of 0.1, which knows no node, is ours if its console's log is below `directory`.
        """
        found = []
        with self.calling() as connection:
            for one in connection.listAllDomains():
                if self._ours(one) in known:
                    continue
                try:
                    xml = one.XMLDesc()
                except libvirt.libvirtError as err:
                    if err.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # somebody's that has just gone
                        raise
                    continue
                installation, uuid, node = domain.installation_of(xml)
                here = node == machine if node else domain.console_log(xml).is_relative_to(directory)
                found += [uuid] if installation == self._installation and here else []
        return found

    def define(self, xml: str) -> None:
        """Define or redefine (3 ms)."""
        with self.calling() as connection:
            connection.defineXML(xml)

    def start_paused(self, uuid: str) -> None:
        """Start with the CPUs stopped, so that its taps can be moved first."""
        with self._domain(uuid) as found:
            found.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def resume(self, uuid: str) -> None:
        """Let the CPUs run; nothing if they do."""
        with self._domain(uuid) as found:
            if found.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                found.resume()

    def suspend(self, uuid: str) -> None:
        """Stop the CPUs."""
        with self._domain(uuid) as found:
            found.suspend()

    def reboot(self, uuid: str) -> None:
        """Ask the guest to reboot; it may ignore it."""
        with self._domain(uuid) as found:
            found.reboot(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)

    def press_power(self, uuid: str) -> None:
        """Ask the guest, by its power button, to end; it may ignore it. Nothing if it is off."""
        with contextlib.suppress(NotFound, Conflict, Refused), self._domain(uuid) as found:
            found.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

    def ask_agent_to_end(self, uuid: str) -> None:
        """Ask the guest by its agent, if that has its channel open: it says nothing when it obeys, for up to 5 s."""
        with contextlib.suppress(ComputeError):
            if self.agent_ready(uuid):
                self.agent(uuid, "guest-shutdown", {"mode": "powerdown"}, 5)

    def destroy(self, uuid: str) -> None:
        """Pull the plug (qemu flushes first). Nothing if it is off or unknown."""
        with contextlib.suppress(NotFound, Conflict), self._domain(uuid) as found:
            found.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_DEFAULT)

    def remove(self, uuid: str, *, keep: bool = False) -> None:
        """Pull the plug, and forget the domain with (or without) its UEFI variables and its TPM."""
        self.destroy(uuid)
        kept = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
        gone = libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_TPM
        with contextlib.suppress(NotFound), self._domain(uuid) as found:
            found.undefineFlags(kept if keep else gone)

    def state(self, uuid: str) -> DomainState:
        """How it is now; an undefined domain is off, ended unknown."""
        try:
            with self._domain(uuid) as found:
                state, reason = found.state()
        except NotFound:
            return DomainState("off", "unknown")
        if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED, libvirt.VIR_DOMAIN_SHUTDOWN):
            return DomainState("on")
        if state in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED):
            return DomainState("paused", reason=_PAUSED_REASONS.get(reason, ""))
        if state == libvirt.VIR_DOMAIN_CRASHED:
            return DomainState("off", "crashed")
        return DomainState("off", _ENDED.get(reason, "unknown"))

    def xml(self, uuid: str) -> str:
        """The live XML, or the defined one of a domain that is off."""
        with self._domain(uuid) as found:
            return str(found.XMLDesc())

    def attach(self, uuid: str, device_xml: str) -> None:
        """Hot-plug (10 ms)."""
        with self._domain(uuid) as found:
            found.attachDeviceFlags(device_xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def detach(self, uuid: str, alias: str) -> None:
        """Ask the guest to let a device go; notified when it did."""
        with contextlib.suppress(NotFound), self._domain(uuid) as found:
            found.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def agent_ready(self, uuid: str) -> bool:
        """Whether the guest's agent has its channel open."""
        with contextlib.suppress(NotFound), self._domain(uuid) as found:
            return domain.agent_connected(found.XMLDesc())
        return False

    def agent(self, uuid: str, command: str, arguments: dict[str, Any], timeout_s: int) -> bytes:
        """One command to the agent in the guest; its answer as it came (libvirt takes 10 MiB at most).

        Raises Refused with the guest's own words, Unavailable when it is silent.
        """
        asked = json.dumps({"execute": command, "arguments": arguments})
        with self._domain(uuid) as found:
            return str(libvirt_qemu.qemuAgentCommand(found, asked, timeout_s, 0)).encode()

    def screenshot(self, uuid: str) -> bytes:
        """What its screen shows, cut off after 64 MiB: a PNG from qemu 7.1 on."""
        picture = bytearray()
        with self._domain(uuid) as found:
            stream = found.connect().newStream()
            found.screenshot(stream, 0)
            stream.recvAll(lambda _, data, kept: kept.extend(data[: _PICTURE_BYTES - len(kept)]), picture)
            stream.finish()
        return bytes(picture)

    def hand_over(self, uuid: str, end: int) -> str:
        """Give qemu an end of a pipe, as its own from now on; returns its URI there."""
        asked = json.dumps({"execute": "getfd", "arguments": {"fdname": "sf"}})
        with os.fdopen(end), self._domain(uuid) as found:
            libvirt_qemu.qemuMonitorCommandWithFiles(found, asked, [end], 0)
        return "fd:sf"

    def qmp(self, uuid: str, command: str, **arguments: Any) -> Any:
        """One command to qemu's own monitor, for what libvirt cannot say. Raises Refused."""
        asked = json.dumps({"execute": command, "arguments": arguments})
        with self._domain(uuid) as found:
            answer = json.loads(libvirt_qemu.qemuMonitorCommand(found, asked, 0))
        if "error" in answer:
            raise Refused(f"{command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def move_disk(self, uuid: str, disk: domain.Disk) -> None:
        """Move a running guest's disk to another overlay, copying only what the present one holds (66 ms and more).

        Raises Refused; then the guest is where it was.
        """
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        deadline = time.monotonic() + _MOVE_S
        with self._domain(uuid) as found:
            found.blockCopy(disk.device, domain.overlay_xml(disk), {}, flags)
            while (job := found.blockJobInfo(disk.device)) and time.monotonic() < deadline:
                with contextlib.suppress(libvirt.libvirtError):  # all is copied; it is not "ready" yet
                    if job["cur"] == job["end"]:
                        found.blockJobAbort(disk.device, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                        return
                time.sleep(0.01)
            found.blockJobAbort(disk.device)
            raise Refused(f"moving {disk.device} did not end within {_MOVE_S:.0f} s")

    def grow_disk(self, uuid: str, device: str, size_bytes: int) -> None:
        """Make a running guest's disk larger, which it sees at once."""
        with self._domain(uuid) as found:
            found.blockResize(device, size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    def stop_moving(self, uuid: str, device: str) -> None:
        """End a move that somebody began and did not end; nothing if there is none."""
        with contextlib.suppress(NotFound, Conflict, Refused), self._domain(uuid) as found:
            found.blockJobAbort(device)
