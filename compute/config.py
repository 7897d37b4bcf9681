"""What `sf serve` is told: environment (`SF_*`), then the file, then defaults. Flags are the CLI's and come first."""

import os
import platform
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from compute.errors import Invalid
from imagestore import Fill

_FILES = (Path("/etc/sf/config.toml"), Path("~/.config/sf/config.toml"))


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that one server is configured by."""

    state_dir: Path = Path("/var/lib/sf")
    stores: tuple[tuple[str, str], ...] = ()
    """(name, URL) of the image stores that names are looked up in, in order; () is the one under `state_dir`."""
    host: str = "127.0.0.1"
    port: int = 13000
    node_name: str = "localhost"
    libvirt_uri: str = "qemu:///system"
    mesh_address: IPv4Address = IPv4Address("127.0.0.1")
    """This node's VXLAN endpoint."""
    agent_listen: str = ""
    """host:port of the TLS endpoint for agents on other machines; "" for none."""
    floating_pool: IPv4Network | None = None
    uplink: str = ""
    """The host's interface towards the floating pool."""
    resolvers: tuple[IPv4Address, ...] = ()
    """Upstream DNS servers of virtual networks; () is the host's own, without loopback."""
    excluded: tuple[IPv4Network, ...] = ()
    """Ranges that no virtual network may overlap."""
    fill: str = "now"
    """When the rest of an image that a guest already runs from is fetched: now, idle or never."""
    fill_rate: str = "0"
    """Bytes a second for that, such as 20M; 0 for no limit."""
    read_timeout_s: float = 120.0
    """A guest's read that no store can serve for so long ends in an I/O error."""
    cache_size: str = "0"
    """Above this unused images leave the node's cache, least recently used first; 0 for no limit."""
    peer_port: int = 13002
    """Where, on the mesh address, the image service serves nodes with the same stores; 0 for not at all."""
    cpu_ratio: float = 16.0
    memory_reserve_mib: int = 512
    architecture: str = "x86_64"


def load(environment: Mapping[str, str] | None = None, **flags: str | None) -> Config:
    """Flags win over SF_* variables, these over the files. Raises Invalid, naming the setting."""
    env = os.environ if environment is None else environment
    settings: dict[str, str] = {}
    remotes: dict[str, str] = {}
    for path in (_FILES[0], Path(env.get("SF_CONFIG") or _FILES[1]).expanduser()):
        if path.is_file():
            try:
                found = tomllib.loads(path.read_text())
                remotes |= {name: str(values["url"]) for name, values in found.get("remotes", {}).items()}
            except (tomllib.TOMLDecodeError, OSError, KeyError, AttributeError, TypeError) as err:
                raise Invalid(f"cannot read {path}: {err}") from err
            settings |= {k: _text(v) for k, v in found.items() if not isinstance(v, dict)}
    settings |= {name[3:].lower(): value for name, value in env.items() if name.startswith("SF_") and value}
    settings |= {name: value for name, value in flags.items() if value}
    listen = settings.get("listen", "127.0.0.1:13000")
    host, _, port = listen.rpartition(":")
    try:
        state_dir = Path(settings.get("state_dir", "/var/lib/sf")).expanduser().absolute()
        local = settings.get("store", "").split(" ")[0] or (state_dir / "store").as_uri()
        return Config(
            state_dir=state_dir,
            stores=(("local", local), *remotes.items()),
            host=host.strip("[]") or "127.0.0.1",
            port=int(port),
            node_name=settings.get("node_name") or socket.gethostname().split(".")[0] or "localhost",
            libvirt_uri=settings.get("libvirt_uri", "qemu:///system"),
            mesh_address=IPv4Address(settings.get("mesh_address", "127.0.0.1")),
            agent_listen=settings.get("agent_listen", ""),
            floating_pool=IPv4Network(settings["floating_pool"]) if settings.get("floating_pool") else None,
            uplink=settings.get("uplink", ""),
            resolvers=tuple(IPv4Address(text) for text in settings.get("resolvers", "").split()),
            excluded=tuple(IPv4Network(text) for text in settings.get("excluded_networks", "").split()),
            fill=str(Fill(settings.get("fill", "now"))),
            fill_rate=settings.get("fill_rate", "0"),
            read_timeout_s=float(settings.get("read_timeout", "120")),
            cache_size=settings.get("cache_size", "0"),
            peer_port=int(settings.get("peer_port", "13002")),
            cpu_ratio=float(settings.get("cpu_ratio", "16")),
            memory_reserve_mib=int(settings.get("memory_reserve_mib", "512")),
            architecture=settings.get("architecture") or platform.machine(),
        )
    except ValueError as err:
        raise Invalid(
            f"configuration: {err}", hint="a flag, a variable SF_*, or a line of /etc/sf/config.toml"
        ) from err


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
