"""What the cluster remembers: typed objects, and the typed transaction over the state store.

An instance's states are in `states`. Networks, interfaces, namespaces and nodes know `created`, `deleted` and, for
nodes, `missing` and `drained`.
"""

import json
import time
import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

from compute.cluster.state.protocol import ABSENT, Record, StateStore, retry_stale
from compute.errors import Conflict, Invalid, NotFound
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import DiskSpec, InstanceState, Power

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object with a place in the state store. `revision` is that of its record, never part of it."""

    KIND: ClassVar[str] = ""
    SCHEMA: ClassVar[int] = 1
    UPGRADES: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    """schema n → function that turns a record of schema n into one of schema n + 1."""
    revision: int = field(default=ABSENT, compare=False, metadata={"stored": False})

    @property
    def id(self) -> str:
        return str(getattr(self, "uuid", "") or getattr(self, "name", ""))

    @property
    def key(self) -> str:
        return f"{self.KIND}/{self.id}"

    def encode(self) -> bytes:
        plain = {"schema": self.SCHEMA, **to_plain(self)}
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, value: bytes, revision: int) -> Self:
        """Raises Invalid for a record of a newer program."""
        plain = json.loads(value)
        for schema in range(plain.get("schema", 1), cls.SCHEMA):
            plain = cls.UPGRADES[schema](plain)
        if plain.get("schema", 1) > cls.SCHEMA:
            raise Invalid(f"a {cls.KIND} was written by a newer version of sf", hint="upgrade this node")
        return replace(from_plain(cls, plain), revision=revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHash:
    """How a namespace's key is recognised; the nonce goes into tokens, so that a changed key ends them."""

    hash: str
    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace(Stored):
    KIND: ClassVar[str] = "namespace"
    name: str
    keys: dict[str, KeyHash] = field(default_factory=dict)
    trust: tuple[str, ...] = ()
    """Namespaces whose callers may see and change this one's objects."""
    state: str = "created"
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Stored):
    KIND: ClassVar[str] = "network"
    uuid: str
    name: str
    namespace: str
    netblock: str
    vni: int
    provide_dhcp: bool = True
    provide_nat: bool = True
    provide_dns: bool = True
    router_node: str = ""
    router_floating: str = ""
    routed: dict[str, str] = field(default_factory=dict)
    """Routed address → next hop inside the network."""
    dns_entries: dict[str, str] = field(default_factory=dict)
    state: str = "created"
    created_s: float = 0
    deleted_s: float = 0
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface(Stored):
    KIND: ClassVar[str] = "interface"
    uuid: str
    network_uuid: str
    instance_uuid: str
    namespace: str
    mac: str
    address: str
    order: int
    model: str = "virtio"
    floating: str = ""
    state: str = "created"
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance(Stored):
    KIND: ClassVar[str] = "instance"
    uuid: str
    name: str
    namespace: str
    node: str
    cpus: int
    memory_mib: int
    disks: tuple[DiskSpec, ...]
    disk_spec: tuple[dict[str, Any], ...] = ()
    """What the user asked for, word for word."""
    ssh_key: str = ""
    user_data: bytes = b""
    video: dict[str, Any] = field(default_factory=dict)
    uefi: bool = False
    secure_boot: bool = False
    nvram_template: str = ""
    configdrive: str = "openstack-disk"
    side_channels: tuple[str, ...] = ()
    state: InstanceState = InstanceState.INITIAL
    power: Power = Power.ON
    power_state: str = "off"
    reboot_soft: int = 0
    reboot_hard: int = 0
    error_message: str = ""
    progress: str = ""
    accel: str = ""
    console_port: int = 0
    vdi_port: int = 0
    agent_state: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    created_s: float = 0
    updated_s: float = 0
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Stored):
    """A machine. `facts` is what its agent said of it: cpus, memory_mib, address, architecture, release, accel."""

    KIND: ClassVar[str] = "node"
    uuid: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    state: str = "created"
    identity: str = ""
    """SHA-256 of the secret that its agent shows; "" for the server's own agent."""
    drained: bool = False
    lastseen_s: float = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims(Stored):
    """What a node's instances hold: one record per node, so that two placements cannot both take the last room."""

    KIND: ClassVar[str] = "claims"
    name: str
    cpus: dict[str, int] = field(default_factory=dict)
    """Instance UUID → vCPUs."""
    memory_mib: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken(Stored):
    """A unique thing and who has it: `instance/<namespace>/<name>`, `vni/<n>`, `floating/<address>`, a request key."""

    KIND: ClassVar[str] = "taken"
    name: str
    owner: str
    note: str = ""
    created_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(Stored):
    """What users add to an image name; the image itself lives in its store."""

    KIND: ClassVar[str] = "artifact"
    uuid: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Stored):
    KIND: ClassVar[str] = "event"
    LIMIT: ClassVar[int] = 256
    """Events kept per object; up to TRIM more may wait for the broom."""
    TRIM: ClassVar[int] = 32
    name: str
    """`<type>/<object's uuid>/<microseconds, 20 digits>-<random>`: key order is time order."""
    timestamp_s: float
    type: str
    message: str
    node: str = ""
    duration_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


