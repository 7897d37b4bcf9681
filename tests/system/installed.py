"""A machine with Debian on it and systemd as its process 1, in namespaces: packages are installed as people do."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

from scripts import fresh_root
from tests.system.machine import within

_CGROUPS = Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")

# Own devices: what replaces one here replaces nobody's else. Its own network has no way out.
_BOOT = """
root=$1
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs dev "$root/dev" -o mode=755
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"; mount --bind /dev/$name "$root/dev/$name"
done
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
mknod -m 666 "$root/dev/net/tun" c 10 200
mount -t devpts devpts "$root/dev/pts" -o newinstance,ptmxmode=666
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs shm "$root/dev/shm"
mount -t tmpfs run "$root/run" -o mode=755
mount -t cgroup2 none "$root/sys/fs/cgroup"
ip link set lo up
cd "$root"
mkdir .old
pivot_root . .old
umount -l /.old
rmdir /.old
exec env -i container=sf PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=multi-user.target
"""


class Installed:
    """`root` has systemd. `boot` and `power_off` as often as you like."""

    def __init__(self, root: Path) -> None:
        self.root = root
        mount = next(path for path in _CGROUPS if (path / "cgroup.procs").exists())
        self._cgroup = mount / f"sf-test-{secrets.token_hex(4)}"
        self._outer: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Until everything that starts with the machine has."""
        self._cgroup.mkdir()
        join = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        unshare = "unshare -m -p -n -u -i -C --fork --kill-child --propagation private bash -euc".split()
        argv = [
            "bash",
            "-euc",
            join,
            "bash",
            "setpriv",
            "--pdeathsig",
            "KILL",
            *unshare,
            _BOOT,
            "bash",
            str(self.root),
        ]
        self._outer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
        within(
            60,
            lambda: (
                self._first()
                and self.run("systemctl is-system-running", check=False).stdout.strip()
                in ("running", "degraded")
            ),
            "systemd has started everything",
        )

    def _first(self) -> str:
        assert self._outer is not None and self._outer.poll() is None
        path = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        children = path.read_text().split()
        return children[0] if children else ""

    def run(
        self, command: str, *, check: bool = True, seconds: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """A line of shell inside, as root."""
        argv = ["nsenter", "-t", self._first(), "-m", "-p", "-n", "-u", "-i", "-C", "--"]
        own = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
        own |= {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            [*argv, "sh", "-c", command], env=own, capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    def power_off(self) -> None:
        """As a person does it."""
        assert self._outer is not None
        self.run("systemctl poweroff", check=False)
        self._outer.wait(1500)
        self._clean()

    def close(self) -> None:
        if self._outer is not None and self._outer.poll() is None:
            self._outer.kill()
            self._outer.wait(30)
        self._clean()

    def _clean(self) -> None:
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            within(30, lambda: self._removed(Path(directory)), f"{directory} is empty")  # noqa: B023

    @staticmethod
    def _removed(path: Path) -> bool:
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def in_root(root: Path, command: str) -> None:
    """A line of shell in a root that is not booted, with this machine's network."""
    argv = fresh_root.entering(root, ["sh", "-euc", command])
    environment = fresh_root.environment() | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
