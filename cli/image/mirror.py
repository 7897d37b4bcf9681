"""`sf mirror`: carry images for others, sign their names, serve them."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import imagestore
import imagestore.mirror
from cli.command import GIBIBYTES, STORE, Group, settings
from cli.errors import ERROR, Problem
from cli.image.stores import opened
from cli.output import confirm, progress, say, show_list, show_one, size, status, when

mirror = Group("mirror", needs=STORE, help="Carry images for others, sign their names, serve them.")
SYNCED = (
    ("image", "name"),
    ("result", "result"),
    ("new", lambda o: size(o["bytes"]) if o["bytes"] else ""),
    ("seconds", lambda o: o["seconds"] or ""),
    ("message", "message"),
)
STATUS = (
    ("store", "store"),
    ("fingerprint", "fingerprint"),
    ("published names", "names"),
    ("timestamp expires", lambda s: when(s["expires_s"]) if s["expires_s"] else ""),
    ("draft", "draft"),
    ("signers carried", "signers"),
    ("upstreams", lambda s: [_upstream(url, seen) for url, seen in s["upstreams"].items()]),
)
_SOME, _ANY = click.IntRange(1), click.FloatRange(0)
directory = click.Path(file_okay=False, path_type=Path)
keys_option = click.option("--keys", type=directory, help="Default: mirror/keys in the state directory.")


def _keyring(given: Path | None) -> "imagestore.mirror.Keyring":
    return imagestore.mirror.Keyring(given or settings().state_dir / "mirror" / "keys")


def _publisher(
    store: "imagestore.Store", keys: Path | None, root_keys: Path | None = None
) -> "imagestore.mirror.Publisher":
    return imagestore.mirror.Publisher(store, _keyring(keys), _keyring(root_keys) if root_keys else None)


def _publish(store: "imagestore.Store", keys: Path | None) -> None:
    """Checksums for all names, then their signatures; says what changed."""
    digests = sorted(set(store.names.images().values()))
    for number, digest in enumerate(digests, 1):
        with progress(f"{number}/{len(digests)}") as tell:
            imagestore.mirror.compute_sums(store, digest, tell)
    done = _publisher(store, keys).publish()
    counts = f"{len(done.added)} new, {len(done.changed)} changed, {len(done.removed)} gone"
    print(f"published version {done.version}: {counts}")


@mirror.add(examples="sf mirror init\nsf mirror init --root-keys 3 --threshold 2 --keys /media/safe")
@keys_option
@click.option("--root-keys", "root_keys", default=1, show_default=True, help="How many keys the root has.")
@click.option("--threshold", default=1, show_default=True, help="How many of them must sign a new root.")
def init(keys: Path | None, root_keys: int, threshold: int) -> None:
    """Make the store if there is none, keys and a first root."""
    ring = _keyring(keys)
    with opened(create=True) as store:
        fingerprint = imagestore.mirror.signing.init(store, ring, root_keys=root_keys, threshold=threshold)
    print(fingerprint)
    say(f"keys are in {ring.directory}: copy root*.pem elsewhere; clients need the fingerprint above")


@mirror.add(
    examples="""sf mirror sync
    sf mirror sync 'debian:*'
    sf mirror sync --from https://images.example/#b3:… 'debian:*'"""
)
@click.argument("patterns", nargs=-1)
@click.option("--from", "origin", metavar="URL", help="Another mirror instead of the source lists.")
@click.option("--sources", type=click.Path(path_type=Path), help="A source list or a directory of them.")
@click.option("--publish/--no-publish", default=True, help="Sign the names afterwards, if there are keys.")
@click.option("--dry-run", is_flag=True, help="Only show what would come from the source lists.")
@keys_option
def sync(
    patterns: tuple[str, ...], origin: str | None, dry_run: bool, force: bool, form: str, **given: Any
) -> None:
    """Bring the newest images of upstreams, or names of another mirror, into the store."""
    sources, ring = given["sources"], _keyring(given["keys"])
    if origin and (dry_run or sources):
        raise click.UsageError("--dry-run and --sources are of source lists, not of another mirror")
    with opened(create=True) as store:
        if origin:
            rows = _replicate(origin, store, patterns)
        else:
            if dry_run or not (patterns or sources):
                rows = _from_sources(store, sources, patterns, dry_run=True)
                new = [row for row in rows if row["result"] == "new"]
                say(f"{len(new)} of {len(rows)} images are new: {size(sum(r['bytes'] for r in new))}")
                if dry_run:
                    _show(rows, form)
                    return
                if new:
                    confirm("fetch them all?", force)
            rows = _from_sources(store, sources, patterns)
        if given["publish"] and (ring.directory / "fingerprint").exists():
            _publish(store, given["keys"])
    _show(rows, form)


