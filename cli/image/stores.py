"""From what a person typed to an open store, an image in it, a name to write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.command import settings
from cli.errors import MISSING, USAGE, Problem, clean

if TYPE_CHECKING:
    from imagestore import Digest, Reference, Store, VerifyReport


@contextmanager
def opened(
    url: str = "", *, create: bool = False, write: bool = False, alone: bool = False
) -> Iterator["Store"]:
    """The store at `url`, by default that of the settings, closed at the end; `alone`: --single-writer."""
    from imagestore import open_store

    store = open_store(url or settings().store_url, create=create, single_writer=alone)
    try:
        if write:
            store.check_writable()
        yield store
    finally:
        store.backend.close()


@contextmanager
def found(text: str, architecture: str) -> Iterator[tuple["Store", str, "Digest"]]:
    """Look an image up: its store, its name, its digest.

    Without a remote's name the store of the settings is asked, then the remotes in their order. Only "not found"
    moves on: whoever can make a store unreachable must not choose the image.
    """
    from imagestore import NotFound, parse_reference

    wanted = parse_reference(text)
    urls = settings().stores
    if wanted.remote and wanted.remote not in urls:
        raise Problem(f"no remote is called {wanted.remote!r}", hint="sf remote ls", code=MISSING)
    missing: list[NotFound] = []
    # A part of a digest means an image of the local store only.
    part = wanted.digest_prefix and not wanted.digest
    for url in [urls[wanted.remote or "local"]] if wanted.remote or part else urls.values():
        try:
            with opened(url) as store:
                digest = digest_of(store, wanted, architecture)
                yield store, f"{wanted.name}:{wanted.tag}" if wanted.name else "", digest
                return
        except NotFound as error:
            missing.append(error)
    raise missing[0]


def digest_of(store: "Store", wanted: "Reference", architecture: str) -> "Digest":
    """The manifest that a reference stands for in one store. Raises NotFound."""
    from imagestore import NotFound

    if whole := wanted.digest:
        store.manifest(whole)
        store.names.warn(whole)
        return whole
    digits = wanted.digest_prefix
    if not digits:
        return store.names.get(wanted.name, wanted.tag).digest(architecture)
    known = {d for r in store.names.list() if wanted.name in ("", r.name) for d in r.images.values()}
    matches = [d for d in known if d.hex().startswith(digits)]
    if len(matches) != 1:
        raise NotFound(f"{len(matches)} images in {store.url} have a digest that starts with b3:{digits}")
    return matches[0]


def written(text: str) -> tuple[str, str]:
    """The name and tag of what is to be written: no remote and no digest."""
    from imagestore import parse_reference

    reference = parse_reference(text)
    if reference.remote or reference.digest_prefix:
        raise Problem(f"not a name to write to: {text!r}", hint="NAME[:TAG]; --store says where", code=USAGE)
    return reference.name, reference.tag


def judge(report: "VerifyReport", what: str, good: str) -> None:
    """Print what a verification found. Raises Problem if that was anything."""
    for trouble in report.problems:
        image = f" (image {trouble.image})" if trouble.image else ""
        print(clean(f"{trouble.key}: {trouble.reason}{image}"))
    if report.problems:
        raise Problem(f"{what}: {len(report.problems)} problems", hint="sf store verify --full --repair URL")
    print(f"{what}: {good}")
