"""A running guest's memory, and what its disks hold, from one qemu into another, or a file: as streams.

    source       mirror ─▶ settled: send ─▶ pre-switchover, go_on ─▶ completed, for good; it stands still until `resume`
    destination  (Domain.incoming, start_paused) expect ─▶ arrived; it stands still until `resume`
    a file       keep, the guest's end ─▶ (Domain.incoming, start_paused) restore, as often as you like

Over qemu's monitor: libvirt's own migration reaches for the other node's libvirt, as root there. It knows nothing of
these nodes and jobs, nor that a domain comes in; started paused, it lets that be. Each socket carries one connection
for memory, one for each disk. Raises Refused with qemu's words, Conflict or NotFound where it has ended.
"""

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from compute.agent.hypervisor.libvirt import Hypervisor, Refused
from compute.agent.hypervisor.nodes import overlays
from compute.errors import Conflict, NotFound

_OUT, _LOOKS, _LOOK_S = "sf-out-", 2000, 0.005
_OVER = ("none", "failed", "cancelled", "completed")
_FASTEST_BYTES, _STALL_MS, _SHARE = 1 << 28, 100, 4


def expect(hypervisor: Hypervisor, uuid: str, memory: Path, disks: Mapping[str, Path], nbd: Path) -> None:
    """Listen for its memory on the socket `memory`, and on `nbd` for its disks: device → overlay."""
    call = partial(hypervisor.qmp, uuid)
    call("nbd-server-start", addr={"type": "unix", "data": {"path": str(nbd)}})
    for device, path in disks.items():
        export = {"id": f"sf-in-{device}", "node-name": overlays(call)[str(path)], "name": device}
        call("block-export-add", type="nbd", writable=True, **export)
    call("migrate-set-parameters", **{"announce-rounds": 0})  # who has it is not settled when it has arrived
    call("migrate-incoming", uri=f"unix:{memory}")


def arrived(hypervisor: Hypervisor, uuid: str) -> bool:
    """Whether all of it is here, its disks flushed to the node's: it stands still, and may be resumed."""
    if done := _came(hypervisor, uuid):
        hypervisor.qmp(uuid, "nbd-server-stop")
        # A flush, of one that stands still: a guest's own would not outlive qemu.
        hypervisor.qmp(uuid, "stop")
    return done


def _came(hypervisor: Hypervisor, uuid: str) -> bool:
    if (said := hypervisor.qmp(uuid, "query-migrate")).get("status") == "failed":
        raise Refused(f"what came cannot be used: {said.get('error-desc', 'qemu does not say why')}")
    return bool(said.get("status") == "completed")


def mirror(hypervisor: Hypervisor, uuid: str, disks: Mapping[str, tuple[Path, Path]]) -> None:
    """Copy what overlays hold, and from now on each write: device → overlay, socket of the NBD export DEVICE."""
    call = partial(hypervisor.qmp, uuid)
    for device, (path, socket) in disks.items():
        node, server = {"node-name": _OUT + device}, {"type": "unix", "path": str(socket)}
        call("blockdev-add", driver="nbd", server=server, export=device, **node)
        job = {"job-id": _OUT + device, "sync": "top", "auto-dismiss": False, "speed": _FASTEST_BYTES}
        call("blockdev-mirror", device=overlays(call)[str(path)], target=_OUT + device, **job)


def _jobs(hypervisor: Hypervisor, uuid: str) -> list[dict[str, str]]:
    return [job for job in hypervisor.qmp(uuid, "query-jobs") if job["id"].startswith(_OUT)]


def settled(hypervisor: Hypervisor, uuid: str, disks: int) -> bool:
    """Whether the disks (so many) are copied, and each write since follows at once."""
    jobs = _jobs(hypervisor, uuid)
    if len(jobs) < disks or any("error" in job for job in jobs):
        raise Refused(f"a disk could not be copied: {[job.get('error', job['status']) for job in jobs]}")
    return all(job["status"] == "ready" for job in jobs)


def send(hypervisor: Hypervisor, uuid: str, to: str, *, still: bool, waits: bool = True) -> None:
    """Begin to send its memory, `still` or running, to this URI; before the last of it that `waits` for `go_on`."""
    call, on = partial(hypervisor.qmp, uuid), {"pause-before-switchover": waits, "auto-converge": True}
    if still:
        call("stop")
    call("migrate-set-capabilities", capabilities=[{"capability": k, "state": v} for k, v in on.items()])
    call("migrate-set-parameters", **{"max-bandwidth": _FASTEST_BYTES, "downtime-limit": _STALL_MS})
    call("migrate", uri=to)


