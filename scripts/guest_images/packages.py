"""Debian packages as a source of files: fetched by apt with the machine's own sources, unpacked, never installed."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")  # Debian's name, Ubuntu's name


class BuildError(Exception):
    """An image cannot be built; the text says what is missing and what to do."""


def _apt_cache(*arguments: str) -> str:
    done = subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=False)
    return done.stdout


def dependencies(package: str) -> list[str]:
    """What a package needs directly (the first of alternatives; virtual packages left out)."""
    shown = _apt_cache("show", "--no-all-versions", package)
    fields = re.findall(r"^(?:Pre-)?Depends: (.*)$", shown, re.MULTILINE)
    names = [re.split(r"[ |(:]", item.strip())[0] for field in fields for item in field.split(",")]
    return [name for name in names if name]


def closure(packages: Iterable[str], *, without: frozenset[str] = frozenset()) -> list[str]:
    """The packages and all that they need, without what the caller has already."""
    found: dict[str, None] = {}
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in without:
            found[name] = None
            waiting.extend(dependencies(name))
    return list(found)


def kernel_packages() -> list[str]:
    """The newest kernel for virtual machines: its versioned image and, where split off (Ubuntu), its modules."""
    for name in KERNEL_PACKAGES:
        versioned = [need for need in dependencies(name) if need.startswith("linux-image-")]
        if versioned:
            modules = [need for need in dependencies(versioned[0]) if need.startswith("linux-modules-")]
            return versioned[:1] + modules
    raise BuildError(f"apt knows none of {', '.join(KERNEL_PACKAGES)}: run apt-get update (amd64 only)")


def fetch(packages: Iterable[str], directory: Path) -> list[Path]:
    """Downloads the packages' files into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"apt-get download failed: {done.stderr.strip()} (apt-get update may help)")
    return sorted(directory.glob("*.deb"))


def unpack(files: Iterable[Path], directory: Path) -> None:
    """Unpacks package files below `directory`; nothing of theirs is run."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        subprocess.run(["dpkg-deb", "-x", file, directory], check=True)


def place(directory: Path, name: str) -> Path:
    """Where unpacked packages hold `name`, such as bin/busybox: newer ones hold it below /usr."""
    found = next((path for path in (directory / name, directory / "usr" / name) if path.exists()), None)
    if found is None:
        raise BuildError(f"no package holds /{name}")
    return found
