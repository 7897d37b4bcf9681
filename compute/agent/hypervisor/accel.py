"""Whether KVM truly works here, found out by booting a few bytes.

A machine may have /dev/kvm, answer its API, create a VM and still never get a kernel past its first instructions
(hosts that are guests themselves, such as KVM_PVM). So a ROM of our own goes the way that every kernel goes: real
mode, page tables, long mode, and prints from there. Under TCG it takes 40 ms, under a KVM that works less.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compute.errors import Invalid
from imagestore import Settings, durable

_TIME_LIMIT_S = 5
_SAYS = b"K"
_EXIT = 33  # isa-debug-exit: (0x10 << 1) | 1
_CODE = bytes.fromhex(
    "".join(re.findall(r"(?m)^[^#\n]*", Path(__file__).with_name("longmode.hex").read_text()))
)
_ROM_SIZE = 1 << 16
_RESET_VECTOR = bytes.fromhex("ea000000f0")  # jmp F000:0000


@dataclass(frozen=True, slots=True)
class Verdict:
    """kvm or tcg, and why."""

    accel: str
    reason: str
    cpu: str = ""  # a CPU model to use in place of the host's own

    def __str__(self) -> str:
        return f"{self.accel} ({self.reason})"


def rom() -> bytes:
    """The probe's firmware: 64 KiB that end at 4 GiB and are seen below 1 MiB as well."""
    image = bytearray(_ROM_SIZE)
    image[: len(_CODE)] = _CODE
    image[0xFFF0 : 0xFFF0 + len(_RESET_VECTOR)] = _RESET_VECTOR
    return bytes(image)


def reaches_long_mode(qemu: str, accel: str, time_limit_s: float = _TIME_LIMIT_S) -> str:
    """ "" if a guest under `accel` prints from 64-bit mode within the time limit, else what went wrong."""
    argv = f"{qemu} -accel {accel} -machine pc -m 16 -nodefaults -no-user-config -no-reboot -display none".split()
    argv += "-chardev stdio,id=out -device isa-debugcon,iobase=0xe9,chardev=out".split()
    argv += "-device isa-debug-exit,iobase=0xf4,iosize=1".split()
    with tempfile.NamedTemporaryFile(suffix=".rom") as firmware:
        firmware.write(rom())
        firmware.flush()
        argv, nothing = [*argv, "-bios", firmware.name], subprocess.DEVNULL
        try:
            done = subprocess.run(argv, stdin=nothing, capture_output=True, timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return f"a guest does not reach 64-bit mode within {time_limit_s:g} s"
        except OSError as err:
            return f"{qemu} does not run: {err}"
    if done.returncode == _EXIT and done.stdout == _SAYS:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"a guest ends before 64-bit mode: {said[-1] if said else f'exit status {done.returncode}'}"


def _version(qemu: str) -> str:
    done = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0] if done.stdout else ""


def find(state_dir: Path, qemu: str = "qemu-system-x86_64") -> Verdict:
    """The accelerator to use: the setting `accel`, or a verdict kept per boot of the machine and qemu version."""
    wish = Settings().get("accel")
    if wish:
        if wish not in ("kvm", "tcg"):
            raise Invalid(f"SF_ACCEL is {wish!r}", hint="kvm or tcg")
        # Unprobed: a KVM without all of the host's features still runs the oldest 64-bit CPU.
        return Verdict(wish, "by SF_ACCEL", cpu="qemu64" if wish == "kvm" else "")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Verdict("tcg", "there is no /dev/kvm that we may open")
    if shutil.which(qemu) is None:
        return Verdict("tcg", f"{qemu} is not installed")
    key = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _version(qemu)]
    kept = state_dir / "accel.json"
    try:
        known = json.loads(kept.read_text())
        if known["key"] == key:
            return Verdict(known["accel"], known["reason"])
    except (OSError, ValueError, KeyError):
        pass
    problem = reaches_long_mode(qemu, "kvm")
    verdict = Verdict("tcg", f"KVM is there, but {problem}") if problem else Verdict("kvm", "probed")
    state_dir.mkdir(parents=True, exist_ok=True)
    kept_now = {"key": key, "accel": verdict.accel, "reason": verdict.reason}
    durable.write(kept, json.dumps(kept_now).encode(), 0o644)
    return verdict
