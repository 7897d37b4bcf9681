"""A mirror of a mirror: images by name, and the signatures of their owner as they are. To and from disks as well.

Images come first, then the owner's metadata, its timestamp last: who reads in the middle of it sees the former
publication, whose images are all here. `adopt` puts one's own signature on what an owner left behind.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from imagestore.backends.protocol import Backend
from imagestore.copy import copy_image
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import BESIDE, DELTAS, TUF
from imagestore.mirror.signing import Publisher
from imagestore.mirror.sources import Outcome, choose
from imagestore.store.roots import can_be_read, tag
from imagestore.store.store import Store
from imagestore.store.trust import SignedNames, Target, parse_targets, read_metadata, signed_targets, tree
from imagestore.updates.using import read_steps

_MOST_ROOTS = 1024


def replicate(
    source: Store,
    target: Store,
    patterns: Collection[str] = (),
    *,
    report: Callable[[str], object] = lambda name: None,
) -> Iterator[Outcome]:
    """Copy names that match any of the patterns (`debian:*`; none: all), each with all it needs before its name is set.

    A pattern that matches none raises NotFound before anything is done; a name that fails stops no other. The owner's
    signatures come last, and only when no name has failed.
    """
    target.check_writable()
    source.check_public()
    if reason := source.names.doubt():
        raise reason
    failed = False
    for record in choose(source.names.list(), patterns, lambda record: [f"{record.name}:{record.tag}"]):
        text = f"{record.name}:{record.tag}"
        here = target.names.read(record.name, record.tag)
        for architecture, digest in sorted(record.images.items()):
            title = f"{text} {architecture}"
            same = not here.removed and here.images.get(architecture) == digest
            if same and can_be_read(target, digest):
                yield Outcome(title, "unchanged")
                continue
            try:
                report(title)
                new_bytes = copy_image(source, target, digest)
                _copy_beside(source, target, digest)
                tag(target, digest, record.name, record.tag, architecture)
                yield Outcome(title, "new", new_bytes=new_bytes)
            except StoreError as error:
                failed = True
                yield Outcome(title, "failed", str(error))
    if not failed:
        for fingerprint in signers(source):
            try:
                copy_tree(source.backend, target.backend, fingerprint)
            except StoreError as error:
                yield Outcome(f"signatures of {str(fingerprint)[:15]}…", "failed", str(error))


def _copy_beside(source: Store, target: Store, digest: Digest) -> None:
    """Nothing shows that it is right, so it replaces nothing: of an image that has another name here, perhaps."""
    steps = [DELTAS.key(step.name) for step in read_steps(source, digest).values()]
    for key in (*steps, *(kind.key(digest) for kind in BESIDE)):
        with suppress(NotFound):
            _copy_once(source.backend, target.backend, key)


def signers(store: Store) -> list[Digest]:
    """Whose publications a store carries, an owner who is gone after one who still signs; or whom its URL names."""
    if isinstance(store.names, SignedNames):
        return [store.names.fingerprint]
    stamps = [stat for stat in store.objects(TUF) if stat.key.endswith("/timestamp.json")]
    stamps.sort(key=lambda stat: stat.modified_s, reverse=True)
    return [Digest.parse(stat.key.split("/")[1]) for stat in stamps]


def copy_tree(source: Backend, target: Backend, fingerprint: Digest) -> None:
    """One signer's metadata, what is referred to before what refers to it. Files that are there already stay.

    So does a later publication: what comes on a disk or from a mirror of ours may be older than what is here. Dates do
    not matter, signatures do: what was forged would stay for ever, and what the collector keeps goes by it.
    """
    base, files = tree(fingerprint), dict[str, bytes]()

    def read(name: str, root: Root | None) -> Any:
        """What is signed in a file, by the keys that a root, and each further root itself, has for its role."""
        data = files[name] = source.get(base + name).data
        metadata, role = Metadata[Any].from_bytes(data), name.removesuffix(".json").rpartition(".")[2]
        signed = metadata.signed
        for by in filter(None, (root, signed if role == "root" else None)):
            by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        if signed.type != role or name not in (f"{role}.json", f"{signed.version}.{role}.json"):
            raise ValueError(f"{name} is no such file")
        return signed

    try:
        root = read("1.root.json", None)
        if Digest.of(files["1.root.json"]) != fingerprint:
            raise ValueError("it begins with another root")
        with suppress(NotFound):
            for version in range(2, _MOST_ROOTS):
                root = read(f"{version}.root.json", root)
        first, stamp = list(files), read("timestamp.json", root)
        snapshot = read(f"{stamp.snapshot_meta.version}.snapshot.json", root)
        parse_targets(read(f"{snapshot.meta['targets.json'].version}.targets.json", root))
    except (RepositoryError, ValueError, KeyError, AttributeError) as error:
        raise Corrupt(f"{source.url}/{base}: {error}") from error
    latest, *others = list(files)[len(first) :]
    for name in (*first, *reversed(others)):
        _copy_once(source, target, base + name, files[name])
    with suppress(NotFound, Corrupt):
        if read_metadata(target, base + latest).signed.version > stamp.version:
            return
    target.put(base + latest, files[latest])


def _copy_once(source: Backend, target: Backend, key: str, data: bytes | None = None) -> None:
    try:
        target.stat(key)
    except NotFound:
        target.put(key, source.get(key).data if data is None else data)


def adopt(store: Store, publisher: Publisher, fingerprint: Digest) -> Mapping[Target, Digest]:
    """Name and sign what a former owner signed, as far as it is whole here; returns what was adopted.

    The owner's last metadata is believed although it may have expired: the adopter vouches for it from now on.
    Raises NotFound where nothing of it is here.
    """
    adopted = {}
    for target, digests in sorted(signed_targets(store.backend, tree(fingerprint)).items()):
        with suppress(NotFound):
            tag(store, min(digests), *target)
            adopted[target] = min(digests)
    if not adopted:
        raise NotFound(f"{store.url} has no whole image that {fingerprint} signed", hint="sync from it first")
    publisher.publish()
    return adopted