def _from_sources(
    store: "imagestore.Store", given: Path | None, patterns: tuple[str, ...], *, dry_run: bool = False
) -> list[dict[str, Any]]:
    from imagestore.mirror import sync as sync_sources

    work = settings().state_dir / "mirror" / "downloads"
    lists = imagestore.mirror.sources.lists(str(given or settings().get("sources")))
    wanted = imagestore.mirror.sources.choose(
        lists, patterns, lambda source: [f"{source.name}:{tag}" for tag in source.tags]
    )
    return [_row(one) for one in sync_sources(store, wanted, work, dry_run=dry_run, progress=progress)]


def _row(one: "imagestore.mirror.Outcome") -> dict[str, Any]:
    return asdict(one) | {"bytes": one.new_bytes, "digest": str(one.digest or "")}


def _replicate(origin: str, store: "imagestore.Store", patterns: tuple[str, ...]) -> list[dict[str, Any]]:
    memory = settings().state_dir / "mirror" / "upstreams.json"
    try:
        with opened(origin) as source:
            rows = _copied(source, store, patterns)
    except (imagestore.Unavailable, imagestore.Denied) as error:
        imagestore.mirror.upstreams.note(memory, origin, str(error))
        raise
    imagestore.mirror.upstreams.note(memory, origin, "")
    return rows


def _copied(
    source: "imagestore.Store", target: "imagestore.Store", patterns: tuple[str, ...]
) -> list[dict[str, Any]]:
    from imagestore.mirror import replicate

    with status() as tell:
        return [_row(one) for one in replicate(source, target, patterns, report=tell)]


def _show(rows: list[dict[str, Any]], form: str) -> None:
    """What became of each. Raises Problem if any failed."""
    show_list(rows, SYNCED, form)
    bad = [row for row in rows if row["result"] == "failed"]
    if bad:
        hint = "the others are done" if len(bad) < len(rows) else "the reason is in each line"
        raise Problem(f"{len(bad)} of {len(rows)} failed", hint=hint, code=ERROR)


@mirror.add(examples="sf mirror export /media/disk 'debian:*'")
@click.argument("target", type=directory)
@click.argument("patterns", nargs=-1)
def export(target: Path, patterns: tuple[str, ...], form: str) -> None:
    """Write names, images and signatures to a directory; what is there already is not written again."""
    with opened() as store, opened(str(target.absolute()), create=True) as disk:
        rows = _copied(store, disk, patterns)
    _show(rows, form)


@mirror.add("import", examples="sf mirror import /media/disk")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("patterns", nargs=-1)
def import_(source: Path, patterns: tuple[str, ...], form: str) -> None:
    """Read names, images and signatures from a directory that export wrote."""
    with opened(create=True) as store, opened(str(source.absolute())) as disk:
        rows = _copied(disk, store, patterns)
    _show(rows, form)


@mirror.add(examples="sf mirror publish")
@keys_option
def publish(keys: Path | None) -> None:
    """Sign the names of the store as they are now, and make updates from what was signed before."""
    with opened() as store:
        _publish(store, keys)


@mirror.add(examples="sf mirror refresh")
@keys_option
def refresh(keys: Path | None) -> None:
    """Renew the timestamp that says "this is the newest"; needed at least every 7 days."""
    with opened() as store:
        print(f"valid until {when(_publisher(store, keys).refresh().timestamp())}")