O = TypeVar("O", bound=Stored)  # noqa: E741


class Transaction:
    """Reads remember revisions, writes are kept back; `transact` commits all of it at one revision or repeats it.

    `list` is not compared at commit: a decision must rest on records read by `get` or `find` (hence Taken and Claims).
    """

    def __init__(self, store: StateStore, node: str = "") -> None:
        self.store = store
        self.node = node
        """Who writes: the `fqdn` of its events."""
        self.expect: dict[str, int] = {}
        self.writes: dict[str, bytes | None] = {}
        self.reads: dict[str, Record | None] = {}

    def find(self, cls: type[O], identity: str) -> O | None:
        key = f"{cls.KIND}/{identity}"
        if key in self.writes:
            value = self.writes[key]
            return None if value is None else cls.decode(value, self.expect.get(key, ABSENT))
        # Read once: a second look would expect a newer revision than the one that was decided on.
        if key not in self.reads:
            record = self.reads[key] = self.store.get(key)
            self.expect[key] = record.revision if record else ABSENT
        record = self.reads[key]
        return cls.decode(record.value, record.revision) if record else None

    def get(self, cls: type[O], identity: str) -> O:
        """Raises NotFound."""
        found = self.find(cls, identity)
        if found is None:
            raise NotFound(f"{cls.KIND} {identity} not found")
        return found

    def list(self, cls: type[O], under: str = "") -> list[O]:
        return [cls.decode(r.value, r.revision) for r in self.store.list(f"{cls.KIND}/{under}")]

    def create(self, value: Stored) -> None:
        """Raises Conflict when it is there already."""
        if self.find(type(value), value.id) is not None:
            raise Conflict(f"{value.KIND} {value.id} exists already")
        self.writes[value.key] = value.encode()

    def update(self, value: Stored) -> None:
        """Write over what was read, here or before this transaction."""
        self.expect.setdefault(value.key, value.revision)
        self.writes[value.key] = value.encode()

    def delete(self, cls: type[Stored], identity: str) -> None:
        """Remove it; "there was none" is success."""
        self.writes[f"{cls.KIND}/{identity}"] = None

    def purge(self, value: Stored) -> None:
        """Remove it and its history."""
        self.writes[value.key] = None
        for record in self.store.list(f"{Event.KIND}/{value.key}/"):
            self.writes[record.key] = None

    def event(
        self,
        kind: str,
        owner: str,
        message: str,
        *,
        type: str = "mutate",
        timestamp_s: float | None = None,
        duration_s: float | None = None,
        **extra: Any,
    ) -> None:
        """Append to an object's history. Now and then the oldest go in the same commit."""
        now = time.time() if timestamp_s is None else timestamp_s
        place = f"{kind}/{owner}/"
        tail = uuid_module.uuid4()
        entry = Event(
            name=f"{place}{int(now * 1e6):020d}-{tail.hex[:6]}",
            timestamp_s=now,
            type=type,
            message=message,
            node=self.node,
            duration_s=duration_s,
            extra=extra,
        )
        self.writes[entry.key] = entry.encode()
        if tail.int % Event.TRIM == 0:
            for record in self.store.list(f"{Event.KIND}/{place}")[: -Event.LIMIT]:
                self.writes[record.key] = None

    def commit(self) -> None:
        """Raises Stale."""
        if self.writes:
            self.store.commit(self.writes, expect=self.expect)


def transact(store: StateStore, action: Callable[[Transaction], T], node: str = "") -> T:
    """Run `action` on a fresh Transaction and commit it, again and again while others were faster.

    `action` may run several times, so it does nothing but read, decide and write through the transaction.
    """

    def once() -> T:
        transaction = Transaction(store, node)
        result = action(transaction)
        transaction.commit()
        return result

    return retry_stale(once)


def new_uuid() -> str:
    return str(uuid_module.uuid4())
