"""What an instance's disks may be made of, and the stores' names as the API shows them."""

import logging
import re
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from urllib.parse import urlsplit

from compute.cluster.images.stores import MINE, NamespaceStores
from compute.cluster.records.transaction import Stored, Transaction, new_uuid
from compute.errors import Denied, Invalid, NoCapacity, NotFound, NotReady
from compute.wire.spec import DiskSpec
from imagestore import ImageCache, Resolved, Store, StoreError, digest_of, parse_reference
from imagestore import NotFound as NoImage
from imagestore.mirror import Source, sources

log = logging.getLogger(__name__)

GIB = 2**30

_ARTIFACTS = uuid_module.UUID("4b1f3f0e-6a3c-5f0b-9d4e-5f7a52f3c0de")
"""Namespace of the UUIDs that names and manifests get in the API (RFC 9562, version 5): the same on every server."""

_DEVICES = "abcdefghijklmnop"
WEB, BLOB = ("https://", "http://"), "sf://blob/"
_MOST, _MOST_WANTED = 1000, 3  # artifacts of one namespace; those that are on their way


def resolve_disks(
    sight: "Sight", wanted: Sequence[Mapping[str, Any]], architecture: str, lists: str, sync: bool
) -> tuple[DiskSpec, ...]:
    """A disk may wait for its image (`pending`). sync: one that only a source list (of `lists`) names may be fetched.

    Raises NotFound (with the nearest names), Denied, Invalid (a base nobody knows, a disk smaller than its image).
    """
    if len(wanted) > len(_DEVICES):
        raise Invalid(f"an instance has at most {len(_DEVICES)} disks")

    def named(spec: DiskSpec, base: str) -> DiskSpec:
        try:
            found = sight.resolve(base, architecture)
        except NoImage as err:
            if (source := listed(base, architecture, lists)) is None:
                raise
            if sync:
                return spec
            who = "--sync fetches it" if sight.everything else "the administrator can fetch it"
            hint = f"{who} from {urlsplit(source.url).hostname}"
            raise NotFound(f"{base} is in no store, but in a source list", hint=hint) from err
        return fitted(spec, Blob(found.namespace, str(found.digest), found.size_bytes))

    def resolve(disk: Mapping[str, Any], device: str) -> DiskSpec:
        size_bytes, base = int(disk.get("size") or 0) * GIB, str(disk.get("base") or "")
        if (kind := disk.get("type") or "disk") not in ("disk", "cdrom"):
            raise Invalid(f"disk {device}: type {str(kind)[:40]!r} is not offered", hint="disk or cdrom")
        bus = disk.get("bus") or ("virtio" if kind == "disk" else "sata")
        bus = "sata" if bus == "ide" else bus  # q35 has no IDE
        if not base and not size_bytes:
            raise Invalid(f"disk {device} has neither a base nor a size", hint="a blank one needs GB of size")
        spec = DiskSpec(device, "", base, size_bytes, bus, cdrom=kind == "cdrom")
        if base.startswith(WEB):
            check_url(sight, base)
        elif base.startswith(("sf://", "label:")):
            blob = blob_of(sight.artifacts(), base, sight.namespace)[1]
            return fitted(spec, blob) if blob.disk else replace(spec, image_name=BLOB + blob.uuid)
        elif re.match(r"[a-z]+://|file:", base):
            raise Invalid(f"disk {device}: cannot boot from {base[:120]!r}", hint="a name such as debian:12")
        return named(spec, base) if base and not base.startswith(WEB) else spec

    return tuple(resolve(disk, f"vd{letter}") for letter, disk in zip(_DEVICES, wanted, strict=False))


def fitted(spec: DiskSpec, blob: "Blob") -> DiskSpec:
    """The disk with its image. Raises Invalid when it is smaller than that."""
    if spec.size_bytes and spec.size_bytes < blob.disk_bytes:
        raise Invalid(
            f"disk {spec.device} of {spec.size_bytes // GIB} GB is smaller than its image {spec.image_name} "
            f"({blob.disk_bytes / GIB:.2f} GB)",
            hint=f"give it {-(-blob.disk_bytes // GIB)} GB or more, or no size",
        )
    size_bytes = spec.size_bytes or blob.disk_bytes
    return replace(spec, image=blob.disk, size_bytes=size_bytes, store=blob.namespace)


