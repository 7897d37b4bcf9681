"""Is everything there, and is it what it says? And, with a second store, making it so again."""

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from imagestore.backends.wrappers import RateLimited
from imagestore.copy import copy_image
from imagestore.errors import Corrupt, Invalid, NotFound, StoreError, Unsupported
from imagestore.formats import groups, keys
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.sealed import unseal
from imagestore.formats.update import decode_steps, verify_update
from imagestore.progress import Progress, Report, silent
from imagestore.push import push
from imagestore.store.frames import Frames, load
from imagestore.store.inventory import Inventory, check_pack, named, read_tail, reindex
from imagestore.store.leases import Condemned
from imagestore.store.names import NameRecord
from imagestore.store.roots import can_be_read, find_roots
from imagestore.store.store import Store, StoreInfo


@dataclass(frozen=True, slots=True)
class Problem:
    """An object that is wrong or missing, why, and the image that cannot be read because of it."""

    key: str
    reason: str
    image: Digest | None = None


@dataclass(slots=True)
class VerifyReport:
    """`problems` is empty when all is well. `checked_bytes`: stored bytes that were read and hashed."""

    problems: list[Problem] = field(default_factory=list)
    waste: list[Problem] = field(default_factory=list)
    """Damage in what no name, instance or signature needs and the collector will delete: harmless."""
    images: int = 0
    packs: int = 0
    checked_bytes: int = 0
    repaired: int = 0

    @contextlib.contextmanager
    def about(self, key: str, image: Digest | None = None) -> Iterator[None]:
        """Note what goes wrong with an object."""
        try:
            yield
        except (Corrupt, NotFound, Unsupported, Invalid) as err:
            self.problems.append(Problem(key, str(err), image))


def verify_store(
    store: Store, *, full: bool = False, bytes_s: float = 0, progress: Report = silent
) -> VerifyReport:
    """Check every object's structure and what it refers to; with `full` read and hash every byte.

    bytes_s: read at most so fast (0: as fast as it goes). An object that is being written or collected meanwhile may
    be reported as missing: check again before acting on it.
    """
    if bytes_s:
        store = Store(RateLimited(store.backend, bytes_s), store.info, single_writer=store.single_writer)
    report = VerifyReport()
    _verify_small(store, report)
    inventory = Inventory.read(store)
    _verify_updates(store, report, full=full)
    _verify_index(store, inventory, report)
    manifests = {name: stat for name, stat in named(store, keys.MANIFESTS) if stat.size_bytes}
    packs_of: dict[Digest, set[Digest]] = {name: set() for name in manifests}
    for name in manifests:
        with report.about(keys.MANIFESTS.key(name), name):
            manifest, key = store.manifest(name), keys.GROUPS.key(name)
            with report.about(key), contextlib.suppress(NotFound):
                groups.decode(store.backend.get(key).data, manifest.size_bytes, manifest.disk_id)
            with report.about(keys.LAYOUTS.key(name), name):
                layout = store.layout(name)
                packs_of[name] = set(layout.packs)
                _verify_layout(inventory, manifest, layout, report)
        report.images += 1
    for name, stat in named(store, keys.LAYOUTS):
        if stat.size_bytes and name not in manifests:  # left by a push that was cut off
            with report.about(stat.key):
                Layout.decode(keys.untrashed(store.backend.get(stat.key).data), name)
    total = sum(stat.size_bytes for stat in inventory.packs.values())
    for pack, stat in inventory.packs.items():
        with report.about(stat.key):
            if full:
                _load_all(store, Frames.of_pack(pack, read_tail(store.backend, pack)[0]))
            elif pack in inventory.tables:
                footer = inventory.tables[pack].footer
                if footer.data_bytes + len(footer.encode()) + 12 != stat.size_bytes:
                    raise Corrupt(f"pack {pack} is {stat.size_bytes} bytes long, which is not by its footer")
        report.packs += 1
        report.checked_bytes += stat.size_bytes if full else 0
        progress(Progress("verify", report.checked_bytes if full else 0, total))
    with contextlib.suppress(Corrupt, Unsupported):
        condemned = _note_damage(store, report, inventory.packs.keys(), sound=full)
        needed = find_roots(store, 0.0, float("inf")).images
        spare = packs_of.keys() - needed
        used = set().union(*(packs_of[name] for name in packs_of.keys() & needed))
        doomed = {keys.PACKS.key(pack) for pack in (condemned.packs.keys() | condemned.damaged) - used}
        for problem in list(report.problems):
            if problem.key in doomed or problem.image in spare:
                report.problems.remove(problem)
                report.waste.append(problem)
    return report


