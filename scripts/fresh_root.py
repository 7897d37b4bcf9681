"""A new root of Debian or Ubuntu with apt and nothing else in it, for what must be shown where sf never was.

    fresh_root.py SUITE [--bring INSIDE:OUTSIDE]… -- COMMAND…

runs COMMAND in a clone of the committed tree in a new root of SUITE (bookworm, trixie, noble), in mount and process
namespaces of its own, copies what is to be brought out, and leaves nothing else, however it ends. Downloads the way
this machine does: its apt mirrors, its pip configuration, its certificates and its proxy variables are passed on.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

from guest_images import debian_image  # noqa: E402
from guest_images.packages import BuildError  # noqa: E402

SYSTEMS = {"bookworm": "Debian 12", "trixie": "Debian 13", "noble": "Ubuntu 24.04"}
_UBUNTU_KEYRING = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg")
_TREE = Path(__file__).resolve().parents[1]
_PASSED_ON = re.compile(
    r"PIP_|SF_TEST_|SF_DEBIAN_|(https?|no|ftp|all)_proxy$|.*CA_(BUNDLE|CERTS|FILE)|SSL_|.*_CAINFO$", re.I
)
_PIP_FILES = ("etc/pip.conf", "root/.config/pip/pip.conf", "root/.pip/pip.conf")

# Process 1 of the new root. pivot_root, not chroot: a namespace that is entered from inside must not lead outside.
_ENTER = """
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
for directory in $BINDS; do
    mkdir -p "$root$directory"
    mount --bind -o ro "$directory" "$root$directory"
done
unset BINDS
cd "$root"
mkdir .old
pivot_root . .old
umount -l /.old
rmdir /.old
cd "${SF_FRESH_CWD:-/root}"
# Not exec: process 1 must be one that waits for orphans.
"$@" && status=0 || status=$?
exit $status
"""


def _directories_that_pip_reads() -> list[str]:
    """Local directories that this machine's pip configuration names (find-links, index URLs)."""
    texts = [value for name, value in os.environ.items() if name.startswith("PIP_")]
    texts += [(Path("/") / name).read_text() for name in _PIP_FILES if (Path("/") / name).is_file()]
    words = re.findall(r"(?:file://)?(/[^\s,;'\"]+)", "\n".join(texts))
    found = {Path(word) for word in words if Path(word).is_dir()}
    # A simple index points to files beside it.
    return sorted({str(path.parent if path.name == "simple" else path) for path in found})


def _copy_machine_configuration(root: Path) -> None:
    for name in (*_PIP_FILES, "etc/resolv.conf", "etc/hosts"):
        source = Path("/") / name
        if source.is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).unlink(missing_ok=True)
            shutil.copyfile(source, root / name)
    own = Path("/usr/local/share/ca-certificates")
    if own.is_dir():
        shutil.copytree(own, root / str(own).lstrip("/"), dirs_exist_ok=True)


def _sources(suite: str) -> str:
    if suite != "noble":
        return debian_image.sources(updates=True, codename=suite)
    if not _UBUNTU_KEYRING.exists():
        raise BuildError(f"{_UBUNTU_KEYRING} is not there: Ubuntu's package ubuntu-keyring has it")
    main = os.environ.get("SF_TEST_UBUNTU_MIRROR", "http://archive.ubuntu.com/ubuntu")
    pockets = (suite, f"{suite}-updates", f"{suite}-security")
    return "".join(f"deb [signed-by={_UBUNTU_KEYRING}] {main} {pocket} main universe\n" for pocket in pockets)


@contextlib.contextmanager
def new_root(suite: str) -> Iterator[Path]:
    """A new root with a clone of the tree in /root/sf, removed in the end. Raises BuildError."""
    root = Path(tempfile.mkdtemp(prefix="sf-fresh-", dir="/var/tmp"))
    root.chmod(0o755)
    try:
        print(f"fresh: a new root of {SYSTEMS[suite]} in {root}", file=sys.stderr, flush=True)
        made = subprocess.run(
            ["mmdebstrap", "--mode=root", "--variant=minbase", "--include=apt", "--quiet", suite, root, "-"],
            input=_sources(suite),
            text=True,
            check=False,
        )
        if made.returncode:
            raise BuildError("mmdebstrap failed")
        _copy_machine_configuration(root)
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", _TREE, root / "root/sf"], check=True)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def entering(root: Path, command: list[str], *, network: bool = False) -> list[str]:
    """The command line that runs `command` in the root, in namespaces of its own; with `environment`."""
    kinds = ["--mount", "--pid", *(["--net"] if network else [])]
    argv = ["unshare", *kinds, "--fork", "--kill-child", "--propagation", "private"]
    return [*argv, "bash", "-euc", _ENTER, "bash", str(root), *command]


def environment(directory: str = "/root") -> dict[str, str]:
    """Of what runs in a root, begun in `directory`."""
    passed = {name: value for name, value in os.environ.items() if _PASSED_ON.match(name)}
    passed |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    return passed | {
        "LC_ALL": "C.UTF-8", "BINDS": " ".join(_directories_that_pip_reads()), "SF_FRESH_CWD": directory,
    }  # fmt: skip


def run(suite: str, command: list[str], bring: list[str] | None = None) -> int:
    """The exit code of `command` in a new root."""
    if os.geteuid() != 0:
        print("fresh: needs root", file=sys.stderr)
        return 1
    if suite not in SYSTEMS:
        print(f"fresh: the suite is one of {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the root is removed then too
    try:
        with new_root(suite) as root:
            argv, own = entering(root, command), environment("/root/sf")
            code = subprocess.run(argv, env=own, stdin=subprocess.DEVNULL, check=False).returncode
            for inside, _, outside in (pair.partition(":") for pair in bring or ()):
                if code == 0:
                    shutil.copytree(root / "root/sf" / inside, outside, dirs_exist_ok=True)
            return code
    except BuildError as error:
        print(f"fresh: {error}", file=sys.stderr)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SYSTEMS)
    parser.add_argument("--bring", action="append", metavar="INSIDE:OUTSIDE")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    return run(given.suite, given.command, given.bring)


if __name__ == "__main__":
    sys.exit(main())
