"""From what a person typed to an open store, an image in it, a name to write; and what this node holds of images."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import imagestore
from cli.command import settings
from cli.errors import USAGE, Problem, clean


@contextmanager
def opened(
    url: str = "", *, name: str = "", create: bool = False, write: bool = False, alone: bool = False
) -> Iterator["imagestore.Store"]:
    """The store at `url`, by default that of the settings, or of the namespace before the slash of an image's name.

    Closed at the end. alone: --single-writer.
    """
    from cli.settings import own_store

    of = (imagestore.parse_reference(name).remote or home()) if name and written(name) else ""
    url, ca = own_store(settings(), of) if of else (url or settings().store_url, "")
    store = imagestore.open_store(url, create=create and not of, single_writer=alone, ca=ca)
    try:
        if write:
            store.check_writable()
        yield store
    finally:
        store.backend.close()


def home() -> str:
    """`my` where a context is in use and no store was named: there a bare name is the current namespace's."""
    from cli.settings import contexts

    told = settings()
    named = told.flags.get("store") or told.environment.get("SF_STORE")
    return "" if named or told.get("context") not in contexts(told) else "my"


@contextmanager
def found(text: str, architecture: str) -> Iterator[tuple["imagestore.Store", str, "imagestore.Digest"]]:
    """Look an image up in the stores of the settings: its store, its name ("" for a digest alone), its digest."""
    with ExitStack() as stack:
        stores = {n: partial(stack.enter_context, opened(url)) for n, url in settings().stores.items()}
        if (of := imagestore.parse_reference(text).remote or home()) and of not in stores:
            stores = {of: partial(stack.enter_context, opened(name=f"{of}/any")), **stores}
        image = imagestore.resolve(text, architecture, stores)
        yield image.store, image.name, image.digest


def written(text: str) -> tuple[str, str]:
    """The name and tag of what is to be written: no remote and no digest."""
    reference = imagestore.parse_reference(text)
    if reference.remote in settings().stores or reference.digest_prefix:
        hint = "[my/]NAME[:TAG]; --store says where"
        raise Problem(f"not a name to write to: {text!r}", hint=hint, code=USAGE)
    return reference.name, reference.tag


def judge(report: "imagestore.VerifyReport", what: str, good: str) -> None:
    """Print what a verification found. Raises Problem if that was anything."""
    for trouble in report.problems:
        image = f" (image {trouble.image})" if trouble.image else ""
        print(clean(f"{trouble.key}: {trouble.reason}{image}"))
    if report.problems:
        hint = "sf store verify --repair-from URL|FILE"
        raise Problem(f"{what}: {len(report.problems)} problems", hint=hint)
    print(f"{what}: {good}")


def present(row: dict[str, Any]) -> str:
    """What part of an image is on a node."""
    if row["complete"]:
        return "100%"
    data = row.get("data_bytes")
    return f"{100 * row['present_bytes'] / data:.0f}%" if data else "a part"


def ask(op: str, **arguments: Any) -> Any:
    """Of this node's image service. Raises Unavailable."""
    import asyncio

    client = imagestore.ControlClient(imagestore.control_socket(settings().state_dir))
    return asyncio.run(client.ask(op, **arguments))


def held_images() -> list[dict[str, Any]]:
    """What the service says, or without one what its directory says."""
    try:
        told: list[dict[str, Any]] = ask("ls")["images"]
    except imagestore.Unavailable:
        told = imagestore.list_images(settings().state_dir / "cache")
    return told
