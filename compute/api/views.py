"""Records as the interface shows them. Field names are the interface's, not ours."""

import base64
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from compute.cluster.images.artifacts import GIB, Artifact, Blob, identity
from compute.cluster.quarantine import Quarantined
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Interface
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.rules import Rules
from compute.cluster.records.snapshots import Snapshot
from compute.cluster.records.transaction import Event, Stored
from compute.wire.codec import to_plain
from compute.wire.spec import AGENT_CHANNEL, InstanceState
from net import ipam

Json = dict[str, Any]


def _common(item: Stored, same: str = "", known: str = "", /, **fields: Any) -> Json:
    """`same`: fields that are called as the record's and are as there; `known`: those that are null where empty."""
    about: Json = {"uuid": item.id, "version": item.SCHEMA, "metadata": getattr(item, "metadata", {})}
    about["state"] = str(getattr(item, "state", "created"))
    about |= {name: getattr(item, name) for name in same.split()}
    return about | {name: getattr(item, name) or None for name in known.split()} | fields


def namespace(item: Namespace) -> Json:
    about = {n: {"expires": k.expires_s or None, "read_only": k.read_only} for n, k in item.keys.items()}
    keys = {"keys": sorted(item.keys), "about_keys": about}
    return _common(item, "name", **keys, trust={"full": sorted(item.trust)})


def snapshot(item: Snapshot) -> Json:
    order = item.order
    names = {device: f"my/{item.image(device)}:{item.tag}" for device in sorted(order.digests)}
    said = {"frozen": order.frozen, "note": order.note, "error_message": order.error}
    said |= {"name": f"my/{item.image('vda')}:{item.tag}", "created": order.moment_s, "images": names}
    return _common(item, "instance_uuid backup namespace to", digests=order.digests, **order.costs, **said)


def interface(item: Interface) -> Json:
    return _common(
        item,
        "network_uuid instance_uuid namespace order model",
        "floating",
        macaddr=item.mac,
        ipv4=None if IPv4Address(item.address) in ipam.UNKNOWN else item.address,
        ipv6=item.address6 or None,
        published=[str(each) for each in item.published],
        rules=list(item.rules),
        limits=to_plain(item.limits),
    )


def rules(item: Rules) -> Json:
    return _common(item, "name namespace", allow=[str(each) for each in item.allow])


def network(item: Network) -> Json:
    netblock = IPv4Network(item.netblock)
    four = netblock not in (ipam.ANY, ipam.UNKNOWN)
    return _common(
        item,
        "name namespace isolated slaac provide_dhcp provide_nat provide_dns router_node routed",
        "netblock6 bridge",
        netblock=item.netblock if four else None,
        gateway=(item.gateway or str(netblock[1])) if four else None,
        floating_gateway=item.router_floating or None,
        vxlan_id=item.vni,
        dns=item.dns_entries,
        created=item.created_s,
    )


def instance(item: Instance, interfaces: Iterable[Interface], read_only: bool = False) -> Json:
    """read_only: for somebody who may not type on its screen."""
    return _common(
        item,
        "name namespace cpus video node power_state uefi secure_boot tpm configdrive agent_state accel autostart order"
        " delay_s ephemeral on_node_loss left arriving node_labels",
        "moving vdi_port ssh_key nvram_template cpu_model error_message progress",
        memory=item.memory_mib,
        disk_spec=list(item.disk_spec),
        disks=[
            {
                "device": disk.device,
                "bus": disk.bus,
                "base": disk.image_name or None,
                "digest": disk.image or None,
                "size": -(-disk.size_bytes // GIB),
                "size_bytes": disk.size_bytes,
                "blob_uuid": identity(disk.image) if disk.image else None,
            }
            for disk in item.disks
        ],
        power=item.power.value,
        **dict.fromkeys(("console_port", "vdi_tls_port")),  # nothing listens there
        vdi_password=None if read_only else item.extra.get("vdi_password"),
        user_data=base64.b64encode(item.user_data).decode() or None,
        side_channels=[*item.side_channels, *(["sf-agent2"] if AGENT_CHANNEL in item.side_channels else [])],
        agent_system_boot_time=None,
        until=item.until_s or None,
        held_until=item.held_s or None,
        image_bytes=item.extra.get("image_bytes"),
        created=item.created_s,
        updated=item.updated_s,
        interfaces=[interface(i) for i in sorted(interfaces, key=lambda i: i.order)],
    )


def node(item: Node, *, alive: bool, server: bool, awaited: str) -> Json:
    """`awaited`: why nothing begins before this node has said what runs there; "" if it has."""
    state = item.state if item.state == "deleted" else "created" if alive else "missing"
    facts = {"release": "", "cpus": 0, "architecture": "", "accel": ""} | item.facts
    return _common(item, "uuid name given") | {
        "state": "drained" if item.drained and alive else state,
        "ip": item.facts.get("address", ""),
        "lastseen": time.time() if alive else item.lastseen_s,
        "memory": item.facts.get("memory_mib", 0),
        **{name: facts[name] for name in ("release", "cpus", "architecture", "accel")},
        "awaited": awaited or None,
        "fenced": bool(item.fence),
        "is_hypervisor": True,
        "is_network_node": True,
        "is_database_node": server,
        "is_cluster_maintainer": server,
    }


def orphan(item: Quarantined) -> Json:
    spec = item.orphan.spec
    return {
        "uuid": item.uuid,
        "node": item.node,
        "name": spec.name if spec else "",
        "namespace": spec.namespace if spec else "",
        "addresses": [interface.address for interface in spec.interfaces] if spec else [],
        "power_state": item.orphan.power,
        "since": item.since_s,
        "state": "delete-wait" if item.delete else "orphan",
        "error_message": item.orphan.trouble,
    }


def event(item: Event) -> Json:
    return {
        "timestamp": item.timestamp_s,
        "type": item.type,
        "fqdn": item.node,
        "duration": item.duration_s,
        "message": item.message,
        "by": item.by[0] or None,
        "from": item.by[1] or None,
        "extra": item.extra,
    }


def _blob(item: Blob, number: str, instances: Iterable[Instance], nodes: Iterable[Node]) -> Json:
    there = [i for i in instances if i.state != InstanceState.DELETED and item.disk]
    users = [i.uuid for i in there if any(disk.image == item.disk for disk in i.disks)]
    held = [node.name for node in nodes if item.disk in node.facts.get("images", ())]
    said: Json = {"uuid": item.uuid, "index": int(number), "metadata": {}, "version": 1, "transcodes": {}}
    said |= {"state": "initial" if item.upload else "created", "digest": item.data or item.disk}
    said |= {"size": item.size_bytes or item.disk_bytes, "virtual size": item.disk_bytes, **item.sums}
    said |= {"reference_count": 1 + len(users), "instances": users, "locations": held, "depends_on": None}
    return said | {"modified": item.made_s, "fetched_at": item.made_s, "last_used": None}


def artifact(item: Artifact, metadata: Json, instances: Iterable[Instance], nodes: Iterable[Node]) -> Json:
    """`instances`: those that the caller sees."""
    blobs = {number: _blob(blob, number, instances, nodes) for number, blob in item.blobs.items()}
    newest = max(map(int, blobs), default=0)
    said: Json = {"store": item.store_url or None, "index": newest, "blobs": blobs, "metadata": metadata}
    said |= {"blob_uuid": blobs[str(newest)]["uuid"] if blobs else None}
    same = "name artifact_type source_url namespace shared max_versions"
    return _common(item, same, "progress error_message", **said)
