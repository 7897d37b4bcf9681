"""What a mirror shows of its store: the published images, and the same as simplestreams wants it.

Format of the streams: https://git.launchpad.net/simplestreams/tree/doc and, for VMs, what LXD and Incus read of it.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from imagestore.disks.qcow2.writer import plan
from imagestore.errors import Corrupt, NotFound, Unsupported
from imagestore.formats import columns
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TUF
from imagestore.formats.manifest import Manifest
from imagestore.mirror.content import DEBIAN_WORDS, Sums, read_sums, simplestreams_archive
from imagestore.store.names import Change
from imagestore.store.store import Store
from imagestore.store.trust import Target, signed_targets, tree

_FRESH_S = 5.0
_MOST_MANIFESTS = 64


@dataclass(frozen=True, slots=True)
class Image:
    """One line of the index."""

    name: str
    tag: str
    architecture: str
    digest: Digest
    size_bytes: int
    data_bytes: int
    os: str
    labels: tuple[tuple[str, str], ...]
    sums: Sums | None
    signer: Digest | None  # fingerprint of who signed it; of several who showed a sign of life last

    @property
    def arch(self) -> str:
        """The architecture's Debian name, as in the URLs."""
        return DEBIAN_WORDS.get(self.architecture, self.architecture)

    @property
    def path(self) -> str:
        """Where its files are."""
        return f"images/{self.name}/{self.tag}/{self.arch}"


@dataclass(frozen=True, slots=True)
class Step:
    """A version of a name, and how many bytes of it the one before did not have."""

    change: Change
    digest: Digest
    new_bytes: int


class Catalog:
    """Reads the store at most every few seconds. Not thread-safe: one thread at a time asks."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = lru_cache(_MOST_MANIFESTS)(store.manifest)
        self._images: list[Image] = []
        self._read_at_s = 0.0

    def images(self) -> list[Image]:
        """All published images; where nothing is signed, all named ones; none of a store that cannot be listed."""
        if time.monotonic() - self._read_at_s > _FRESH_S or not self._read_at_s:
            try:
                self._images = sorted(self._read(), key=lambda image: (image.name, image.tag, image.arch))
            except Unsupported:
                self._images = []
            self._read_at_s = time.monotonic()
        return self._images

    def _read(self) -> list[Image]:
        named = self.store.names.images(lenient=True)
        signed: dict[Target, dict[Digest, Digest]] = {}
        for owner in self._signers():
            with suppress(NotFound, Corrupt):  # one who brought nonsense hides nobody else's images
                for key, digests in signed_targets(self.store.backend, tree(owner)).items():
                    for digest in digests:
                        signed.setdefault(key, {}).setdefault(digest, owner)
        if signed:
            # Of several signers' images the one that our own name has, if any.
            named = {
                key: named[key] if named.get(key) in digests else min(digests)
                for key, digests in signed.items()
            }
        found = []
        for (name, tag, architecture), digest in named.items():
            try:
                manifest = self.manifest(digest)
            except (NotFound, Corrupt):
                continue
            facts = (manifest.size_bytes, manifest.data_bytes, manifest.os, manifest.labels)
            signer = signed.get((name, tag, architecture), {}).get(digest)
            sums = read_sums(self.store, digest)
            found.append(Image(name, tag, architecture, digest, *facts, sums, signer))
        return found

    def _signers(self) -> list[Digest]:
        """Whose publications the store carries; an owner who is gone comes after one who still signs."""
        stamps = [stat for stat in self.store.objects(TUF) if stat.key.endswith("/timestamp.json")]
        stamps.sort(key=lambda stat: stat.modified_s, reverse=True)
        return [Digest.parse(stat.key.split("/")[1]) for stat in stamps]

    def find(self, name: str, tag: str, arch: str) -> Image:
        """By the words of a URL. Raises NotFound."""
        for image in self.images():
            if (image.name, image.tag) == (name, tag) and arch in (image.arch, image.architecture):
                return image
        raise NotFound(f"no image {name}:{tag} for {arch}")

    def history(self, image: Image) -> list[Step]:
        """The versions of a name, newest first, as far as they are still here."""
        versions: list[tuple[Change, Digest, Manifest]] = []
        for change in self.store.names.history(image.name, image.tag):
            digest = change.images.get(image.architecture)
            if digest is None or change.removed or (versions and versions[-1][1] == digest):
                continue
            try:
                versions.append((change, digest, self.manifest(digest)))
            except (NotFound, Corrupt):
                continue
        return [
            Step(change, digest, added_bytes(manifest, older and older[2]))
            for (change, digest, manifest), older in zip(versions, [*versions[1:], None], strict=False)
        ]


def added_bytes(manifest: Manifest, older: Manifest | None) -> int:
    """Plain bytes of chunks that another image does not have, each counted once."""
    keys, first = np.unique(columns.keys(manifest.ids), return_index=True)
    if older is not None:
        first = first[~np.isin(keys, columns.keys(older.ids))]
    return int(manifest.lengths[first].sum(dtype=np.uint64))


def streams_index(images: list[Image]) -> dict[str, Any]:
    """`streams/v1/index.json`."""
    entry = {
        "datatype": "image-downloads",
        "format": "products:1.0",
        "path": "streams/v1/images.json",
        "products": sorted(_products(images)),
    }
    return {"format": "index:1.0", "index": {"images": entry}}


def streams_images(images: list[Image], manifest: Callable[[Digest], Manifest]) -> dict[str, Any]:
    """`streams/v1/images.json`: each published image as a product with one version, its names as aliases."""
    products: dict[str, Any] = {}
    for product, same in _products(images).items():
        image, sums = same[0], same[0].sums
        assert sums is not None
        document = manifest(image.digest)
        archive = simplestreams_archive(document, sums.created_s)
        items: dict[str, Any] = {
            "disk.qcow2": {
                "ftype": "disk-kvm.img",
                "path": f"{image.path}/disk.qcow2",
                "sha256": sums.qcow2,
                "size": plan(document).size_bytes,
            }
        }
        for file in ("incus.tar.xz", "lxd.tar.xz"):
            items[file] = {
                "ftype": file,
                "path": f"{image.path}/{file}",
                "sha256": hashlib.sha256(archive).hexdigest(),
                "size": len(archive),
                "combined_disk-kvm-img_sha256": sums.combined,
            }
        aliases = [f"{one.name}/{one.tag}" for one in same]
        aliases += [one.name for one in same if one.tag == "latest"]
        products[product] = {
            "aliases": ",".join(aliases),
            "arch": image.arch,
            "os": image.os or image.name,
            "release": image.tag,
            "release_title": image.tag,
            "variant": "default",
            "versions": {time.strftime("%Y%m%d_%H%M", time.gmtime(sums.created_s)): {"items": items}},
        }
    what = {"content_id": "images", "datatype": "image-downloads", "format": "products:1.0"}
    return {**what, "products": products}


def _products(images: list[Image]) -> dict[str, list[Image]]:
    """Names of one image together: its clients know images by their checksums and want each once."""
    found: dict[tuple[str, Digest], list[Image]] = {}
    for image in images:
        if image.sums is not None:
            found.setdefault((image.arch, image.digest), []).append(image)
    return {f"{same[0].name}:{same[0].tag}:{same[0].arch}:default": same for same in found.values()}
