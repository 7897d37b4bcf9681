"""What an instance's disks may be made of, and the stores' names as the API shows them."""

import logging
import re
import uuid as uuid_module
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from compute.cluster.records.stored import Stored
from compute.errors import Invalid, NotFound
from compute.wire.spec import DiskSpec
from imagestore import Resolved, Store, StoreError

log = logging.getLogger(__name__)

GIB = 2**30

_ARTIFACTS = uuid_module.UUID("4b1f3f0e-6a3c-5f0b-9d4e-5f7a52f3c0de")
"""Namespace of the UUIDs that names and manifests get in the API (RFC 9562, version 5): the same on every server."""

_DEVICES = "abcdefghijklmnop"


class Resolver(Protocol):
    """The part of ImageCache that the server needs. `stores` by the name that people put before a slash."""

    @property
    def stores(self) -> Mapping[str, Store]: ...

    def resolve(self, text: str, architecture: str) -> Resolved: ...


def resolve_disks(
    resolver: Resolver, wanted: Sequence[Mapping[str, Any]], architecture: str
) -> tuple[DiskSpec, ...]:
    """Raises NotFound (with the nearest names), Invalid (a base nobody knows, a disk smaller than its image)."""
    if len(wanted) > len(_DEVICES):
        raise Invalid(f"an instance has at most {len(_DEVICES)} disks")
    return tuple(
        _resolve(resolver, disk, f"vd{letter}", architecture)
        for letter, disk in zip(_DEVICES, wanted, strict=False)
    )


def _resolve(resolver: Resolver, disk: Mapping[str, Any], device: str, architecture: str) -> DiskSpec:
    size_bytes = int(disk.get("size") or 0) * GIB
    bus = disk.get("bus") or "virtio"
    bus = "sata" if bus == "ide" else bus  # q35 has no IDE
    if disk.get("type") not in (None, "disk"):
        raise Invalid(f"disk {device}: type {str(disk['type'])[:40]!r} is not offered", hint="type is disk")
    base = str(disk.get("base") or "")
    if not base:
        if not size_bytes:
            raise Invalid(
                f"disk {device} has neither a base nor a size", hint="a blank disk needs a size in GB"
            )
        return DiskSpec(device, size_bytes=size_bytes, bus=bus)
    if re.match(r"[a-z]+://|label:|file:", base):
        raise Invalid(f"disk {device}: cannot boot from {base[:120]!r}", hint="give a name such as debian:12")
    found = resolver.resolve(base, architecture)
    if size_bytes and size_bytes < found.size_bytes:
        needed = -(-found.size_bytes // GIB)
        raise Invalid(
            f"disk {device} of {size_bytes // GIB} GB is smaller than its image {base} "
            f"({found.size_bytes / GIB:.2f} GB)",
            hint=f"give it {needed} GB or more, or no size",
        )
    return DiskSpec(device, str(found.digest), base, size_bytes or found.size_bytes, bus, found.namespace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(Stored):
    """What users add to an image name; the image itself lives in its store."""

    KIND: ClassVar[str] = "artifact"
    uuid: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """One name of one store as an artifact."""

    uuid: str
    name: str
    store_url: str
    revision: int
    digests: tuple[str, ...]
    sizes_bytes: tuple[int, ...]


def blob_uuid(digest: str) -> str:
    """The UUID under which the API shows a manifest."""
    return str(uuid_module.uuid5(_ARTIFACTS, digest))


def named_images(stores: Iterable[Store]) -> Iterator[NamedImage]:
    """Every name of every store that can be listed; what one of them does not give is a line in the log."""
    for store in stores:
        try:
            records = list(store.names.list())
            sizes = store.sizes({digest for record in records for digest in record.images.values()})
            for record in records:
                name = f"{record.name}:{record.tag}"
                digests = list(record.images.values())
                yield NamedImage(
                    uuid=str(uuid_module.uuid5(_ARTIFACTS, f"{store.info.id}/{name}")),
                    name=name,
                    store_url=store.url,
                    revision=record.revision,
                    digests=tuple(str(d) for d in digests),
                    sizes_bytes=tuple(sizes.get(d, 0) for d in digests),
                )
        except StoreError as err:
            log.warning("%s cannot be listed: %s", store.url, err)


def find_image(stores: Iterable[Store], reference: str) -> NamedImage:
    """By UUID, or by name (`debian` is `debian:latest`). Raises NotFound, Invalid when it is in several stores."""
    names = {reference, reference if ":" in reference else f"{reference}:latest"}
    found = [i for i in named_images(stores) if i.uuid == reference or i.name in names]
    if not found:
        raise NotFound(f"artifact {reference[:80]} not found", hint="see: sf image ls")
    if len(found) > 1:
        raise Invalid(f"{reference} is in {len(found)} stores", hint="use the artifact's UUID")
    return found[0]