def check_url(sight: "Sight", url: str) -> None:
    """Raises Invalid; Denied: what is fetched for the system namespace may be private, so it asks for that itself."""
    sources.of_url(url, "x", "x", "x86_64")
    if sight.namespace == "system" and not sight.everything:
        raise Denied("only the system namespace has URLs fetched for itself")


def listed(base: str, architecture: str, lists: str) -> Source | None:
    """The source that a name means which no store has."""
    wanted = parse_reference(base)
    fits = (s for s in sources.lists(lists) if s.name == wanted.name and architecture in s.architectures)
    found = next((s for s in fits if wanted.tag in s.tags), None)
    return None if wanted.remote or wanted.digest_prefix else found


@dataclass(frozen=True, slots=True)
class Blob:
    """A version of an artifact: a disk, or the bytes that came in, of which a disk is made when one is asked for."""

    namespace: str = ""  # in whose own store it is; "" for the server's
    disk: str = ""  # its manifest's digest
    disk_bytes: int = 0
    uuid: str = field(default_factory=new_uuid)
    data: str = ""  # the manifest of the bytes as they came
    size_bytes: int = 0  # of those
    sums: dict[str, str] = field(default_factory=dict)  # of those, by algorithm
    upload: str = ""  # until they are stored: NAMESPACE/UUID, in `uploads` of the server's directory
    made_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(Stored):
    """What a namespace keeps, with versions; stored without namespace: what users add to a name of a store."""

    KIND: ClassVar[str] = "artifact"
    uuid: str  # also the name of a URL's newest disk in the namespace's store
    metadata: dict[str, Any] = field(default_factory=dict)
    namespace: str = ""
    name: str = ""
    source_url: str = ""
    artifact_type: str = "image"  # or label, snapshot, other
    state: str = "created"  # initial → creating → created, or error
    wanted: str = ""  # what is still to come, for `bringing`
    error_message: str = ""
    progress: str = ""
    shared: bool = False
    max_versions: int = 3
    last: int = 0  # the number of the newest version there was
    blobs: dict[str, Blob] = field(default_factory=dict)  # by number, oldest first; the newest `max_versions`
    store_url: str = ""  # of a name's store
    digests: tuple[str, ...] = ()  # of a name: all architectures

    def __post_init__(self) -> None:
        object.__setattr__(self, "blobs", dict(list(self.blobs.items())[-self.max_versions :]))


@dataclass(frozen=True, slots=True)
class Sight:
    """What one caller may name: the server's images and those of namespaces, `namespace` being its own.

    may: whether the caller sees another one. everything: also by digest, whatever it is that a cache holds.
    """

    resolver: ImageCache
    namespaces: NamespaceStores
    namespace: str
    may: Callable[[str], bool]
    everything: bool
    artifacts: Callable[[], Iterable[Artifact]]

    def resolve(self, text: str, architecture: str) -> Resolved:
        """As ImageCache does. Raises NotFound, in the same words for what is not there and what may not be seen."""
        wanted = parse_reference(text)
        remote = self.namespace if wanted.remote == MINE else wanted.remote or ""
        if wanted.remote == MINE or (remote and remote not in self.resolver.stores and self.may(remote)):
            try:
                store = self.namespaces.find(remote)
            except NotFound as err:
                hint = "see: sf remote ls; a server sees what is added within 3 s"
                raise NotFound(f"no remote or namespace is called {remote}", hint=hint) from err
            if store is None:
                raise NotFound(f"no image {text}: {remote} has kept none", hint="see: sf image ls my")
            digest = digest_of(store, wanted, architecture)
            return Resolved(digest, store.manifest(digest).size_bytes, remote)
        found = self.resolver.resolve(text, architecture)
        # The cache has everybody's: a digest shows who may read the image only where a store has it.
        by_digest, stores = wanted.digest_prefix and not self.everything, self.resolver.stores.values()
        if by_digest and not any(store.has_manifest(found.digest) for store in stores):
            raise NotFound(f"no image {text}", hint="see: sf image ls")
        return found


def identity(*called: str) -> str:
    """The UUID under which the API shows a manifest's digest; of a namespace or store, and what it calls so."""
    return str(uuid_module.uuid5(_ARTIFACTS, "/".join(called)))