def _note_damage(store: Store, report: VerifyReport, packs: Iterable[Digest], *, sound: bool) -> Condemned:
    """Say in the store which of these packs that are there nobody may begin to use; with `sound` that no others are.

    Where that cannot be written, the report alone says it.
    """
    condemned, looked_at = Condemned.read(store), set(packs)
    bad = looked_at & {pack for problem in report.problems if (pack := keys.PACKS.digest(problem.key))}
    damaged = bad if sound else condemned.damaged | bad
    if damaged != condemned.damaged:
        with contextlib.suppress(StoreError):
            store.check_writable()
            return condemned.replace(store, damaged=damaged)
    return condemned


def verify_image(store: Store, digest: Digest, *, progress: Report = silent) -> VerifyReport:
    """Read and hash every byte of one image. Raises nothing that can be reported."""
    report = VerifyReport(images=1)
    with report.about(keys.MANIFESTS.key(digest), digest):
        manifest = store.manifest(digest)
        with report.about(keys.LAYOUTS.key(digest), digest):
            layout = store.layout(digest)
            layout.check(manifest)
            # Its pages were read for this.
            chunk_packs = layout.frames["pack"][layout.chunk_frames[: len(manifest.ids)]]
            total = int(layout.frames["size"].sum())
            for number, pack in enumerate(layout.packs):
                frames = Frames.of_image(manifest, layout, np.flatnonzero(chunk_packs == number))
                with report.about(keys.PACKS.key(pack), digest):
                    _load_all(store, frames)
                report.packs += 1
                report.checked_bytes += int(frames.table["size"].sum())
                progress(Progress("verify", report.checked_bytes, total))
            with contextlib.suppress(Corrupt, Unsupported):
                _note_damage(store, report, store.has_packs(layout.pack_sizes()), sound=False)
    return report


def _verify_small(store: Store, report: VerifyReport) -> None:
    """Everything with a seal, and whether names point at something."""
    with report.about(keys.INFO.tree):
        StoreInfo.decode(store.backend.get(keys.INFO.tree).data)
    with report.about(keys.CONDEMNED_KEY):
        Condemned.read(store)
    for kind in (keys.LEASES, keys.REFS, keys.GC):
        for stat in store.objects(kind):
            with report.about(stat.key), contextlib.suppress(NotFound):
                unseal(store.backend.get(stat.key).data, stat.key)
    for stat in store.objects(keys.NAMES):
        if not stat.size_bytes:
            continue
        with report.about(stat.key), contextlib.suppress(NotFound):
            record = NameRecord.decode(store.backend.get(stat.key).data)
            if stat.key != keys.NAMES.key(record.name, record.tag):
                raise Corrupt(f"{stat.key} holds the name {record.name}:{record.tag}")
            for digest in () if record.removed else record.images.values():
                if not store.has_manifest(digest):
                    report.problems.append(Problem(keys.MANIFESTS.key(digest), f"{stat.key} has it", digest))


def _verify_index(store: Store, inventory: Inventory, report: VerifyReport) -> None:
    hooks = Hooks()
    with report.about(keys.HOOKS_KEY), contextlib.suppress(NotFound):
        hooks = Hooks.decode(store.backend.get(keys.HOOKS_KEY).data)
    broken = inventory.part_stats.keys() - inventory.parts.keys()
    for name in sorted(broken):
        report.problems.append(Problem(keys.INDEX.key(name), "an index part is damaged"))
    for at, name in enumerate(hooks.parts):
        packs = inventory.parts.get(name, ())
        if packs and all(pack in inventory.tables for pack in packs):
            mine, theirs = inventory.part(packs).hooks, hooks.keys[hooks.part_of_hook == at]
            # An older sf took sixteen of a part, not of each pack.
            once = len(np.unique(theirs)) == len(theirs) >= min(16, len(mine))
            enough = once and bool(np.isin(theirs, mine).all())
            if hooks.sizes[at] != inventory.part_stats[name].size_bytes or not enough:
                report.problems.append(Problem(keys.HOOKS_KEY, f"the hooks of index part {name} are wrong"))
    # A hint that leads nowhere: collectors that meet can leave one. Beside a part that has none it is damage.
    left_out = inventory.parts.keys() - set(hooks.parts)
    for name in set(hooks.parts) - inventory.parts.keys() - broken:
        found = report.problems if left_out else report.waste
        found.append(Problem(keys.HOOKS_KEY, f"index part {name} is not there"))


