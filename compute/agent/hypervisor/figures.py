"""What guests and their node use, as libvirt and the kernel count it."""

import os
from pathlib import Path

import libvirt

from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.wire.operations import Figures

_KINDS = libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_VCPU
_KINDS |= libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_BLOCK
# One whose monitor is busy at this moment says less: nobody waits for a guest.
_HOW = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
_DISKS = {"disk_bytes": "physical", "read_bytes": "rd.bytes", "written_bytes": "wr.bytes"}


def of_guests(hypervisor: Hypervisor, installation: str) -> dict[str, Figures]:
    """Of this installation's running guests by uuid, in one bulk question. Raises Unavailable, Refused."""
    prefix, found = domain.name(installation, ""), dict[str, Figures]()
    with hypervisor.calling() as connection:
        for one, stats in connection.getAllDomainStats(_KINDS, _HOW):
            disks, cpus = range(stats.get("block.count", 0)), range(stats.get("vcpu.maximum", 0))
            used = {n: sum(stats.get(f"block.{d}.{what}", 0) for d in disks) for n, what in _DISKS.items()}
            cpu_ns = sum(stats.get(f"vcpu.{n}.time", 0) for n in cpus)  # all that there is without a cgroup
            used["cpu_s"] = stats.get("cpu.time", cpu_ns) / 1e9
            used["memory_bytes"] = stats.get("balloon.rss", 0) << 10
            if one.name().startswith(prefix):
                found[one.name().removeprefix(prefix)] = used
    return found


def of_node(directory: Path) -> Figures:
    """The machine's, and the file system's that has the guests' disks (proc(5), statvfs(3))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    memory, disk = {words[0]: int(words[1]) << 10 for words in lines}, os.statvfs(directory)
    return {
        "cpu_s": (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"),
        "memory_bytes": memory["MemTotal:"] - memory["MemAvailable:"],
        "memory_total_bytes": memory["MemTotal:"],
        "disk_bytes": (disk.f_blocks - disk.f_bavail) * disk.f_frsize,
        "disk_total_bytes": disk.f_blocks * disk.f_frsize,
    }
