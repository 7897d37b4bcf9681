"""What `sf serve` and `sf agent` are told: the settings as values."""

import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from imagestore import Fill, Options, Settings, duration_s, options_of


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that one server is configured by."""

    state_dir: Path = Path("/var/lib/sf")
    state: str = ""
    """etcd://… that keeps the records; "" for a file in `state_dir`."""
    state_access: tuple[str, ...] = field(default=("",) * 4, repr=False)
    """For etcd: files of TLS (authority, certificate, key), then NAME:PASSWORD."""
    guests: bool = True
    """Whether the server's machine is a node, too."""
    instance_dir: Path | None = None
    """Guests' disks; None: instances/ under `state_dir`."""
    stores: tuple[tuple[str, str], ...] = ()
    """(name, URL) of the image stores that names are looked up in, in order; () is the one under `state_dir`."""
    stores_again: Callable[[], Mapping[str, str]] = field(default=dict, compare=False)
    """The same as the settings have them by now: remotes come and go while a server runs."""
    host: str = "127.0.0.1"
    port: int = 13000
    tls: bool = False
    """Whether the API speaks TLS, by the installation's authority unless `tls_cert` names own files."""
    tls_cert: str = ""
    tls_key: str = ""
    node_name: str = "localhost"
    libvirt_uri: str = "qemu:///system"
    mesh_address: IPv4Address = IPv4Address("127.0.0.1")
    """This node's VXLAN endpoint."""
    agent_listen: str = ""
    """host:port of the TLS endpoint for agents; "" for none. With an etcd, the server's own uses it, too."""
    floating_pool: IPv4Network | None = None
    uplink: str = ""
    """The host's interface towards the floating pool."""
    resolvers: tuple[IPv4Address, ...] = ()
    """Upstream DNS servers of virtual networks; () is the host's own, without loopback."""
    excluded: tuple[IPv4Network, ...] = ()
    """Ranges that no virtual network may overlap."""
    fill: str = "now"
    """When the rest of an image that a guest already runs from is fetched: now, idle or never."""
    images: Options = field(default_factory=Options)
    """How the node's image service fetches and keeps images."""
    read_timeout_s: float = 120.0
    """A guest's read that no store can serve for so long ends in an I/O error."""
    peer_port: int = 13002
    """Where, on the mesh address, the image service serves nodes with the same stores; 0 for not at all."""
    cpu_ratio: float = 16.0
    memory_reserve_mib: int = 512
    architecture: str = "x86_64"
    state_backup: str = ""
    """URL of the store that the state is backed up into, every so often; so many stay."""
    state_backup_every_s: float = 86400.0
    state_backup_keep: int = 14
    sync_names: bool = False
    """Whether anybody may have images fetched that a source list names; those in `sources`, "" for the usual ones."""
    sources: str = ""
    novnc: Path = Path("/usr/share/novnc")
    """Where Debian's package has noVNC; what npm packs as @novnc/novnc is as good."""


def load(settings: Settings) -> Config:
    """What the settings say of a server or an agent. Raises Invalid, naming the setting."""
    read = settings.parsed
    host, port = read("listen", _host_port, "127.0.0.1:13000")
    return Config(
        state_dir=settings.state_dir,
        state=settings.get("state"),
        guests=read("guests", lambda text: bool(("no", "yes").index(text)), "yes"),
        state_access=tuple(settings.get(f"state_{name}") for name in ("ca", "cert", "key", "user")),
        instance_dir=settings.instance_dir,
        stores=tuple(settings.stores.items()),
        stores_again=lambda: Settings(settings.flags, settings.environment).stores,
        host=host or "127.0.0.1",
        port=port,
        tls=settings.tls,
        tls_cert=settings.get("tls_cert"),
        tls_key=settings.get("tls_key"),
        node_name=settings.get("node_name") or socket.gethostname().split(".")[0] or "localhost",
        libvirt_uri=settings.get("libvirt_uri", "qemu:///system"),
        mesh_address=read("mesh_address", IPv4Address, "127.0.0.1"),
        agent_listen=settings.get("agent_listen") or (f"{host}:{port + 1}" if settings.get("state") else ""),
        floating_pool=read("floating_pool", lambda text: IPv4Network(text) if text else None),
        uplink=settings.get("uplink"),
        resolvers=read("resolvers", lambda text: tuple(map(IPv4Address, text.split()))),
        excluded=read("excluded_networks", lambda text: tuple(map(IPv4Network, text.split()))),
        fill=str(read("fill", Fill, "now")),
        images=options_of(settings),
        read_timeout_s=read("read_timeout", duration_s, "120"),
        peer_port=read("peer_port", int, "13002"),
        cpu_ratio=read("cpu_ratio", float, "16"),
        memory_reserve_mib=read("memory_reserve_mib", int, "512"),
        architecture=settings.get("architecture") or platform.machine(),
        state_backup=read("state_backup", _store_url),
        state_backup_every_s=read("state_backup_every", duration_s, "1d"),
        state_backup_keep=read("state_backup_keep", lambda text: max(1, int(text)), "14"),
        sync_names=read("sync_names", lambda text: bool(("no", "yes").index(text)), "no"),
        sources=settings.get("sources"),
        novnc=Path(settings.get("novnc", "/usr/share/novnc")),
    )


def _store_url(text: str) -> str:
    return text if "://" in text or not text else Path(text).absolute().as_uri()


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
