"""A guest's domain and config drive, made from its newest spec before each start."""

from collections.abc import Mapping
from pathlib import Path

from compute.agent.guest import config_drive
from compute.agent.guest.host import Host
from compute.agent.hypervisor import domain
from compute.wire.spec import InstanceSpec
from net import Network


def define(
    host: Host,
    directory: Path,
    spec: InstanceSpec,
    networks: Mapping[str, Network],
    disks: tuple[domain.Disk, ...],
    nics: tuple[domain.Nic, ...],
    vdi_password: str,
) -> None:
    """Write the drive and define the domain, both in place of those of the last start."""
    drive = directory / "config.iso"
    if spec.config_drive:
        half = drive.with_suffix(".new")
        half.touch(mode=0o600)
        half.write_bytes(config_drive.iso(config_drive.files(spec, dict(networks))))
        half.replace(drive)
    how, listen = (host.verdict.accel, host.verdict.cpu), str(host.address)
    whose = host.installation, host.machine
    made = domain.Domain(*whose, spec, directory, *how, disks, nics, listen, vdi_password)
    host.hypervisor.define(domain.domain_xml(made))