def sending(hypervisor: Hypervisor, uuid: str) -> tuple[str, int]:
    """Qemu's word for how far that is, pre-switchover or completed among them, and bytes of memory sent."""
    said = hypervisor.qmp(uuid, "query-migrate")
    if said.get("status") in ("failed", "cancelled"):
        raise Refused(f"its memory was not sent: {said.get('error-desc', said['status'])}")
    return said.get("status", ""), said.get("ram", {}).get("transferred", 0)


def go_on(hypervisor: Hypervisor, uuid: str, disks: int) -> None:
    """It stands still (pre-switchover): end the copies of its disks (so many), which are whole then; send the rest."""
    settled(hypervisor, uuid, disks)
    _end_jobs(hypervisor, uuid, force=False)
    hypervisor.qmp(uuid, "migrate-continue", state="pre-switchover")


def _end_jobs(hypervisor: Hypervisor, uuid: str, *, force: bool) -> None:
    for _ in range(_LOOKS):
        if not (jobs := _jobs(hypervisor, uuid)):
            return
        for job in jobs:
            if job["status"] == "concluded":
                hypervisor.qmp(uuid, "job-dismiss", id=job["id"])
                if "error" in job and not force:
                    raise Refused(f"a disk could not be copied: {job['error']}")
            else:
                with suppress(Refused):  # it is ending
                    hypervisor.qmp(uuid, "block-job-cancel", device=job["id"], force=force)
        time.sleep(_LOOK_S)
    raise Refused("the copies of its disks do not end")


def withdraw(hypervisor: Hypervisor, uuid: str, stays: bool) -> bool:
    """Take away what was begun. False: all was sent and (unless it `stays`) it may be another's, or it has ended."""
    call = partial(hypervisor.qmp, uuid)
    with suppress(NotFound, Conflict):
        for _ in range(_LOOKS):
            if (state := call("query-migrate").get("status", "none")) in _OVER:
                break
            call("migrate_cancel")
            time.sleep(_LOOK_S)
        else:
            raise Refused(f"its move cannot be ended: {state}")
        if state == "completed" and not stays:
            return False
        _end_jobs(hypervisor, uuid, force=True)
        for name in (n["node-name"] for n in call("query-named-block-nodes", flat=True)):
            if name.startswith(_OUT):
                call("blockdev-del", **{"node-name": name})
        return True
    return False


def keep(hypervisor: Hypervisor, uuid: str, memory: Path) -> None:
    """Stop a guest for good, and write its memory into a file that is stored as a disk. Raises OSError, too.

    It may take a part of the room there is: guests whose disks grow have the rest.
    """
    half, room = memory.with_suffix(".new"), shutil.disk_usage(memory.parent).free // _SHARE
    half.touch(mode=0o600)
    out, into = os.pipe()  # AppArmor would have to know a file or a socket
    with os.fdopen(out, "rb", 0) as pipe, half.open("wb") as file:
        send(hypervisor, uuid, hypervisor.hand_over(uuid, into), still=True, waits=False)
        while piece := pipe.read(1 << 20):
            if file.write(piece) and file.tell() > room:
                raise Refused(f"its memory would take more than {room >> 20} MiB of the node's disk")
        file.truncate(-(-file.tell() // 4096) * 4096)
    while sending(hypervisor, uuid)[0] != "completed":
        time.sleep(_LOOK_S)
    hypervisor.destroy(uuid)
    half.rename(memory)


def restore(hypervisor: Hypervisor, uuid: str, memory: Path) -> None:
    """Give a domain that waits for its memory what `keep` wrote; it stands still until `resume`. Raises OSError."""
    out, into = os.pipe()
    with os.fdopen(into, "wb", 0) as pipe, memory.open("rb") as file, suppress(BrokenPipeError):  # at its end
        hypervisor.qmp(uuid, "migrate-incoming", uri=hypervisor.hand_over(uuid, out))
        while os.splice(file.fileno(), pipe.fileno(), 1 << 20):
            pass
    while not _came(hypervisor, uuid):
        time.sleep(_LOOK_S)
