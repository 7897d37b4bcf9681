"""What a node knows of itself and remembers of its server: `node.json` in its state directory.

The id is the node: its name may change, its directory may be moved. The epoch and how far it was are written before
a desired state is acted on, so a server whose state lacks what this node was once told can be told so.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
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
