"""What a node knows of itself, remembers of its server (`node.json` in its state directory) and may do by its word.

The id is the node: its name may change, its directory may be moved. The epoch and how far it was are written before
a desired state is acted on, so a server whose state lacks what this node was once told can be told so.

A lease is by CLOCK_BOOTTIME, which goes on while a machine is suspended: whoever wakes up, or goes on after all its
processes stood still, finds it over. What was given to others meanwhile says a desired state that was asked for after
the lease was gained anew.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

from compute.errors import ComputeError, Conflict, Unavailable
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import NodeDesired, Remembered
from imagestore import durable

_LOCKS = Path("/run/lock")


def boot() -> str:
    """Which start of this machine (or container) this is."""
    began = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{began}"


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """kept: where its end stands for the next agent, after a kill -9; of another start of the machine it is void."""

    def __init__(self, kept: Path | None = None) -> None:
        self._until, self._gained, self._confirmed, self._kept = 0.0, 0.0, False, kept
        with contextlib.suppress(OSError, ValueError):
            began, until = kept.read_text().split() if kept else ("", "")
            if began == boot():
                self._until, self._confirmed = float(until), True

    def renewed(self, asked: float, term_s: float) -> None:
        """The server said so to a request that left at `asked` (`now_s`)."""
        if not self.held():
            self._gained, self._confirmed = now_s(), False
        self._until = max(self._until, asked + term_s)

    def confirm(self, asked: float) -> None:
        """A desired state came, asked for at `asked`."""
        self._confirmed = self._confirmed or (self.held() and asked >= self._gained)

    def held(self) -> bool:
        return now_s() < self._until

    def firm(self) -> bool:
        """No other node can do now what this one has the lease for."""
        return self.held() and self._confirmed

    def since(self) -> float:
        """When it was gained, by `now_s`; infinity while it is not firm."""
        return self._gained if self.firm() else inf

    def keep(self) -> None:
        """Write its end down; not synced, since a crash of the machine makes it void."""
        if self._kept and self._confirmed:
            with contextlib.suppress(OSError):  # then the next agent has less time
                (new := self._kept.with_suffix(".new")).write_text(f"{boot()} {self._until}")
                new.rename(self._kept)


def cut(uuids: Collection[str]) -> set[str]:
    """Kill the qemu of these guests, without libvirtd, which may stand still. Returns whose there was: look again."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it is gone, or no qemu of libvirt's
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            if (uuid := words[words.index("-uuid") + 1]) in uuids:
                found.add(uuid)
                os.kill(int(process.name), signal.SIGKILL)
    return found


def cut_first(state_dir: Path) -> None:
    """Of a server's own node, before its state is asked for, which may not answer: what may be another's is off."""
    with contextlib.suppress(OSError, ValueError, ComputeError):
        last = from_plain(NodeDesired, json.loads((state_dir / "desired.json").read_text()))
        if not Lease(state_dir / "lease").firm():
            cut({spec.uuid for spec in last.instances if spec.leased_s})


class Memory:
    """`proof` is what a directory of 0.1, which has no id, is known by: the same for a copy of it."""

    def __init__(self, state_dir: Path, proof: str = "") -> None:
        self._directory, self._path = state_dir, state_dir / "node.json"
        try:
            self.now = from_plain(Remembered, json.loads(self._path.read_text()))
        except FileNotFoundError:
            self.now = Remembered(proof or secrets.token_hex(16), "", 0)
            self._write()
        except (ValueError, ComputeError) as err:
            hint = "restore it from a copy: it says which of the server's nodes this is"
            raise Unavailable(f"cannot read {self._path}: {err}", hint=hint) from err

    def follows(self, desired: NodeDesired) -> bool:
        """Whether it comes after what this node saw before; then it is remembered, durably."""
        epoch, reached = self.now.epoch, self.now.reached
        if epoch not in ("", *desired.former) and (epoch != desired.epoch or reached > desired.reached):
            return False
        if (epoch, reached) != (desired.epoch, desired.reached):
            self.now = replace(self.now, epoch=desired.epoch, reached=desired.reached)
            self._write()
        return True

    def _write(self) -> None:
        durable.write(self._path, json.dumps(to_plain(self.now)).encode())

    @contextlib.contextmanager
    def alone(self, installation: str) -> Iterator[None]:
        """This node once on this host: a copy of its directory would take its guests for its own. Raises Conflict.

        A file in /run/lock for those who share files, a socket's name for those who share the network.
        """
        name = f"sf-{installation}-{self.now.machine}"
        shared = _LOCKS if os.access(_LOCKS, os.W_OK) else Path(tempfile.gettempdir())
        path = shared / f"{name}.lock"
        with contextlib.ExitStack() as held:
            lock = held.enter_context(path.open("a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0{name}")
            except OSError as err:
                if err.errno not in (errno.EAGAIN, errno.EADDRINUSE):
                    raise
                lock.seek(0)
                other = lock.read() or "one in another container"
                hint = f"one is a copy of the other; to be a node of its own, the copy must lose its {self._path.name}"
                same = f"{self._directory} is the same node as {other}, which runs"
                raise Conflict(same, hint=hint) from err
            held.callback(path.unlink, missing_ok=True)
            lock.truncate(0)
            lock.write(str(self._directory))
            lock.flush()
            yield
