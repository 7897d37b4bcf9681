"""What must hold between the records of the state store at every moment, whoever was killed when."""

from collections import Counter

from compute.cluster.records import transaction
from compute.cluster.records.addresses import FLOATING, Ipam
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Interface, published_names
from compute.cluster.records.networks import Network
from compute.cluster.records.taken import Claims, Taken, disk_bytes
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.protocol import StateStore
from compute.wire.spec import InstanceState


def check(store: StateStore) -> None:
    """Raises AssertionError for a leak, a double allocation, a dangling reference, or a value changed in place."""
    known = tuple(transaction._known.items())
    changed = [k for k, (value, found) in known if type(found).decode(value, 0) != found]
    assert not changed
    read = Transaction(store)
    instances = {i.uuid: i for i in read.list(Instance) if i.state != InstanceState.DELETED}
    networks = {n.uuid: n for n in read.list(Network) if n.state != "deleted"}
    interfaces = read.list(Interface)
    pools = {p.name: p.pool for p in read.list(Ipam)}

    floating = pools.pop(FLOATING, None)
    assert pools.keys() == networks.keys()
    held = {(name, str(a), owner) for name, pool in pools.items() for a, owner in pool.held.items()}
    assert held == {(i.network_uuid, i.address, i.uuid) for i in interfaces}
    assert all(i.instance_uuid in instances for i in interfaces)
    assert not [mac for mac, n in Counter((i.network_uuid, i.mac) for i in interfaces).items() if n > 1]
    for pool in pools.values():
        assert not pool.held.keys() & {pool.netblock[0], pool.netblock[-1], pool.gateway}
        assert all(address in pool.netblock for address in pool.held)

    floats = [i.floating for i in interfaces if i.floating]
    floats += [n.router_floating for n in networks.values() if n.router_floating]
    floats += [address for n in networks.values() for address in n.routed]
    assert len(floats) == len(set(floats))
    assert set(floats) == ({str(a) for a in floating.held} if floating else set())

    names = {
        t.name: t.owner
        for t in read.list(Taken)
        if t.name.split("/")[0] in ("instance", "network", "vni", "published")
    }
    wanted = {f"instance/{i.namespace}/{i.name}": i.uuid for i in instances.values()}
    wanted |= {f"network/{n.namespace}/{n.name}": n.uuid for n in networks.values()}
    wanted |= {f"vni/{n.vni}": n.uuid for n in networks.values()}
    wanted |= {name: i.uuid for i in interfaces for name in published_names(i.published)}
    assert names == wanted

    for claims in read.list(Claims):
        here = [i for i in instances.values() if i.node == claims.name]
        assert claims.cpus == sum(i.cpus for i in here)
        assert claims.memory_mib == sum(i.memory_mib for i in here)
        assert claims.disk_bytes in (None, sum(disk_bytes(i.disks) for i in here))
