"""`sf imaged`, the node's image service, and `sf cache`: this node's is asked by itself, others' through the API."""

from collections.abc import Iterator
from typing import Any

import click

import imagestore
from cli.cloud.api import Api
from cli.command import SIZE, Command, Group, kept, settings
from cli.errors import Problem
from cli.image.stores import ask, found, held_images, present
from cli.output import ago, say, show_list, size, status

ROWS = (
    ("digest", "digest"),
    ("disk", lambda row: size(row["size_bytes"])),
    ("held", lambda row: size(row["used_bytes"])),
    ("present", present),
    ("pinned", lambda row: "yes" if row["pinned"] else ""),
    ("used by", lambda row: len(row["readers"]) or ""),
    ("last used", lambda row: ago(row["used_s"])),
)

cache = Group("cache", help="Images that nodes hold.")


def digest_of(name: str, architecture: str) -> str:
    """What a name stands for: in a store, or (a digest) in this node's cache."""
    if digest := imagestore.parse_reference(name).digest:
        return str(digest)
    with found(name, architecture) as (_, _, digest):
        return str(digest)


_on = click.option(
    "--on", metavar="NODE|all", default="", help="A node by the server's records, or all of them."
)


def _each(on: str, method: str, **body: Any) -> Iterator[tuple[str, Any]]:
    """Nodes and their answers. Of all, those that do not answer are said, and at the end it is a Problem."""
    api, failed = Api(), None
    for node in [known["name"] for known in api("GET", "nodes")] if on == "all" else [on]:
        try:
            yield node, api(method, "nodes", node, "cache", **body)
        except Problem as problem:
            if on != "all":
                raise
            say(f"{node}: {problem}")
            failed = problem
    if failed:
        raise failed


@cache.add(examples="sf cache ls\nsf cache ls --on all")
@_on
def ls(on: str, form: str) -> None:
    """List the images on this node, or on others, and what part of each is present."""
    told = [{"node": node, **row} for node, held in _each(on, "GET") for row in held] if on else held_images()
    show_list(told, (("node", "node"), *ROWS) if on else ROWS, form, name="digest")


@cache.add(examples="sf cache prefetch debian:12\nsf cache prefetch debian:12 --on all")
@_on
def prefetch(name: str, architecture: str, on: str) -> None:
    """Bring a whole image to this node, or to others, in the background."""
    if not on:
        ask("prefetch", image=digest_of(name, architecture))
    for node, _ in _each(on, "POST", image=name, architecture=architecture) if on else ():
        say(f"{node} brings {name}")


@cache.add(examples="sf cache verify")
def verify() -> None:
    """Hash every image on this node again; what is damaged is removed, and fetched anew when it is used."""
    held = imagestore.ImageCache(settings().state_dir / "cache", {})
    images, bad = held.digests(), 0
    with status() as tell:
        for one in images:
            tell(f"verify {one}")
            try:
                held.verify(one)
            except imagestore.Corrupt as error:
                bad += 1
                print(error)
    if bad:
        raise Problem(f"{bad} of {len(images)} images were damaged")
    print(f"{len(images)} images, every byte is right")


def _about(word: str, text: str) -> None:
    """Make a command that asks the service for the operation of its name."""

    @cache.add(word, help=text, examples=f"sf cache {word} debian:12")
    def run(name: str, architecture: str) -> None:
        ask(word, image=digest_of(name, architecture))


_about("pin", "Keep an image on this node although nothing uses it.")
_about("unpin", "Let an image be forgotten when it is unused and room is needed.")


@cache.add(examples="sf cache prune\nsf cache prune --to 20G")
@click.option("--to", "limit", type=SIZE, default="0", help="What may stay beside what is in use or pinned.")
def prune(limit: int) -> None:
    """Forget unused images, least recently used first."""
    for digest in ask("prune", limit_bytes=limit):
        print(digest)


@click.command(cls=Command, examples="sf imaged\nsf imaged --fill-rate 20M --cache-size 100G")
@kept("--fill-rate", metavar="SIZE", help="Bytes a second for what nobody waits for; 0: no limit.")
@kept("--cache-size", metavar="SIZE", help="Forget unused images above this; 0: no limit.")
def imaged() -> None:
    """Run this node's image service in the foreground (`sf serve` and `sf agent` start their own)."""
    told = settings()
    imagestore.run_service(told.state_dir, tuple(told.stores.values()), imagestore.options_of(told))