@mirror.add(examples="sf mirror rotate timestamp\nsf mirror rotate root --root-keys /media/safe")
@click.argument("role", type=click.Choice(["root", "targets", "snapshot", "timestamp"]))
@keys_option
@click.option("--root-keys", type=directory, help="Where the root's keys are, if elsewhere.")
def rotate(role: str, keys: Path | None, root_keys: Path | None) -> None:
    """Give a role new keys, as many as it had, and sign with them; the old ones count no more."""
    with opened() as store:
        publisher = _publisher(store, keys, root_keys)
        print(f"root version {publisher.rotate(role)}")
        if publisher.published()[1] is not None:
            _publish(store, keys)


@mirror.add(examples="sf mirror adopt b3:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")
@click.argument("fingerprint")
@keys_option
def adopt(fingerprint: str, keys: Path | None) -> None:
    """Sign, as your own, what the signer with FINGERPRINT left behind in this store."""
    with opened() as store:
        signer = imagestore.Digest.parse(fingerprint)
        adopted = imagestore.mirror.adopt(store, _publisher(store, keys), signer)
        _publish(store, keys)
    for (name, tag, architecture), digest in adopted.items():
        print(f"{name}:{tag} {architecture} {digest}")


@mirror.add("status", examples="sf mirror status --format json")
@keys_option
def show_status(keys: Path | None, form: str) -> None:
    """What is published and until when, what is a draft, and since when an upstream is gone."""
    with opened() as store:
        drafts = store.names.images()
        try:
            fingerprint = str(_keyring(keys).fingerprint)
            published, expires = _publisher(store, keys).published()
        except imagestore.NotFound:
            fingerprint, published, expires = "", {}, None
        draft = sorted(f"{n}:{t} {a}" for (n, t, a), d in drafts.items() if published.get((n, t, a)) != d)
        row = {
            "store": store.url,
            "fingerprint": fingerprint,
            "names": len(published),
            "expires_s": expires.timestamp() if expires else None,
            "draft": draft,
            "signers": [str(signer) for signer in imagestore.mirror.signers(store)],
            "upstreams": imagestore.mirror.upstreams.read(settings().state_dir / "mirror" / "upstreams.json"),
        }
    show_one(row, STATUS, form, name="store")


def _upstream(url: str, seen: dict[str, Any]) -> str:
    if seen["gone_since_s"]:
        return f"{url}: gone since {when(seen['gone_since_s'])}: {seen['error']}"
    return f"{url}: seen {when(seen['seen_s'])}"


@mirror.add(
    examples="""sf mirror serve
    sf mirror serve --host 0.0.0.0 --port 8080 --store 's3://images/sf?region=eu-central-1'
    sf mirror serve --upstream https://images.example/#b3:… --keep 50G"""
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every address here.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--upstream", metavar="URL", help="Be a cache of this mirror instead of serving the store.")
@click.option("--keep", "--keep-gib", type=GIBIBYTES, default="20G", show_default=True, help="Of it.")
@click.option("--requests", type=_SOME, default=512, show_default=True, help="At once, in each process.")
@click.option("--rate", type=_ANY, default=0, show_default=True, help="Of an address a second; 0: any.")
@click.option(
    "--workers", type=_SOME, default=min(4, os.cpu_count() or 1), show_default=True, help="Processes."
)
def serve(host: str, port: int, upstream: str | None, workers: int, **limits: Any) -> None:
    """Serve the store to sf, to curl, qemu, LXD and Incus, and to people with a browser."""
    from imagestore.mirror import serve as serve_mirror

    if not upstream:
        with opened(create=settings().store_is_default) as store:
            store.check_public()
    told, kept = settings(), settings().state_dir / "mirror" / "pull-through"
    bounds = (limits[name] for name in ("keep", "requests", "rate"))
    options = imagestore.mirror.Options(told.store_url, upstream or "", str(kept), *bounds)
    say(f"serving {upstream or told.store_url} at http://{host}:{port}/")
    serve_mirror(options, host, port, workers)
