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
from imagestore.formats.manifest import Manifest
from imagestore.mirror.content import DEBIAN_WORDS, Sums, read_sums, simplestreams_archive
from imagestore.mirror.replicate import signers
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
            self._images = []
            with suppress(Unsupported):
                self._images = sorted(self._read(), key=lambda image: (image.name, image.tag, image.arch))
            self._read_at_s = time.monotonic()
        return self._images

    def _read(self) -> list[Image]:
        named = self.store.names.images(lenient=True)
        signed: dict[Target, dict[Digest, Digest]] = {}
        for owner in signers(self.store):
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
            with suppress(NotFound, Corrupt):
                manifest, sums = self.manifest(digest), read_sums(self.store, digest)
                facts = (manifest.size_bytes, manifest.data_bytes, manifest.os, manifest.labels)
                signer = signed.get((name, tag, architecture), {}).get(digest)
                found.append(Image(name, tag, architecture, digest, *facts, sums, signer))
        return found

    def find(self, name: str, tag: str, arch: str) -> Image:
        """By the words of a URL. Raises NotFound."""
        for image in self.images():
            if (image.name, image.tag) == (name, tag) and arch in (image.arch, image.architecture):
                return image
        raise NotFound(f"no image {name}:{tag} for {arch}")

    def history(self, image: Image) -> list[tuple[float, Digest, int]]:
        """The versions of a name that are still here, newest first: when set, and how many bytes were new then."""
        versions = list[tuple[float, Digest, Manifest]]()
        for change in self.store.names.history(image.name, image.tag):
            digest = change.images.get(image.architecture)
            if digest and not change.removed and digest not in {known for _, known, _ in versions[-1:]}:
                with suppress(NotFound, Corrupt):
                    versions.append((change.at_s, digest, self.manifest(digest)))
        olders = [*(manifest for _, _, manifest in versions[1:]), None]
        return [
            (at_s, digest, added_bytes(manifest, older))
            for (at_s, digest, manifest), older in zip(versions, olders, strict=False)
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