def want(txn: Transaction, namespace: str, called: str, blob: Blob | None = None, **more: Any) -> Artifact:
    """Have it brought: a new artifact, its next version (or `blob` as that), a blob's disk. Raises NoCapacity."""
    own = [a for a in txn.list(Artifact) if a.namespace == namespace]
    uuid, bring = identity(namespace, called), blob is None or blob.upload
    found = blob_of(txn.list(Artifact), called)[0] if called.startswith(BLOB) else txn.find(Artifact, uuid)
    coming = sum(bool(a.wanted) for a in own if bring and a != found)
    if len(own) - bool(found) >= _MOST or coming >= _MOST_WANTED:
        hint = f"{_MOST_WANTED} at a time, {_MOST} in all"
        raise NoCapacity(f"namespace {namespace} has too many artifacts", hint=hint)
    found = found or Artifact(uuid=uuid, namespace=namespace, name=called, source_url=called)
    if found.wanted not in ("", called):
        raise NotReady(f"a version of {found.name[:80]} is on its way", hint="again in a moment")
    found = replace(found, error_message="", **more)
    if blob is not None:
        return add_version(txn, found, blob)
    txn.event(Artifact.KIND, found.uuid, f"asked for: {called}", type="audit")
    return txn.update(replace(found, wanted=called, state="creating" if found.blobs else "initial"))


def add_version(txn: Transaction, found: Artifact, blob: Blob) -> Artifact:
    """The next version, unless the newest is the same; what was uploaded is to be stored yet."""
    newest, wanted = found.blobs.get(str(found.last)), BLOB + blob.uuid if blob.upload else ""
    if newest is None or wanted or (blob.disk, blob.data) != (newest.disk, newest.data):
        found = replace(found, last=found.last + 1, blobs=found.blobs | {str(found.last + 1): blob})
        txn.event(Artifact.KIND, found.uuid, f"version {found.last} is blob {blob.uuid}")
    state = "creating" if wanted else "created"
    return txn.update(replace(found, state=state, wanted=wanted, progress=""))


def blob_of(among: Iterable[Artifact], base: str, namespace: str = "") -> tuple[Artifact, Blob]:
    """What `label:NAME` and `sf://blob|label|snapshot|upload/…` mean. Raises NotFound, NotReady."""
    kind, _, rest = base.replace("label:", "sf://label/").removeprefix("sf://").partition("/")
    home, _, name = rest.rpartition("/")
    url = f"sf://{kind}/{home or namespace}/{name}"
    for one in among:
        for blob in reversed(one.blobs.values()):
            if rest == {"blob": blob.uuid, "snapshot": one.uuid}.get(kind) or url == one.source_url:
                if blob.upload:
                    raise NotReady(f"{base[:120]} is being stored", hint="again in a moment")
                return one, blob
    raise NotFound(f"{base[:120]} not found", hint="sf://blob/UUID, sf://label/NAMESPACE/NAME, …")


def named_images(stores: Iterable[Store]) -> Iterator[Artifact]:
    """Every name of every store that can be listed; what one of them does not give is a line in the log."""
    for store in stores:
        try:
            records = list(store.names.list(lenient=True))
            sizes = store.sizes({digest for record in records for digest in record.images.values()})
            for record in records:
                name, blobs = f"{record.name}:{record.tag}", {}
                for d in list(record.images.values())[:1]:
                    blobs[str(record.revision)] = Blob("", str(d), sizes.get(d, 0), identity(str(d)))
                uuid, digests = identity(store.info.id, name), tuple(map(str, record.images.values()))
                shown = Artifact(uuid=uuid, namespace="system", name=name, source_url=name, digests=digests)
                last = record.revision if blobs else 0
                yield replace(shown, shared=True, max_versions=1, last=last, blobs=blobs, store_url=store.url)
        except StoreError as err:
            log.warning("%s cannot be listed: %s", store.url, err)


def find(among: Iterable[Artifact], reference: str, namespace: str) -> Artifact:
    """By UUID or sf://…; or, of those that `namespace` keeps and those that are everybody's, by name or URL: its own.

    Raises NotFound, Invalid where several fit.
    """
    names = {reference, reference if ":" in reference else f"{reference}:latest"}
    found = [a for a in among if a.uuid == reference or names & {a.name, a.source_url}]
    if not reference.startswith("sf://"):
        found = [a for a in found if a.shared or reference == a.uuid or a.namespace == namespace]
    found = [a for a in found if a.namespace == namespace and not a.store_url] or found
    if not found:
        raise NotFound(f"artifact {reference[:80]} not found", hint="see: sf image ls")
    if len(found) > 1:
        raise Invalid(f"{reference} fits {len(found)} artifacts", hint="use the artifact's UUID")
    return found[0]
