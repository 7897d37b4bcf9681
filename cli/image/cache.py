"""`sf imaged`, the node's image service, and those commands of `sf cache` that ask it alone."""

import asyncio
from typing import Any

import click

import imagestore
from cli.command import DURATION, SIZE, Command, Group, kept, settings
from cli.errors import Problem
from cli.image.stores import found
from cli.output import ago, size, status

ROWS = (
    ("digest", "digest"),
    ("disk", lambda row: size(row["size_bytes"])),
    ("held", lambda row: size(row["used_bytes"])),
    ("present", lambda row: present(row)),
    ("pinned", lambda row: "yes" if row["pinned"] else ""),
    ("used by", lambda row: len(row["readers"]) or ""),
    ("last used", lambda row: ago(row["used_s"])),
)

_TOP = ("image", "present", "clients", "from", "a second", "waited")

cache = Group("cache", help="Images that nodes hold.")


def present(row: dict[str, Any]) -> str:
    if row["complete"]:
        return "100%"
    data = row.get("data_bytes")
    return f"{100 * row['present_bytes'] / data:.0f}%" if data else "a part"


def ask(op: str, **arguments: Any) -> Any:
    client = imagestore.ControlClient(imagestore.control_socket(settings().state_dir))
    return asyncio.run(client.ask(op, **arguments))


def rows() -> list[dict[str, Any]]:
    """What the service says, or without one what its directory says."""
    try:
        told: list[dict[str, Any]] = ask("ls")["images"]
    except imagestore.Unavailable:
        told = imagestore.list_images(settings().state_dir / "cache")
    return told


def digest_of(name: str, architecture: str) -> str:
    """What a name stands for: in a store, or (a digest) in this node's cache."""
    if digest := imagestore.parse_reference(name).digest:
        return str(digest)
    with found(name, architecture) as (_, _, digest):
        return str(digest)


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


@cache.add(examples="sf cache top")
@click.option("--every", "interval_s", type=DURATION, default="1s", show_default=True)
def top(interval_s: float) -> None:
    """Watch images arrive, until Ctrl-C."""
    import time

    from rich.live import Live
    from rich.table import Table

    last, interval_s = dict[str, int](), max(interval_s, 0.1)
    with Live(auto_refresh=False) as live:
        while True:
            table = Table(*_TOP, box=None, pad_edge=False)
            for row in rows():
                received = row.get("received", {})
                total = sum(received.values())
                rate = (total - last.get(row["digest"], total)) / interval_s
                last[row["digest"]] = total
                clients = str(sum(e["clients"] for e in row.get("exports", {}).values()))
                came = " ".join(f"{kind} {size(count)}" for kind, count in sorted(received.items()))
                pace = (size(rate) if rate else "", f"{row.get('waited_s', 0):.1f} s")
                table.add_row(row["digest"][:15], present(row), clients, came, *pace)
            live.update(table, refresh=True)
            time.sleep(interval_s)


@click.command(cls=Command, examples="sf imaged\nsf imaged --fill-rate 20M --cache-size 100G")
@kept("--fill-rate", metavar="SIZE", help="Bytes a second for what nobody waits for; 0: no limit.")
@kept("--cache-size", metavar="SIZE", help="Forget unused images above this; 0: no limit.")
@click.option("--user", default="", metavar="NAME", help="Give up root and become this user.")
@click.option("--group", default="", metavar="NAME", help="Who may connect besides: qemu's, such as kvm.")
def imaged(user: str, group: str) -> None:
    """Run this node's image service in the foreground (`sf serve` and `sf agent` start their own)."""
    told = settings()
    stores, options = tuple(told.stores.values()), imagestore.options_of(told)
    imagestore.run_service(told.state_dir, stores, options, user=user, group=group)
