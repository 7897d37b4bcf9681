"""What a server wants of a node and what the node says back: plain values, the seam between API and agent.

The server decides (`NodeDesired`), the agent acts and reports (`InstanceStatus`, `NodeEvent`). On one machine the two
talk through a call, between machines over HTTPS as JSON; the agent cannot tell the difference.
"""

import base64
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from compute.errors import Denied
from compute.wire.codec import Base64
from net import Network, NodeNetworks

_JOIN = "sfj1"
AGENT_CHANNEL = "org.qemu.guest_agent.0"  # the virtio port that qemu-guest-agent in a guest answers on


class InstanceState(StrEnum):
    """initial → preflight → creating → created → delete-wait → deleted; failures pass <state>-error to error."""

    INITIAL = "initial"
    PREFLIGHT = "preflight"
    CREATING = "creating"
    CREATED = "created"
    DELETE_WAIT = "delete-wait"
    DELETED = "deleted"
    INITIAL_ERROR = "initial-error"
    PREFLIGHT_ERROR = "preflight-error"
    CREATING_ERROR = "creating-error"
    CREATED_ERROR = "created-error"
    DELETE_WAIT_ERROR = "delete-wait-error"
    ERROR = "error"


class Power(StrEnum):
    """What the user wants."""

    ON = "on"
    OFF = "off"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk of a guest."""

    device: str  # vda, vdb, …
    image: str = ""  # full digest of the image's manifest (b3:…), or "" for a blank disk
    image_name: str = ""  # what the user typed, for people
    size_bytes: int = 0  # virtual size; 0 means as large as the image
    bus: str = "virtio"
    store: str = ""  # the namespace whose own store has the image; "" for the server's stores
    cdrom: bool = False  # the guest only reads it, and snapshots leave it out

    @property
    def pending(self) -> bool:
        """Whether its image is still to be brought here; no node sees it before."""
        return bool(self.image_name and not self.image)


@dataclass(frozen=True, slots=True)
class InterfaceSpec:
    """One NIC of a guest; the network itself is in NodeDesired.networks."""

    uuid: str
    network_uuid: str
    mac: str
    address: str
    model: str = "virtio"
    tap: str = ""


@dataclass(frozen=True, slots=True)
class Capture:
    """A moment of a guest's disks, to be stored in the namespace's own store without a name; then how that ended.

    digests: device → what it is stored as. costs: bytes held in clusters of its own, read, new, known, written.
    at_rest: it waits until the guest is off, and the node says that it did.
    warm: the name of a warm state, whose `memory` is stored as well. That is the guest's end.
    """

    uuid: str
    labels: dict[str, str] = field(default_factory=dict)
    moment_s: float = 0
    frozen: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    error: str = ""
    note: str = ""
    at_rest: bool = False
    warm: str = ""


@dataclass(frozen=True, slots=True)
class Warm:
    """A guest of an image that had just come up, at one moment, in its namespace's own store: digests of manifests."""

    disk: str
    memory: str
    fit: str
    """What it resumes on, as its node said: another is another machine, version, or kind of guest."""


@dataclass(frozen=True)
class Shape:
    """What its record and its node know of a guest in the same words; each of the two has its own slots for it."""

    __slots__ = ()
    uuid: str
    name: str
    namespace: str
    cpus: int
    memory_mib: int
    disks: tuple[DiskSpec, ...]
    _: KW_ONLY
    user_data: Base64 = b""
    uefi: bool = False
    secure_boot: bool = False
    """By UEFI firmware that knows Microsoft's keys, and starts nothing that these did not sign."""
    tpm: bool = False
    cpu_model: str = ""  # by libvirt's name; "" is what the node gives
    power: Power = Power.ON
    grace_s: int = 0  # how long it is asked to end before its power is taken, if it is to be off
    reboot_soft: int = 0  # counters: the agent reboots when they grew since it last looked
    reboot_hard: int = 0
    arriving: bool = False
    """It was given to its node, which has not said yet that it has made the disks: what fails is tried again."""
    leased_s: float = 0
    """Another node may be given it once this one is silent: it runs only under a lease. When that was chosen; 0: no."""
    order: int = 0
    """When its machine starts, those of its namespace with a lower order start first; when it ends, they end last."""
    delay_s: int = 0  # so much later than it do those of a higher order start
    warm: Warm | None = None  # what it may begin as, instead of a boot of its image


