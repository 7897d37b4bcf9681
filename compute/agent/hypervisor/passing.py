"""A running guest's memory, and what its disks hold, from one qemu into another: as streams over unix sockets.

    source       mirror, send ──▶ settled ──▶ go_on ──▶ sent, for good: it stands still until `resume` or its end
    destination  (Domain.incoming, start_paused) expect ──▶ arrived: it stands still until `resume`

Over qemu's monitor: libvirt's own migration reaches for the other node's libvirt, as root there. It knows nothing of
these nodes and jobs, nor that a domain comes in; started paused, it lets that be. Each socket carries one connection
for memory, one for each disk. Raises Refused with qemu's words, Conflict or NotFound where it has ended.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from compute.agent.hypervisor.libvirt import Hypervisor, Refused
from compute.errors import Conflict, NotFound

_OUT, _IN, _END_S = "sf-out-", "sf-in-", 10.0
_FASTEST_BYTES, _STALL_MS = 1 << 28, 100


def _nodes(hypervisor: Hypervisor, uuid: str) -> dict[str, str]:
    """File → the node of the overlay that it holds."""
    nodes = hypervisor.qmp(uuid, "query-named-block-nodes", flat=True)
    return {n["file"]: n["node-name"].replace("storage", "format") for n in nodes if n["drv"] == "file"}


def expect(hypervisor: Hypervisor, uuid: str, memory: Path, disks: Mapping[str, Path], nbd: Path) -> None:
    """Listen for its memory on the socket `memory`; and on `nbd` for its disks (device → overlay), if there are any."""
    call = partial(hypervisor.qmp, uuid)
    if disks:
        call("nbd-server-start", addr={"type": "unix", "data": {"path": str(nbd)}})
    for device, path in disks.items():
        export = {"id": _IN + device, "node-name": _nodes(hypervisor, uuid)[str(path)], "name": device}
        call("block-export-add", type="nbd", writable=True, **export)
    call("migrate-set-parameters", **{"announce-rounds": 0})  # who has it is not settled when it has arrived
    call("migrate-incoming", uri=f"unix:{memory}")


def arrived(hypervisor: Hypervisor, uuid: str) -> bool:
    """Whether all of it is here, its disks flushed to the node's: it stands still, and may be resumed."""
    call = partial(hypervisor.qmp, uuid)
    said = call("query-migrate")
    if said.get("status") == "failed":
        raise Refused(f"what came cannot be used: {said.get('error-desc', 'qemu does not say why')}")
    if said.get("status") != "completed":
        return False
    with suppress(Refused):  # there are no disks
        call("nbd-server-stop")
    call("stop")  # of one that stands still it is a flush, without which a guest's own would not outlive qemu
    return True


def announce(hypervisor: Hypervisor, uuid: str) -> None:
    """Frames of the guest's own addresses, from which switches learn where it is."""
    hypervisor.qmp(uuid, "announce-self", initial=50, max=550, rounds=5, step=100)


def mirror(hypervisor: Hypervisor, uuid: str, disks: Mapping[str, tuple[Path, Path]]) -> None:
    """Copy what overlays hold, and from now on each write: device → overlay, socket of the NBD export DEVICE."""
    call = partial(hypervisor.qmp, uuid)
    for device, (path, socket) in disks.items():
        server, job = {"type": "unix", "path": str(socket)}, {"job-id": _OUT + device, "sync": "top"}
        node = _nodes(hypervisor, uuid)[str(path)]
        call("blockdev-add", driver="nbd", server=server, export=device, **{"node-name": _OUT + device})
        call("blockdev-mirror", device=node, target=_OUT + device, speed=_FASTEST_BYTES, **job)


def settled(hypervisor: Hypervisor, uuid: str, disks: int) -> bool:
    """Whether the disks (so many) are copied, and each write since follows at once."""
    jobs = [j for j in hypervisor.qmp(uuid, "query-block-jobs") if j["device"].startswith(_OUT)]
    if len(jobs) < disks:
        raise Refused("a disk could not be copied: the other side was cut off, or has no room")
    return all(job["ready"] for job in jobs)


def send(hypervisor: Hypervisor, uuid: str, memory: Path, *, pause: bool) -> None:
    """Begin to send its memory to who listens on this socket; `pause`: before the last of it wait for `go_on`."""
    call, on = partial(hypervisor.qmp, uuid), {"pause-before-switchover": pause, "auto-converge": True}
    call("migrate-set-capabilities", capabilities=[{"capability": k, "state": v} for k, v in on.items()])
    call("migrate-set-parameters", **{"max-bandwidth": _FASTEST_BYTES, "downtime-limit": _STALL_MS})
    call("migrate", uri=f"unix:{memory}")


def sending(hypervisor: Hypervisor, uuid: str) -> tuple[str, int]:
    """Qemu's word for how far that is, pre-switchover or completed among them, and bytes of memory sent."""
    said = hypervisor.qmp(uuid, "query-migrate")
    if said.get("status") in ("failed", "cancelled"):
        raise Refused(f"its memory was not sent: {said.get('error-desc', said['status'])}")
    return said.get("status", ""), said.get("ram", {}).get("transferred", 0)


def go_on(hypervisor: Hypervisor, uuid: str) -> None:
    """It stands still (pre-switchover): end the copies of its disks, which are whole, and send the rest."""
    _end_jobs(hypervisor, uuid, force=False)
    hypervisor.qmp(uuid, "migrate-continue", state="pre-switchover")


def _end_jobs(hypervisor: Hypervisor, uuid: str, *, force: bool) -> None:
    call, deadline = partial(hypervisor.qmp, uuid), time.monotonic() + _END_S
    asked = set[str]()
    while jobs := {j["device"] for j in call("query-block-jobs") if j["device"].startswith(_OUT)}:
        for job in jobs - asked:
            with suppress(Refused):  # it has just ended
                call("block-job-cancel", device=job, force=force)
        asked |= jobs
        if time.monotonic() > deadline:
            raise Refused("the copies of its disks do not end")
        time.sleep(0.002)


def withdraw(hypervisor: Hypervisor, uuid: str) -> bool:
    """Give up sending unless all was sent. True: it is as it was; False: all was sent, or it has ended."""
    call, deadline = partial(hypervisor.qmp, uuid), time.monotonic() + _END_S
    try:
        while (state := call("query-migrate").get("status", "none")) not in ("none", "failed", "cancelled"):
            if state == "completed":
                return False
            call("migrate_cancel")
            if time.monotonic() > deadline:
                raise Refused(f"its move cannot be ended: {state}")
            time.sleep(0.01)
        tidy(hypervisor, uuid)
    except (NotFound, Conflict):
        return False
    return True


def tidy(hypervisor: Hypervisor, uuid: str) -> None:
    """Take away what `mirror` made."""
    _end_jobs(hypervisor, uuid, force=True)
    for node in hypervisor.qmp(uuid, "query-named-block-nodes", flat=True):
        if node["node-name"].startswith(_OUT):
            with suppress(Refused):
                hypervisor.qmp(uuid, "blockdev-del", **{"node-name": node["node-name"]})
