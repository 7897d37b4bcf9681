"""The node's image cache: complete images as read-only sparse raw files, named by their manifest's digest.

    <directory>/<hex>.raw        the disk, mode 0444
    <directory>/<hex>.manifest   what it holds; written before the disk gets its name

Only the image service puts images here (imagestore.cache.open_images); the files are the state. Bytes are verified as
they are written and again by `verify`.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from imagestore.disks.disk import RawDisk, read_range
from imagestore.errors import Corrupt, Invalid, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import Manifest
from imagestore.outside import read_json
from imagestore.store.names import parse_reference
from imagestore.store.resolve import begins, resolve
from imagestore.store.store import Store
from imagestore.updates.using import Seed

_SEEDS_BYTES = 32 << 20  # of manifests that are looked into for an image that is opened: half a second


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means now."""

    digest: Digest
    size_bytes: int
    namespace: str = ""  # in whose own store it is, if it is in none of the server's


class ImageCache:
    """One directory, shared by any number of threads and processes of this machine.

    stores: remotes by name, in the order in which they are asked; only "not found" moves on to the next.
    """

    def __init__(self, directory: Path, stores: Mapping[str, Store]) -> None:
        self.directory = directory
        self.stores = dict(stores)
        directory.mkdir(parents=True, exist_ok=True)

    def resolve(self, text: str, architecture: str = os.uname().machine) -> Resolved:
        """What `[remote/]name[:tag][@b3:digest]` means. A part of a digest matches cached images only.

        Raises Invalid, NotFound, Unavailable.
        """
        wanted = parse_reference(text)
        held = wanted.digest if wanted.digest and self.has(wanted.digest) else None
        if wanted.digest_prefix and not wanted.digest:
            held = begins(self.digests(), wanted.digest_prefix, "the cache")
        if held is not None:
            return Resolved(held, self.manifest(held).size_bytes)
        found = resolve(text, architecture, self.stores)
        try:
            manifest = self.manifest(found.digest)
        except (NotFound, Corrupt):
            manifest = found.store.manifest(found.digest)
        return Resolved(found.digest, manifest.size_bytes)

    def has(self, digest: Digest) -> bool:
        """Whether the image is complete here."""
        return self.path(digest).exists()

    def path(self, digest: Digest) -> Path:
        """Where the complete image is, or would be."""
        return self.directory / f"{digest.hex()}.raw"

    def manifest(self, digest: Digest) -> Manifest:
        """Of an image in the cache. Raises NotFound, Corrupt."""
        path = self.directory / f"{digest.hex()}.manifest"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"image {digest} is not in the cache") from error
        manifest = Manifest.decode(data)
        if manifest.digest != digest:
            raise Corrupt(f"{path} does not match its name", hint="`sf cache verify` repairs the cache")
        return manifest

    def digests(self) -> list[Digest]:
        """Of the complete images, the newest first."""
        found = []
        for path in self.directory.glob("*.raw"):
            with suppress(Invalid, OSError):  # somebody else's file, or one that is forgotten just now
                digest, changed_ns = Digest.parse(path.stem), path.stat().st_mtime_ns
                if path.is_file():
                    found.append((-changed_ns, digest))
        return [digest for _, digest in sorted(found)]

    def seeds(self, parent: Digest | None = None) -> tuple[Seed, ...]:
        """Complete images to copy chunks from: what the image was made of, then the newest."""
        found, looked_bytes = list[Seed](), 0
        for digest in sorted(self.digests(), key=lambda one: one != parent):
            if looked_bytes < _SEEDS_BYTES:
                with suppress(NotFound, Corrupt):
                    found.append(Seed(manifest := self.manifest(digest), self.path(digest)))
                    looked_bytes += manifest.ids.nbytes
        return tuple(found)

    def verify(self, digest: Digest) -> None:
        """Hash a complete image again; one that does not match is removed and Corrupt is raised."""
        manifest = self.manifest(digest)
        with self.path(digest).open("rb", buffering=0) as file:
            disk = RawDisk(file.fileno(), str(digest))
            good, end = disk.size_bytes == manifest.size_bytes, 0
            for offset, length, id_ in manifest.chunks():
                good = good and not _data_between(disk, end, offset)
                good = good and blake3(os.pread(file.fileno(), length, offset)).digest() == id_
                end = offset + length
            good = good and not _data_between(disk, end, manifest.size_bytes)
        if not good:
            self.remove(digest)
            raise Corrupt(
                f"the cached image {digest} was damaged and is removed", hint="it is fetched again when used"
            )

    def remove(self, digest: Digest) -> None:
        """Forget an image, complete or not; who has the file open keeps it."""
        for suffix in (".raw", ".have", ".part", ".manifest"):
            self.path(digest).with_suffix(suffix).unlink(missing_ok=True)


def _data_between(disk: RawDisk, start: int, end: int) -> bool:
    """Whether a stretch that must be a hole holds other bytes than zeros."""
    while start < end and (found := disk.next_data(start)):
        start = found[0]
        if read_range(disk, start, min(1 << 20, end - start)).strip(b"\0"):
            return True
        start += 1 << 20
    return False


def list_images(directory: Path) -> list[dict[str, Any]]:
    """What a cache directory holds, complete or not; no service needed."""
    readers: dict[str, list[str]] = {}
    for path in sorted((directory / "readers").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            readers.setdefault(read_json(path.read_bytes())["image"], []).append(path.stem)
    rows = dict[str, dict[str, Any]]()
    stems = {path.stem for suffix in ("part", "raw") for path in directory.glob(f"*.{suffix}")}
    # Incomplete ones first: one that is completed meanwhile is found under its final name.
    for path in (directory / f"{stem}.{suffix}" for stem in sorted(stems) for suffix in ("part", "raw")):
        with suppress(StoreError, OSError):
            digest, status = str(Digest.parse(path.stem)), path.stat()
            if stat.S_ISREG(status.st_mode):
                rows[digest] = {
                    "digest": digest,
                    "path": str(path),
                    "size_bytes": status.st_size,
                    "used_bytes": status.st_blocks * 512,
                    "complete": path.suffix == ".raw",
                    "pinned": path.with_suffix(".pin").exists(),
                    "used_s": status.st_mtime,
                    "readers": readers.get(digest, []),
                }
    return [*rows.values()]