@dataclass(frozen=True, slots=True)
class InstanceSpec(Shape):
    """Everything a node needs to run one guest."""

    interfaces: tuple[InterfaceSpec, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    config_drive: bool = True
    agent: bool = True  # whether the guest has AGENT_CHANNEL
    vdi: str = ""  # "" (serial console only), "vnc" or "spice"
    video: str = ""  # the graphics card, by qemu's name; "" is virtio where there is a `vdi`, else none
    video_kib: int = 0  # its memory; 0 is what qemu gives it
    delete: bool = False
    made: bool = False  # its disks were made once: where they are not, they are never made anew
    snapshots: tuple[Capture, ...] = ()
    """To be taken, the first first; the node says how they ended for as long as they stand here."""
    failed: bool = False
    """The record is in state error: keep what is there for the user to look at, build and start nothing."""
    leaving: str = ""
    """The live move by which it goes to another node: until this is not here any more, that may have it."""
    coming: str = ""
    """It is another node's, and takes its memory by this live move: it runs only once this is not here any more."""


@dataclass(frozen=True, slots=True)
class ImageSite:
    """With whom a node's image service shares what it holds (`peers`); without peers it does not listen."""

    me: str = ""
    listen: str = ""  # host:port
    peers: dict[str, str] = field(default_factory=dict)
    """Node → host:port, of those that live and have the same stores."""
    secret: Base64 = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class NodeDesired:
    """The whole of what one node must be. Another content has another `revision`, which is 0 for none yet."""

    revision: int
    networks: NodeNetworks
    instances: tuple[InstanceSpec, ...] = ()
    image_site: ImageSite = ImageSite()
    stores: dict[str, str] = field(default_factory=dict, repr=False)
    """The server's stores: its name there → URL; "" where the server gives it over the node's own connection.

    `my/NAMESPACE` is that namespace's own store, for the nodes that have guests of it or with images out of it.
    """
    store_token: str = field(default="", repr=False)  # with which it does
    epoch: str = ""
    """Which history of the state this is part of, and how far that is: a node remembers both, and says them."""
    former: tuple[str, ...] = ()  # histories that this one follows
    reached: int = 0
    servers: tuple[str, ...] = ()  # where agents reach each of the servers; () where there is one only
    given: tuple[str, ...] = ()  # guests of this node that others were given: what is here of them is off
    fence: str = ""  # random: until the node has said, with it, that they are off, it is nobody's peer
    hold: bool = False
    """The state is older than what some node saw: begin nothing, stop nothing, and say what is here."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A guest of ours, or the disks of one, that a node has and the desired state does not know. It is left alone."""

    uuid: str
    power: str  # as in InstanceStatus
    spec: InstanceSpec | None = None
    """What it was made from, out of its record or its domain; None if nobody can tell."""
    networks: tuple[Network, ...] = ()  # those that its interfaces are on, as they were then, without ports
    trouble: str = ""  # what is wrong: a damaged record, an address that somebody else has by now


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a node knows of itself, and how far it followed which history of the state."""

    machine: str  # the random id in its state directory: the node itself, whatever its name is
    epoch: str
    reached: int


@dataclass(frozen=True, slots=True)
class Inventory(Remembered):
    """What a node remembers and what it has that is not desired."""

    orphans: tuple[Orphan, ...] = ()
    fence: str = ""  # of the desired state that it followed


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What an agent saw of one guest."""

    uuid: str
    state: InstanceState
    power_state: str = "off"  # on, off, paused, crashed or transition-to-X
    error_message: str = ""
    accel: str = ""  # kvm or tcg, with the reason
    vdi_port: int = 0
    agent_state: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    snapshots: tuple[Capture, ...] = ()  # those that ended and are still ordered
    leased_s: float = 0  # as its node was told, and acts on from then on


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A line of an object's history."""

    object_type: str  # instance, network or node
    object_uuid: str
    timestamp_s: float
    type: str  # audit, mutate, status, resources or usage
    message: str
    duration_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CachedImage:
    """One in a node's cache, as its image service says it. `present_bytes` of `data_bytes` while it is incomplete."""

    digest: str
    size_bytes: int
    used_bytes: int
    complete: bool
    pinned: bool
    used_s: float
    readers: tuple[str, ...]
    present_bytes: int = 0
    data_bytes: int = 0


_Text = Annotated[str, Field(max_length=1000)]
_Digest = Annotated[str, Field(pattern="^b3:[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What an agent says of its machine when it registers, within what a machine can be."""

    cpus: Annotated[int, Field(ge=1, le=2**14)]
    memory_mib: Annotated[int, Field(ge=1, le=2**30)]
    address: str = "127.0.0.1"  # its VXLAN endpoint
    architecture: _Text = "x86_64"
    release: _Text = ""  # version of the program
    accel: _Text = ""
    mtu_bytes: Annotated[int, Field(ge=1200, le=2**16)] = 1450
    """What fits into VXLAN on its underlay: the underlay's MTU less 50."""
    images: Annotated[tuple[_Digest, ...], Field(max_length=5000)] = ()
    """Digests of the images that its cache holds completely."""
    peer_address: str = ""  # host:port where its image service can serve other nodes; "" if it is not to
    stores: Annotated[tuple[_Text, ...], Field(max_length=5000)] | None = None
    """Identities of the image stores that it reads (sorted): only nodes with the same share. None: it will tell."""
    boot: _Text = ""  # another after each start of the machine; "" of a version that does not say
    disk_bytes: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the file system that has guests' disks; 0 of a version that does not say."""
    live: bool = False  # it knows live moves; an older one would start what comes


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What `sf node token` prints and `sf agent --join` takes: `sfj1.FINGERPRINT.SECRET`, each in base64url.

    The first is the SHA-256 of the server's certificate: the new node meets the right server before it says anything.
    """

    fingerprint: bytes
    secret: str

    def __str__(self) -> str:
        return f"{_JOIN}.{base64.urlsafe_b64encode(self.fingerprint).decode()}.{self.secret}"

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        """Raises Denied."""
        try:
            prefix, fingerprint, secret = text.strip().split(".")
            pinned = base64.urlsafe_b64decode(fingerprint)
            if prefix != _JOIN or len(pinned) != 32 or not secret:
                raise ValueError(prefix)
        except ValueError as err:
            raise Denied("that is no join token", hint="sf node token, on the server, prints one") from err
        return cls(pinned, secret)
