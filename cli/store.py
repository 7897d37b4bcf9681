"""`sf store`, `sf cache` and `sf remote`."""

from typing import TYPE_CHECKING

import click

import imagestore.errors
from cli.command import STORE, Group, settings
from cli.errors import Problem
from cli.output import say, show_list, status
from cli.settings import add_remote, remove_remote

if TYPE_CHECKING:
    from imagestore.cache import ImageCache

REMOTES = (("name", "name"), ("url", "url"))

store = Group("store", needs=STORE, help="Make, check and copy image stores.")
cache = Group("cache", help="Images that this node holds.")
remote = Group("remote", help="Other stores to look names up in.")


@store.add(examples="sf store init /srv/images\nsf store init 's3://images/sf?region=eu-central-1'")
@click.argument("url", required=False)
def init(url: str | None, single_writer: bool) -> None:
    """Make an empty store at URL."""
    from imagestore.open import open_store

    made = open_store(url or settings().store_url, create=True, single_writer=single_writer)
    print(f"{made.url} {made.info.id}")
    made.backend.close()


def _cache() -> "ImageCache":
    from imagestore.cache import ImageCache

    return ImageCache(settings().state_dir / "cache", {})


@cache.add("verify", examples="sf cache verify")
def cache_verify() -> None:
    """Hash every image on this node again; what is damaged is removed, and fetched anew when it is used."""
    held = _cache()
    images, bad = held.list(), 0
    with status() as tell:
        for one in images:
            tell(f"verify {one.digest}")
            try:
                held.verify(one.digest)
            except imagestore.errors.Corrupt as error:
                bad += 1
                print(error)
    if bad:
        raise Problem(f"{bad} of {len(images)} images were damaged")
    print(f"{len(images)} images, every byte is right")


@remote.add(examples="sf remote ls")
def ls(form: str) -> None:
    """List remotes in the order in which they are asked."""
    named = [{"name": name, **values} for name, values in settings().remotes.items()]
    show_list([{"name": "local", "url": settings().store_url}, *named], REMOTES, form)


@remote.add(examples="sf remote add official https://images.example/")
@click.argument("url")
def add(name: str, url: str) -> None:
    """Ask the store at URL too, after those that are there."""
    from imagestore.open import open_backend

    open_backend(url).close()
    say(f"{name} is in {add_remote(name, {'url': url})}")


@remote.add(examples="sf remote rm official")
def rm(name: str) -> None:
    """Forget a remote; what was pulled from it stays."""
    say(f"{name} is out of {remove_remote(name)}")
