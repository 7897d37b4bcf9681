"""Images from one store to another: only the chunks that the other one does not hold, frames as they are."""

import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from imagestore import index
from imagestore.digest import Digest
from imagestore.errors import Corrupt, NotFound
from imagestore.inventory import Inventory
from imagestore.layout import Layout
from imagestore.leases import Lease, exists
from imagestore.manifest import Manifest
from imagestore.names import NameRecord
from imagestore.publish import check_present, publish
from imagestore.store import Store, derived_key
from imagestore.transfer import Packer, carry, frames_of, relaid


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What copying an image took. Bytes: of the disk, and stored bytes written to the target."""

    data_bytes: int
    copied_chunks: int
    known_chunks: int
    written_bytes: int


def copy_name(
    source: Store, target: Store, record: NameRecord, *, name: str = "", tag: str = ""
) -> list[CopyResult]:
    """Copy every architecture of a name, and set the name (or another one) in the target."""
    name, tag = name or record.name, tag or record.tag

    def setter(architecture: str, digest: Digest) -> Callable[[], object]:
        return lambda: target.names.set(name, tag, architecture, digest)

    return [
        copy_image(source, target, digest, set_name=setter(architecture, digest))
        for architecture, digest in sorted(record.images.items())
    ]


def copy_image(
    source: Store,
    target: Store,
    digest: Digest,
    *,
    set_name: Callable[[], object] | None = None,
    inventory: Inventory | None = None,
    avoid: Collection[Digest] = (),
) -> CopyResult:
    """Make `digest` whole in the target, with chunks of the source where it lacks them.

    inventory, avoid: for repairs: where to look for chunks in the target instead of its index, and which packs of it
    are not to be used. Raises NotFound, Corrupt, and what the backends raise.
    """
    target.check_writable()
    manifest = _manifest(source, target, digest)
    total = len(manifest.lengths)
    if inventory is None and target.has_manifest(digest):
        try:
            check_present(target, digest)
            if set_name is not None:
                set_name()
                check_present(target, digest)
            return CopyResult(manifest.data_bytes, 0, total, 0)
        except NotFound:
            pass
    raw = manifest.ids.tobytes()
    rows: dict[bytes, int] = {}
    for at in range(total):
        rows.setdefault(raw[at * 32 : at * 32 + 32], at)
    with Lease(target, "copy") as lease:
        packer = Packer(target, lease)
        if inventory is not None:
            footers = {pack: table.footer for pack, table in inventory.tables.items() if pack not in avoid}
        else:
            footers = dict(pair for part in _parts(target, manifest) for pair in part.footers)
        usable = lease.reuse(footers) if footers else set()
        for pack, footer in footers.items():
            if pack in usable and (inventory is not None or exists(target, derived_key("packs", pack))):
                packer.adopt(pack, footer, rows.keys())
        copied = 0

        def repair(bad: set[Digest]) -> Layout:
            nonlocal copied
            packer.forget(bad)
            missing = [at for id_, at in rows.items() if id_ not in packer.places]
            if missing:
                copied += len(missing)
                carry(source, frames_of(manifest, source.layout(digest), missing), packer)
                packer.publish_index()
            return relaid(manifest, digest, packer)

        publish(target, lease, manifest.encode(), repair(set()), repair, set_name)
        return CopyResult(manifest.data_bytes, copied, len(rows) - copied, packer.written_bytes)


def _manifest(source: Store, target: Store, digest: Digest) -> Manifest:
    try:
        return source.manifest(digest)
    except NotFound:
        return target.manifest(digest)


def _parts(store: Store, manifest: Manifest) -> Iterable[index.IndexPart]:
    """The index parts of a store that hold chunks of an image, by their hooks."""
    for name, _ in index.read_hooks(store)[0].matching(manifest.ids):
        with contextlib.suppress(NotFound, Corrupt):
            yield index.IndexPart.decode(store.backend.get(index.part_key(name)).data)
