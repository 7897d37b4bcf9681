"""What a node has of ours and the desired state does not know: found, kept running, shown; never removed unasked."""

import contextlib
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from compute.agent.guest.guest import Guest
from compute.agent.guest.host import Host
from compute.errors import ComputeError
from compute.wire.spec import Inventory, NodeDesired, Remembered
from net import NodeNetworks

log = logging.getLogger(__name__)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def find(host: Host, machine: str, owned: Collection[str]) -> tuple[set[str], bool]:
    """Uuids of the guests, running or not, that are on this node and not owned; False while libvirt does not say."""
    directories = [path for path in host.directory.iterdir() if _UUID.fullmatch(path.name)]
    strange = [path for path in directories if path.name not in owned]
    for path in strange:
        with contextlib.suppress(OSError):  # it holds something
            path.rmdir()
    found = {path.name for path in strange if path.exists()}
    try:
        await host.do(host.hypervisor.connect)
        return found | set(await host.do(host.hypervisor.others, owned, machine, host.directory)), True
    except ComputeError as err:
        log.warning("%s", err)
        return found, False


def inventory(memory: Remembered, desired: NodeDesired, guests: Iterable[Guest]) -> Inventory | None:
    """What the server is to be told; None while a guest that it does not know was not looked at yet."""
    wanted = {spec.uuid for spec in desired.instances}
    seen = [guest.orphan for guest in guests if not guest.known and guest.spec.uuid not in wanted]
    orphans = tuple(orphan for orphan in seen if orphan is not None)
    if len(orphans) < len(seen):
        return None
    return Inventory(memory.machine, memory.epoch, memory.reached, orphans, desired.fence)


def keep(desired: NodeNetworks, guests: Iterable[Guest]) -> NodeNetworks:
    """The desired networks, and with them those that guests nobody knows are on.

    Where somebody has such a guest's address or MAC by now, its port is left out: then its link is down.
    """
    networks = {network.uuid: network for network in desired.networks}
    vnis = {network.vni: network.uuid for network in desired.networks}
    peers = {peer.node for peer in desired.peers}
    for guest in guests:
        troubles = []
        for tap in guest.taps:
            known = networks.get(tap.network_uuid) or tap.network
            if known is None:  # a record of 0.1 does not say; the data plane leaves the tap's namespace alone
                continue
            mine = tap.port.uuid, desired.node  # where the guest was given away, its port is another node's
            others = [port for port in known.ports if (port.uuid, port.node) != mine]
            if vnis.setdefault(known.vni, known.uuid) != known.uuid:
                troubles.append(f"its network's VNI {known.vni} is another network's")
            elif any(tap.port.address == p.address or tap.port.mac == p.mac for p in others):
                troubles.append(f"{tap.port.address} is another's on network {known.name}: its link is down")
            else:
                if known.uuid not in networks and known.router_node not in peers:
                    known = replace(known, router_node=desired.node)  # whatever this node was called then
                ports = (*others, replace(tap.port, node=desired.node))
                networks[known.uuid] = replace(known, ports=ports)
        guest.notice("; ".join(troubles))
    return replace(desired, networks=tuple(networks.values()))
