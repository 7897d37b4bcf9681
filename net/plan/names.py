"""Names and addresses of kernel objects: made from the installation's id and the VNI or the port, never stored.

An interface name has at most 15 characters (IFNAMSIZ). Names that stand in the host's own namespace hold the whole
32-bit id and the whole 24-bit VNI in base 36, so that two installations on one host cannot collide.
"""

import functools
import hashlib
from collections.abc import Iterable

VXLAN_PORT = 4789
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base36(number: int, width: int) -> str:
    digits = ""
    for _ in range(width):
        number, rest = divmod(number, 36)
        digits = _DIGITS[rest] + digits
    return digits


def table(installation: str) -> str:
    """Our nft tables; each link alias of ours begins with it and a blank."""
    return f"sf-{installation}"


def namespace(installation: str, vni: int) -> str:
    """The network namespace under /run/netns."""
    return f"{namespace_prefix(installation)}{vni:06x}"


def namespace_prefix(installation: str) -> str:
    return f"sf-{installation}-"


BRIDGE_PREFIX = "br-"


def bridge(vni: int) -> str:
    return f"{BRIDGE_PREFIX}{vni:06x}"


def vxlan(vni: int) -> str:
    return f"vx-{vni:06x}"


def uplink(vni: int) -> str:
    """The namespace's end of the veth pair to the host."""
    return f"up-{vni:06x}"


def host_uplink_prefix(installation: str) -> str:
    """What the host's ends of all uplinks of an installation start with: an nft rule matches it with a `*`."""
    return "sfu" + _base36(int(installation, 16), 7)


def host_uplink(installation: str, vni: int) -> str:
    """The host's end of the veth pair: exactly 15 characters."""
    return host_uplink_prefix(installation) + _base36(vni, 5)


TAP_PREFIX = "sft"


@functools.lru_cache(maxsize=1 << 14)
def tap(installation: str, port_uuid: str) -> str:
    """A port's tap device: 15 characters, 62 bits of a hash."""
    digest = hashlib.blake2b(f"{installation}/{port_uuid}".encode(), digest_size=8).digest()
    return TAP_PREFIX + _base36(int.from_bytes(digest, "big"), 12)


def _mac(text: str) -> str:
    """A locally administered unicast MAC, always the same for the same text."""
    digest = hashlib.blake2b(text.encode(), digest_size=5).digest()
    return "02:" + digest.hex(":")


def router_mac(installation: str, vni: int) -> str:
    """The gateway's MAC, the same on whichever node routes: guests need not learn a new one when it moves."""
    return _mac(f"router/{installation}/{vni}")


def bridge_mac(installation: str, vni: int, node: str) -> str:
    """The MAC of the bridge on a node that does not route."""
    return _mac(f"bridge/{installation}/{vni}/{node}")


def own_macs(installation: str, vni: int, nodes: Iterable[str]) -> frozenset[str]:
    """Those of a network itself, which no port may have: who has the gateway's gets what is meant for the router."""
    bridges = (bridge_mac(installation, vni, node) for node in nodes)
    return frozenset((router_mac(installation, vni), *bridges))


def port_mac(seed: str) -> str:
    """A guest's MAC from a seed (a port's uuid) where the user gave none."""
    return _mac(f"port/{seed}")
