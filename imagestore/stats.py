"""How much a store holds, and what deleting an image would free."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagestore.errors import StoreError
from imagestore.formats.columns import first_of_each
from imagestore.formats.digest import Digest
from imagestore.store.inventory import Inventory, Table, read_layouts
from imagestore.store.roots import find_roots
from imagestore.store.store import Store


@dataclass(frozen=True, slots=True)
class ImageStats:
    """One image: its names, bytes that are no holes, stored bytes of its chunks, and those that nobody else uses."""

    digest: Digest
    names: tuple[str, ...]
    data_bytes: int
    stored_bytes: int
    own_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A whole store. `unique_bytes`: plain bytes of different chunks in use; `objects_bytes`: all that is stored."""

    logical_bytes: int
    unique_bytes: int
    used_bytes: int
    packs_bytes: int
    objects_bytes: int
    objects: int
    images: tuple[ImageStats, ...]


def store_stats(store: Store) -> StoreStats:
    """Reads every layout and index part once. Raises NotFound, Corrupt when an image is not whole."""
    inventory = Inventory.read(store)
    names: dict[Digest, list[str]] = {}
    for (name, tag, _), digest in store.names.images().items():
        names.setdefault(digest, []).append(f"{name}:{tag}")
    uses: dict[Digest, list[tuple[Digest, npt.NDArray[np.int32], int]]] = {}
    counts: dict[Digest, npt.NDArray[np.int32]] = {}
    for digest, layout in read_layouts(store, find_roots(store, 0.0, float("inf")).must):
        if isinstance(layout, StoreError):
            raise layout
        uses[digest] = []
        count = len(layout.chunk_frames) - len(layout.pages.ids)
        for pack, table, chunks, rows in inventory.uses(layout):
            data_bytes = int(table.footer.lengths[rows[chunks < count]].sum(dtype=np.int64))
            unique = np.unique(rows).astype(np.int32)
            uses[digest].append((pack, unique, data_bytes))
            counts.setdefault(pack, np.zeros(len(table.live), np.int32))[unique] += 1
            table.live[unique] = True
    images = []
    for digest, found in sorted(uses.items()):
        data, stored, own = 0, 0.0, 0.0
        for pack, unique, data_bytes in found:
            table = inventory.table(pack)
            data += data_bytes
            stored += table.stored_bytes(unique)
            own += table.stored_bytes(unique[counts[pack][unique] == 1])
        images.append(ImageStats(digest, tuple(names.get(digest, ())), data, round(stored), round(own)))
    tables = [table for table in inventory.tables.values() if table.live.any()]
    every = list(store.backend.list(""))
    return StoreStats(
        logical_bytes=sum(image.data_bytes for image in images),
        unique_bytes=_unique_bytes(tables),
        used_bytes=round(sum(table.stored_bytes(table.live) for table in tables)),
        packs_bytes=sum(stat.size_bytes for stat in inventory.packs.values()),
        objects_bytes=sum(stat.size_bytes for stat in every),
        objects=len(every),
        images=tuple(images),
    )


def _unique_bytes(tables: list[Table]) -> int:
    """Plain bytes of different live chunks: a chunk may lie in more than one pack."""
    ids = np.concatenate([np.zeros((0, 32), np.uint8), *(table.footer.ids[table.live] for table in tables)])
    live = (table.footer.lengths[table.live] for table in tables)
    lengths = np.concatenate([np.zeros(0, np.uint32), *live])
    return int(lengths[first_of_each(ids)].sum(dtype=np.int64))
