"""Snapshots of a guest's disks: begun and ended by its owner between other steps, stored beside them; and the way back.

While one is under way nothing else changes the disks, and a guest that is off stays off. The record says so before
qemu knows of it, so that whoever adopts the guest thaws it and puts all back first; then it is begun anew.
"""

import asyncio
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compute.agent import identity
from compute.agent.guest import overlay, warm
from compute.agent.guest.disks import Disks
from compute.agent.guest.host import Host, Voice
from compute.agent.guest.record import CapturesHeld, Course, Part, Phase
from compute.agent.hypervisor import nodes, passing
from compute.errors import ComputeError, Conflict, NotFound
from compute.wire.spec import Capture, InstanceSpec
from imagestore import Changes, Digest, NbdDisk, StoreError, open_store, push, push_changed

_AGENT_S = 2  # for each answer of the agent in the guest: its file systems are frozen for less than 5 s
_SCRATCH_SHARE = 4  # a snapshot may use one part in so many of the room that is free
_Make = Callable[[CapturesHeld], Part[CapturesHeld]]


class Captures:
    """Works for the guest's task, which `wake` makes look again."""

    def __init__(
        self, host: Host, uuid: str, part: _Make, disks: Disks, voice: Voice, wake: Callable[[], None]
    ) -> None:
        self._host, self._uuid, self._held, self._disks = host, uuid, part(CapturesHeld()), disks
        self._voice, self._wake = voice, wake
        # A socket's path has at most 107 bytes.
        self._directory = host.directory.parent / "run" / f"snapshot-{uuid[:13]}"
        self._memory = host.directory / uuid / "memory"
        self._task: asyncio.Future[Capture] | None = None
        self._daemon: asyncio.subprocess.Process | None = None

    @property
    def at_rest(self) -> bool:
        """One is under way of a guest that is off."""
        return self._daemon is not None

    async def restore(self, now: Course, spec: InstanceSpec) -> Phase:
        """Its phase now that disks are of another image than so far: they are made anew. May be repeated."""
        olds = {disk.device: disk.image for disk in now.spec.disks}
        others = {disk.device for disk in spec.disks if olds.get(disk.device, disk.image) != disk.image}
        if others and now.created:
            await self._host.do(self._host.hypervisor.destroy, self._uuid)
            await self._disks.forget(others)
            await self._disks.make(spec, await self._disks.images(spec, asyncio.Event()))
            self._voice.event(f"{', '.join(sorted(others))}: restored")
        return Phase.STARTING if others and now.created else now.phase

    async def adopt(self) -> None:
        """Thaw the guest unless that is done, and put back what an earlier agent left."""
        await self._thaw()
        if self._held.now.began and self._task is None:
            await self._take_away()

    async def move(self, spec: InstanceSpec) -> None:
        """The disks to what they should be, unless a snapshot is under way."""
        if not self._held.now.began:
            await self._disks.move(spec)

    async def look(self, spec: InstanceSpec, power: str) -> None:
        """End one that is stored, and begin the next that is asked for."""
        if self._task is not None and self._task.done():
            ended, self._task = self._task.result(), None
            await self._take_away(ended)
        asked, taken = {one.uuid for one in spec.snapshots}, self._held.now.taken
        self._voice.taken = tuple(one for one in taken if one.uuid in asked)
        if self._voice.taken != taken:
            await self._held.save(taken=self._voice.taken)
        waiting = [one for one in spec.snapshots if one.uuid not in {one.uuid for one in taken}]
        if waiting and self._task is None and (power == "off" or not waiting[0].at_rest):
            await self._begin(spec, waiting[0], power)

    async def stop(self) -> None:
        """The guest is to be deleted."""
        if self._task is not None:
            await asyncio.wait({self._task})
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _begin(self, spec: InstanceSpec, one: Capture, power: str) -> None:
        spec = replace(spec, disks=tuple(disk for disk in spec.disks if not disk.cdrom))
        await self._held.save(began=one.uuid)
        try:
            if one.warm and power != "off":  # what its disk is then is stored with its memory
                await identity.prepare(self._host.hypervisor, self._uuid)
                await self._host.do(passing.keep, self._host.hypervisor, self._uuid, self._memory)
                power = "off"
            disks, socket = self._prepare(spec), self._directory / "s"
            one = replace(one, frozen=power == "on" and await self._freeze())
            begin = partial(self._host.do, nodes.begin, self._host.hypervisor, self._uuid, disks, socket)
            begun = asyncio.ensure_future(self._serve(spec, socket) if power == "off" else begin())
            # Reads of an image that does not arrive may hold qemu up; file systems do not wait for that.
            if one.frozen and not (await asyncio.wait({begun}, timeout=_AGENT_S / 2))[0]:
                await self._thaw()
                one = replace(one, frozen=False)
            await begun
        except (ComputeError, StoreError, OSError) as err:
            one = replace(one, error=str(err) or repr(err))
        finally:
            await self._thaw()
        one = replace(one, moment_s=time.time())
        self._task = asyncio.ensure_future(self._host.do(self._push, spec, one))
        self._task.add_done_callback(lambda _: self._wake())

    async def _freeze(self) -> bool:
        """Whether the guest's file systems are at rest; written down before it is asked."""
        ready = await self._host.do(self._host.hypervisor.agent_ready, self._uuid)
        await self._held.save(frozen=ready)
        return ready and await self._ask("guest-fsfreeze-freeze")

    async def _thaw(self) -> None:
        if self._held.now.frozen and await self._ask("guest-fsfreeze-thaw"):
            await self._held.save(frozen=False)
        elif self._held.now.frozen:
            asyncio.get_running_loop().call_later(1, self._wake)

    async def _ask(self, command: str) -> bool:
        """Whether it was done, or the guest is off."""
        try:
            await self._host.do(self._host.hypervisor.agent, self._uuid, command, {}, _AGENT_S)
        except (NotFound, Conflict):
            pass
        except ComputeError as err:
            self._voice.event(f"the agent in the guest, {command}: {err}")
            return False
        return True

    def _prepare(self, spec: InstanceSpec) -> dict[str, tuple[Path, Path]]:
        """Empty scratch files of the size that they may grow to: device → overlay, scratch."""
        self._directory.mkdir(mode=0o711, parents=True)
        found, room = {}, shutil.disk_usage(self._directory).free // _SCRATCH_SHARE // len(spec.disks)
        for device in (disk.device for disk in spec.disks):
            on, scratch = found[device] = self._disks.overlay(device), self._directory / f"{device}.qcow2"
            overlay.create(scratch, overlay.virtual_size(on), None)
            os.truncate(scratch, max(room >> 16 << 16, scratch.stat().st_size))
            for path in (scratch, self._directory):  # qemu writes there
                os.chown(path, on.stat().st_uid, on.stat().st_gid)
        return found

    async def _serve(self, spec: InstanceSpec, socket: Path) -> None:
        """The disks of a guest that is off, by a process that ends with this one."""
        images = await self._disks.images(spec, asyncio.Event())
        argv = ["setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon", "--pidfile", f"{socket}.pid"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
        for name in (disk.device for disk in spec.disks):
            file: dict[str, Any] = {"driver": "file", "filename": str(self._disks.overlay(name))}
            node = {"driver": "qcow2", "node-name": name, "read-only": True, "backing": None, "file": file}
            if under := images.get(name):
                path = {"driver": "file", "filename": str(under.path)}
                served = {"driver": "nbd", "server": {"type": "unix", "path": str(under.socket)}}
                image = {"driver": "raw", "node-name": f"under-{name}", "read-only": True}
                image["file"] = served if under.socket else path
                # By its name: qemu would join options in place to the file that the overlay's header names.
                node["backing"] = f"under-{name}"
                argv += ["--blockdev", json.dumps(image)]
            argv += ["--blockdev", json.dumps(node)]
            for kind, depth in (("snap", "off"), ("map", "on")):
                export = f"type=nbd,id={kind}-{name},name={kind}-{name},node-name={name}"
                argv += ["--export", f"{export},allocation-depth={depth}"]
        self._daemon = await asyncio.create_subprocess_exec(*argv)
        while self._daemon.returncode is None and not socket.with_suffix(".pid").exists():
            await asyncio.sleep(0.02)
        if self._daemon.returncode is not None:
            raise Conflict("the disks cannot be opened", hint="the agent's log has the words of qemu")

    def _push(self, spec: InstanceSpec, one: Capture) -> Capture:
        digests, costs, notes, socket = dict[str, str](), Counter[str](), "", self._directory / "s"
        try:
            if one.error:
                return one
            store = open_store(self._host.images.own_store(spec.namespace))
            labels = dict(one.labels)
            if one.warm:
                kept = push(store, self._memory, None, labels=labels, architecture="memory", format_="raw")
                digests["memory"] = labels["memory"] = str(kept.digest)
                costs.update(new=kept.new_bytes, known=kept.known_bytes, written=kept.written_bytes)
                labels["fit"] = warm.fit(self._host, spec)
            for name, image in ((disk.device, self._disks.image(disk)) for disk in spec.disks):
                with closing(NbdDisk(socket, f"map-{name}", "qemu:allocation-depth")) as depths:
                    held = [(start, end) for start, end, depth in depths.extents() if depth == 1]
                base, rows = Digest.parse(image) if image else None, np.array(held, np.int64).reshape(-1, 2)
                with closing(NbdDisk(socket, f"snap-{name}")) as disk:
                    done = push_changed(store, disk, Changes(base, rows), {**labels, "disk": name})
                costs.update(held=sum(end - start for start, end in held), read=disk.read_bytes)
                costs.update(new=done.new_bytes, known=done.known_bytes, written=done.written_bytes)
                digests[name], notes = str(done.digest), " ".join((notes, *done.notes)).strip()
            store.backend.close()
            return replace(one, digests=digests, costs=dict(costs), note=notes)
        except (ComputeError, StoreError, OSError) as err:
            hint = "has the guest ended, or had what it overwrote no room?"
            return replace(one, error=f"{err} ({hint})" if isinstance(err, StoreError) else repr(err))

    async def _take_away(self, *ended: Capture) -> None:
        await self._host.do(nodes.end, self._host.hypervisor, self._uuid)
        if self._daemon is not None:
            with suppress(ProcessLookupError):
                self._daemon.kill()
            await self._daemon.wait()
            self._daemon = None
        shutil.rmtree(self._directory, ignore_errors=True)
        for path in self._memory.parent.glob("memory*") if ended else ():  # else it is begun anew with that
            path.unlink()
        await self._held.save(began="", taken=(*self._held.now.taken, *ended))