def _verify_updates(store: Store, report: VerifyReport, *, full: bool) -> None:
    for to, stat in named(store, keys.UPDATES):
        with report.about(stat.key), contextlib.suppress(NotFound):
            for base, step in decode_steps(store.backend.get(stat.key).data, stat.key).items():
                key = keys.DELTAS.key(step.name)
                if not store.has(key) or store.backend.stat(key).size_bytes != step.size_bytes:
                    raise Corrupt(f"{key} is not there, or has another length than its list says")
                if full:
                    verify_update(store.backend.get(key).data, base, to, step)


def _verify_layout(inventory: Inventory, manifest: Manifest, layout: Layout, report: VerifyReport) -> None:
    """Whether every chunk lies where the layout says, by the packs' own footers."""
    layout.check(manifest)
    stored = layout.stored(manifest)
    for pack in layout.packs:
        with report.about(keys.PACKS.key(pack), layout.manifest):
            inventory.table(pack)
    for use in inventory.uses(layout):
        footer = use.table.footer
        same = (footer.ids[use.rows] == stored.ids[use.chunks]).all(axis=1)
        if not (same & (footer.lengths[use.rows] == stored.lengths[use.chunks])).all():
            raise Corrupt(f"the layout of {layout.manifest} points at other chunks in pack {use.pack}")


def _load_all(store: Store, frames: Frames) -> None:
    for _ in load(store, [frames]):
        pass


def repair(store: Store, report: VerifyReport, other: Store | Path, *, full: bool = False) -> VerifyReport:
    """Mend what a verify found with another store's objects and chunks, or with a disk's, and verify again.

    What has the same name everywhere is taken as it is, if it is right there. Chunks of packs that the other store
    does not have are stored in new packs here; nobody uses the damaged ones any more, and the collector takes them.
    """
    store.check_writable()
    repaired = 0
    if isinstance(other, Path):
        try:
            push(store, other, None)
        except Invalid:  # any bytes can have been pushed as raw
            push(store, other, None, format_="raw")
        other = store
    for key in {problem.key for problem in report.problems}:
        with contextlib.suppress(StoreError):
            repaired += _mend(store, other, key)
    inventory = Inventory.read(store)
    reindex(store, inventory)
    known = [(pack, table.footer) for pack, table in inventory.tables.items()]
    images = {problem.image for problem in report.problems if problem.image is not None}
    every = (digest for digest, stat in named(store, keys.LAYOUTS) if stat.size_bytes)
    images |= {digest for digest in every if not can_be_read(store, digest)}
    for digest in images:
        with contextlib.suppress(NotFound, Corrupt):
            copy_image(other, store, digest, known=known)
            repaired += 1
    return replace(verify_store(store, full=full), repaired=repaired)


def _mend(store: Store, other: Store, key: str) -> bool:
    """Put one object right. Raises NotFound, Corrupt when the other store cannot help, returns False for no need."""
    match keys.kind_of(key):
        case keys.PACKS:
            pack, data = Digest.parse(key[-64:]), other.backend.get(key).data
            check_pack(pack, data)
            store.backend.put(key, data)
            condemned = Condemned.read(store)
            condemned.replace(store, damaged=condemned.damaged - {pack})
        case keys.MANIFESTS:
            store.backend.put(key, other.manifest(Digest.parse(key[-64:])).encode())
        case keys.NAMES | keys.REFS as kind:
            data = other.backend.get(key).data
            unseal(data, key)
            if kind is keys.NAMES:
                NameRecord.decode(data)
            store.backend.put(key, data)
        case keys.INFO:
            store.backend.put(key, store.info.encode())
        case keys.INDEX | keys.LEASES | keys.HOOKS | keys.UPDATES | keys.GROUPS:
            # Hints and promises: who needs them writes them again.
            store.backend.delete(key)
        case keys.GC:
            # What was on the list must not come back: everything that no image uses goes on the new one.
            used = {pack for one in find_roots(store, 0.0, 0.0).must for pack in store.layout(one).packs}
            store.backend.delete(key)
            unused = Inventory.read(store).packs.keys() - used
            Condemned(epoch=secrets.randbits(48)).replace(store, add=unused)
        case _:
            return False
    return True
