"""Pages of manifests and layouts, read from packs and put into them: they are stored as the chunks of a disk are.

So whatever knows packs knows pages: collector, copies, mirrors and leases. A writer that changes little of an image
finds most of its pages in the store.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from imagestore.formats import columns
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest, Pages
from imagestore.formats.pack import MAX_PACK_BYTES
from imagestore.store.frames import Frames, load
from imagestore.store.packing import Framer, Packer
from imagestore.store.store import Store


def read_pages(store: Store, head: Layout, rows: range) -> list[bytes]:
    """Some of the pages that the head of a layout places, checked. Raises NotFound, Corrupt, Unavailable."""
    parts = load(store, [Frames.of_image(head.pages, head, rows)], MAX_PACK_BYTES)
    found = {row: bytes(piece) for loaded in parts for row, piece in loaded.chunks()}
    return [found[row] for row in rows]


def lay_out(packer: Packer, digest: Digest, manifest: Manifest, rows: Numbers) -> Layout:
    """The layout of an image whose chunks are these rows of the packer's placement: with its pages, packed.

    All packs have arrived when it returns; their index part is still to be published.
    """
    layout = packer.placement.layout(digest, rows)
    if not manifest.page_bytes:
        return layout
    bodies = [*manifest.pages(), *layout.own_pages(manifest.page_rows[1])]
    pages, found = pack_pages(packer, bodies)
    return packer.placement.layout(digest, np.concatenate([rows, found]), pages)


def pack_pages(packer: Packer, bodies: list[bytes]) -> tuple[Pages, Numbers]:
    """Pack those of these pages that are not in the placement; what they are called, and their rows there."""
    placement, framer = packer.placement, Framer(packer.placement)
    ids = np.frombuffer(b"".join(map(Digest.of, bodies)), np.uint8).reshape(-1, 32)
    first = columns.first_of_each(ids)
    new = np.sort(first[placement.find(ids[first]) < 0])
    framer.add([bodies[at] for at in new.tolist()], ids[new])
    packer.pack(framer.full(last=True))
    packer.flush()
    return Pages(ids, np.array([len(body) for body in bodies], np.int64)), placement.find(ids)


def move(packer: Packer, old: Layout, manifest: Manifest, avoid: Collection[Digest]) -> Layout | None:
    """A layout with what it has in packs to avoid where the packer put it, and with pages that say so.

    None if something of it is not there.
    """
    was = old.stored(manifest).ids
    moved = packer.placement.moved(old, was, was, avoid)
    if moved is None or not manifest.page_bytes:
        return moved
    bodies, count = moved.own_pages(manifest.page_rows[1]), len(was) - len(old.pages.ids) // 2
    now = np.frombuffer(b"".join(map(Digest.of, bodies)), np.uint8).reshape(-1, 32)
    pack_pages(packer, [bodies[at] for at in np.flatnonzero((now != was[count:]).any(axis=1)).tolist()])
    packer.publish_index()
    lengths = np.append(old.pages.lengths[: len(bodies)], [len(body) for body in bodies])
    old = replace(old, pages=old.pages._replace(lengths=lengths))
    return packer.placement.moved(old, was, np.concatenate([was[:count], now]), avoid)
