"""A running guest's disks at one moment, for who reads them over NBD. Over qemu's monitor: libvirt 9.0 cannot say it.

    device ─▶ sf-cbw.NODE ─▶ NODE, the overlay: export map-DEVICE, what it holds (qemu:allocation-depth)
                 └─▶ scratch, what was overwritten since      sf-snap-DEVICE: export snap-DEVICE, as it was

libvirt knows nothing of these nodes: they go before it changes the disks. A scratch that is full or slow ends the
snapshot alone. Putting back a node that is there already would abort qemu, so each step looks first.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from compute.agent.hypervisor.libvirt import Hypervisor, Refused
from compute.errors import Conflict, NotFound

_CBW, _SNAP = "sf-cbw.", "sf-snap-"
_SLOW_S, _END_S = 4, 10.0
"""What a guest's write waits for the copy of what it overwrites, before the snapshot is given up; and its end."""


def overlays(call: Callable[..., Any]) -> dict[str, str]:
    """File → the node of the overlay that it holds."""
    nodes = (n for n in call("query-named-block-nodes", flat=True) if n["drv"] == "file")
    return {n["file"]: n["node-name"].replace("storage", "format") for n in nodes}


def begin(hypervisor: Hypervisor, uuid: str, disks: Mapping[str, tuple[Path, Path]], socket: Path) -> None:
    """disks: device → overlay, scratch (an empty qcow2 whose size is all that it may use). Raises Refused."""
    call = partial(hypervisor.qmp, uuid)
    node_of = overlays(call)
    devices = {b["inserted"]["node-name"]: b["qdev"] for b in call("query-block") if b.get("inserted")}
    on = {device: node_of[str(overlay)] for device, (overlay, _) in disks.items()}
    for device, (_, scratch) in disks.items():
        file = {"driver": "file", "filename": str(scratch)}  # which a raw node of a given size does not grow
        bounded = {"driver": "raw", "offset": 0, "size": scratch.stat().st_size, "file": file}
        options = {"on-cbw-error": "break-snapshot", "cbw-timeout": _SLOW_S, "node-name": _CBW + on[device]}
        nodes = {"file": on[device], "target": {"driver": "qcow2", "file": bounded}}
        call("blockdev-add", driver="copy-before-write", **nodes, **options)
    stopped = len(disks) > 1 and call("query-status")["running"] and call("stop") is not None
    try:
        for node in on.values():
            call("qom-set", path=devices[node], property="drive", value=_CBW + node)
    finally:
        if stopped:
            call("cont")
    call("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    for device, node in on.items():
        call("blockdev-add", driver="snapshot-access", file=_CBW + node, **{"node-name": _SNAP + device})
        for kind, name, more in (("snap", _SNAP + device, {}), ("map", node, {"allocation-depth": True})):
            export = {"id": f"sf-{kind}-{device}", "node-name": name, "name": f"{kind}-{device}", **more}
            call("block-export-add", type="nbd", **export)


def end(hypervisor: Hypervisor, uuid: str) -> None:
    """Take away whatever of it is there. Nothing if the guest is off. Raises Refused."""
    call, deadline = partial(hypervisor.qmp, uuid), time.monotonic() + _END_S
    with suppress(NotFound, Conflict):
        while ours := [e["id"] for e in call("query-block-exports") if e["id"].startswith("sf-")]:
            for export in ours:
                with suppress(Refused):  # it is going
                    call("block-export-del", id=export, mode="hard")
            if time.monotonic() > deadline:
                raise Refused(f"exports of {uuid} do not go away")
        names = sorted(n["node-name"] for n in call("query-named-block-nodes", flat=True))
        for name in (n for n in names if n.startswith(_SNAP)):
            call("blockdev-del", **{"node-name": name})
        for block in call("query-block"):
            node = block.get("inserted", {}).get("node-name", "")
            if node.startswith(_CBW):
                call("qom-set", path=block["qdev"], property="drive", value=node.removeprefix(_CBW))
        for name in (n for n in names if n.startswith(_CBW)):
            call("blockdev-del", **{"node-name": name})
        with suppress(Refused):  # it was not started
            call("nbd-server-stop")
