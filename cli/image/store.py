"""`sf store` and `sf remote`."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

import imagestore
from cli.command import MEBIBYTES, STORE, Group, settings
from cli.errors import USAGE, Problem
from cli.image.stores import judge, opened, written
from cli.output import progress, say, show_list, show_one, size, status
from cli.settings import add_remote, forget

STATS = (
    ("store", "name"),
    ("images hold", lambda s: size(s["logical_bytes"])),
    ("different bytes", lambda s: size(s["unique_bytes"])),
    ("stored, in use", lambda s: size(s["used_bytes"])),
    ("stored, in all", lambda s: f"{size(s['objects_bytes'])} in {s['objects']} objects"),
)
IMAGES = (
    ("name", "name"),
    ("data", lambda i: size(i["data_bytes"])),
    ("stored", lambda i: size(i["stored_bytes"])),
    ("deleting frees", lambda i: size(i["own_bytes"])),
    ("digest", "digest"),
)
REMOTES = (("name", "name"), ("url", "url"), ("state", "state"))

store = Group("store", needs=STORE, help="Make, check and copy image stores.")
remote = Group("remote", help="Other stores to look names up in.")


@store.add(examples="sf store init /srv/images\nsf store init 's3://images/sf?region=eu-central-1'")
@click.argument("url", required=False)
@click.option("--private", is_flag=True, help="Never to be published or served as a mirror.")
def init(url: str | None, single_writer: bool, private: bool) -> None:
    """Make an empty store at URL."""
    backend = imagestore.open_backend(url or settings().store_url)
    made = imagestore.Store.init(backend, single_writer=single_writer, private=private)
    print(f"{made.url} {made.info.id}")
    backend.close()


@store.add(examples="sf store stats\nsf store stats --format json")
def stats(form: str) -> None:
    """How much a store holds, and for each image what deleting it would free."""
    with opened() as found:
        told = imagestore.store_stats(found)
    row = {**asdict(told), "name": found.url}
    row["images"] = [{**i, "digest": str(i["digest"]), "name": " ".join(i["names"])} for i in row["images"]]
    show_one(row, STATS, form)
    if form == "table":
        show_list(row["images"], IMAGES, form)


@store.add(
    examples="""sf store verify
    sf store verify --full --rate-limit 50
    sf store verify --full --repair-from /mnt/copy
    sf store verify --full --repair-from debian-12.qcow2"""
)
@click.option("--full", is_flag=True, help="Read and hash every byte, not only the structure.")
@click.option("--rate-limit", type=MEBIBYTES, default="0", help="Most in a second; a number: MiB.")
@click.option("--repair-from", "other", metavar="URL|FILE", help="Mend with a store, or the disk pushed.")
@click.option("--repair", "older", hidden=True)
def verify(full: bool, rate_limit: int, other: str | None, older: str | None, single_writer: bool) -> None:
    """Check a store; exit 1 when anything is wrong."""
    other = other or older
    with opened(alone=single_writer) as found, progress("store") as tell:
        report = imagestore.verify_store(found, full=full, bytes_s=rate_limit, progress=tell)
        if other and report.problems:
            with nullcontext(Path(other)) if Path(other).is_file() else opened(other) as source:
                report = imagestore.repair(found, report, source, full=full)
    mended = f", {report.repaired} objects mended" if report.repaired else ""
    read = f"every byte of {size(report.checked_bytes)} is right" if full else "the structure is right"
    judge(report, found.url, f"{read} ({report.images} images, {report.packs} packs{mended})")


@store.add(examples="sf store copy /srv/images 's3://images/sf?region=eu-central-1' debian:12 debian:13")
@click.argument("source")
@click.argument("target")
@click.argument("images", nargs=-1, metavar="[NAME...]")
def copy(source: str, target: str, images: tuple[str, ...], single_writer: bool) -> None:
    """Copy images (default: all) from store to store, sending only what is missing."""
    with opened(source) as old, opened(target, create=True, write=True, alone=single_writer) as new:
        records = [old.names.get(*written(text)) for text in images] if images else list(old.names.list())
        with status() as tell:
            for record in records:
                tell(f"copy {record.name}:{record.tag}")
                count = imagestore.copy_name(old, new, record)
                print(f"{record.name}:{record.tag} {size(count)} written", flush=True)


@remote.add(examples="sf remote ls")
def ls(form: str) -> None:
    """List remotes in the order in which they are asked, and what is wrong with those that cannot be."""
    from concurrent.futures import ThreadPoolExecutor

    found = settings().stores
    default = settings().store_url if settings().store_is_default else ""
    with ThreadPoolExecutor(8) as pool:
        states = pool.map(partial(_state, default), found.values())
        rows = [{"name": n, "url": u, "state": s} for (n, u), s in zip(found.items(), states, strict=True)]
    show_list(rows, REMOTES, form)


def _state(default: str, url: str) -> str:
    try:
        with opened(url):
            return "ok"
    except imagestore.StoreError as error:
        return "not made yet" if isinstance(error, imagestore.NotFound) and url == default else str(error)


@remote.add(
    examples="""sf remote add official https://images.example/ --fingerprint b3:9f86d081…
    sf remote add lab s3://images/sf --unsigned"""
)
@click.argument("url")
@click.option("--fingerprint", metavar="b3:…", help="Of the signer, as `sf mirror init` printed it.")
@click.option("--root", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its 1.root.json.")
@click.option("--unsigned", is_flag=True, help="Believe whoever serves it, without a signature.")
def add(name: str, url: str, fingerprint: str | None, root: Path | None, unsigned: bool) -> None:
    """Ask the store at URL too, after those that are there."""
    if root:
        of_root = str(imagestore.Digest.of(root.read_bytes()))
        if fingerprint not in (None, of_root):
            raise Problem(
                f"{root} is not of {fingerprint}, but of {of_root}", hint="whose is right?", code=USAGE
            )
        fingerprint = of_root
    if fingerprint:
        url = f"{url}#{imagestore.Digest.parse(fingerprint)}"
        imagestore.open_store(url).backend.close()
    elif not unsigned and not url.startswith(("/", "file:")):
        hint = "--fingerprint b3:… of its signer, or --unsigned if you believe whoever serves it"
        raise Problem(f"{url} may be anybody's", hint=hint, code=USAGE)
    else:
        imagestore.open_backend(url).close()
    say(f"{name} is in {add_remote(name, url)}")


@remote.add(examples="sf remote rm official")
def rm(name: str) -> None:
    """Forget a remote; what was pulled from it stays."""
    say(f"{name} is out of {forget('remote', name)}")
