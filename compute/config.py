"""What `sf serve` and `sf agent` are told: the settings as values."""

import platform
import shlex
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from imagestore import Fill, Options, Settings, duration_s, options_of, size_bytes, switch


def _told(parse: Callable[[str], Any], text: str = "", name: str = "") -> Any:
    """A field that the setting of its name (or `name`) says, and where nothing does, `text`."""
    return field(default=parse(text), metadata={"told": (parse, text), "name": name})


def _ratio(text: str) -> float:
    if not 0 <= (found := float(text)) <= 10_000:
        raise ValueError("not a number from 0 to 10,000")
    return found


def _store_url(text: str) -> str:
    return text if "://" in text or not text else Path(text).absolute().as_uri()


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that one server is configured by."""

    state_dir: Path = Path("/var/lib/sf")
    state: str = _told(str)  # etcd://… that keeps the records; "" for a file in `state_dir`
    state_access: tuple[str, ...] = field(default=("",) * 4, repr=False)
    """For etcd: files of TLS (authority, certificate, key), then NAME:PASSWORD."""
    guests: bool = _told(switch, "yes")  # whether the server's machine is a node, too
    instance_dir: Path | None = None  # guests' disks; None: instances/ under `state_dir`
    stores: tuple[tuple[str, str], ...] = ()
    """(name, URL) of the image stores that names are looked up in, in order; () is the one under `state_dir`."""
    stores_again: Callable[[], Mapping[str, str]] = field(default=dict, compare=False)
    """The same as the settings have them by now: remotes come and go while a server runs."""
    host: str = "127.0.0.1"
    port: int = 13000
    tls: bool = False
    """Whether the API speaks TLS, by the installation's authority unless `tls_cert` names own files."""
    tls_cert: str = _told(str)
    tls_key: str = _told(str)
    node_name: str = "localhost"
    libvirt_uri: str = _told(str, "qemu:///system")
    mesh_address: IPv4Address = _told(IPv4Address, "127.0.0.1")  # this node's VXLAN endpoint
    agent_listen: str = ""
    """host:port of the TLS endpoint for agents; "" for none. With an etcd, the server's own uses it, too."""
    floating_pool: IPv4Network | None = _told(lambda text: IPv4Network(text) if text else None)
    uplink: str = _told(str)  # the host's interface towards the floating pool
    resolvers: tuple[IPv4Address, ...] = _told(lambda text: tuple(map(IPv4Address, text.split())))
    """Upstream DNS servers of virtual networks; () is the host's own, without loopback."""
    excluded: tuple[IPv4Network, ...] = _told(
        lambda text: tuple(map(IPv4Network, text.split())), name="excluded_networks"
    )  # ranges that no virtual network may overlap
    fill: str = _told(lambda text: str(Fill(text)), "now")
    """When the rest of an image that a guest already runs from is fetched: now, idle or never."""
    images: Options = field(default_factory=Options)  # how the node's image service fetches and keeps images
    read_timeout_s: float = _told(duration_s, "120", "read_timeout")
    """A guest's read that no store can serve for so long ends in an I/O error."""
    peer_port: int = _told(int, "13002")
    """Where, on the mesh address, the image service serves nodes with the same stores; 0 for not at all."""
    cpu_ratio: float = _told(_ratio, "16")
    memory_reserve_mib: int = _told(int, "512")
    restart_reserve: float = _told(_ratio, "0")
    """Percent of each node's memory: kept for guests of nodes that are lost."""
    fence_command: tuple[str, ...] = _told(lambda text: tuple(shlex.split(text)))
    """What takes a node's power when it is called with `off NODE`; () for none."""
    disk_ratio: float = _told(_ratio, "4")
    disk_reserve: int = _told(size_bytes, "2G")
    """Bytes: where a node's file system has less left, no disk is added. All may grow to `disk_ratio` times that."""
    architecture: str = "x86_64"
    state_backup: str = _told(_store_url)
    """URL of the store that the state is backed up into, every so often; so many stay."""
    state_backup_every_s: float = _told(duration_s, "1d", "state_backup_every")
    state_backup_keep: int = _told(lambda text: max(1, int(text)), "14")
    sync_names: bool = _told(switch, "no")
    """Whether anybody may have images fetched that a source list names; those in `sources`, "" for the usual ones."""
    sources: str = _told(str)
    novnc: Path = _told(Path, "/usr/share/novnc")  # noqa: RUF009 - nobody changes it
    """Where Debian's package has noVNC; what npm packs as @novnc/novnc is as good."""


def load(settings: Settings) -> Config:
    """What the settings say of a server or an agent. Raises Invalid, naming the setting."""
    host, port = settings.parsed("listen", host_port, "127.0.0.1:13000")
    told = (one for one in fields(Config) if one.metadata)
    return Config(
        **{f.name: settings.parsed(f.metadata["name"] or f.name, *f.metadata["told"]) for f in told},
        state_dir=settings.state_dir,
        state_access=tuple(settings.get(f"state_{name}") for name in ("ca", "cert", "key", "user")),
        instance_dir=settings.instance_dir,
        stores=tuple(settings.stores.items()),
        stores_again=lambda: Settings(settings.flags, settings.environment).stores,
        host=host or "127.0.0.1",
        port=port,
        tls=settings.tls,
        node_name=settings.get("node_name") or socket.gethostname().split(".")[0] or "localhost",
        agent_listen=settings.get("agent_listen") or (f"{host}:{port + 1}" if settings.get("state") else ""),
        images=options_of(settings),
        architecture=settings.get("architecture") or platform.machine(),
    )


def host_port(text: str) -> tuple[str, int]:
    """Where a server listens. Raises ValueError."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
