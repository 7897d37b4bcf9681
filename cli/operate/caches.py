"""`sf cache` where it may be about other nodes: their services are asked through the API."""

from collections.abc import Iterator
from typing import Any

import click

from cli.cloud.api import Api
from cli.errors import Problem
from cli.image.cache import ROWS, ask, cache, digest_of, rows
from cli.output import say, show_list

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
    told = [{"node": node, **row} for node, held in _each(on, "GET") for row in held] if on else rows()
    show_list(told, (("node", "node"), *ROWS) if on else ROWS, form, name="digest")


@cache.add(examples="sf cache prefetch debian:12\nsf cache prefetch debian:12 --on all")
@_on
def prefetch(name: str, architecture: str, on: str) -> None:
    """Bring a whole image to this node, or to others, in the background."""
    if not on:
        ask("prefetch", image=digest_of(name, architecture))
    for node, _ in _each(on, "POST", image=name, architecture=architecture) if on else ():
        say(f"{node} brings {name}")
