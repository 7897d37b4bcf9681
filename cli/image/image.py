"""`sf image`: disk images in a store. Needs no server."""

import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

import imagestore
from cli.command import DURATION, STORE, Group, pairs, settings
from cli.errors import MISSING, USAGE, Problem
from cli.image.push import keep, keep_clean
from cli.image.stores import found, held_images, home, judge, opened, present, written
from cli.output import ago, confirm, progress, say, show_list, show_one, size, when

COLUMNS = (
    ("name", "name"),
    ("arch", "architecture"),
    ("size", lambda i: size(i.get("size_bytes"))),
    ("digest", "digest"),
    ("here", "present"),
    ("changed", lambda i: "removed" if i.get("removed") else ago(i.get("modified_s"))),
)
FIELDS = (
    *COLUMNS,
    ("data", lambda i: f"{size(i['data_bytes'])} in {i['chunks']} chunks"),
    ("stored", lambda i: f"{size(i['stored_bytes'])} in {i['packs']} packs, shared with other images"),
    ("os", "os"),
    ("labels", lambda i: [f"{k}={v}" for k, v in i["labels"].items()]),
    ("source", lambda i: [f"{k}: {v}" for k, v in i["source"].items()]),
    ("parent", "parent"),
    ("from former", lambda i: [f"{size(cost)} from {base}" for base, cost in i["updates"].items()]),
    ("disk id", "disk_id"),
    ("store", "store"),
)
HISTORY = (
    ("revision", "revision"),
    ("changed", lambda c: when(c["at_s"])),
    ("images", lambda c: "removed" if c["removed"] else [f"{a} {d}" for a, d in c["images"].items()]),
)
PUSHED = (
    ("name", "name"),
    ("digest", "digest"),
    ("read", lambda r: size(r["read_bytes"])),
    ("new", lambda r: size(r["new_bytes"])),
    ("already there", lambda r: size(r["known_bytes"])),
    ("written", lambda r: size(r["written_bytes"])),
    ("from former", lambda r: size(r["update_bytes"]) if r["update_bytes"] else ""),
    ("notes", "notes"),
)


def doubt(count: int, mended: bool) -> str:
    if not count or mended:
        return f"{count}, whose grace begins now" if count else ""
    return f"{count}: the store's clock was wrong once; sf image gc --mend-times"


COLLECTED = (
    ("images", "images"),
    ("in use", lambda r: size(r["used_bytes"])),
    ("freed", lambda r: f"{size(r['freed_bytes'])} in {r['deleted_packs']} packs"),
    ("after the grace", lambda r: f"{size(r['waiting_bytes'])} in {r['waiting_packs']} packs"),
    ("written anew", lambda r: f"{size(r['copied_bytes'])} out of {r['repacked_packs']} packs"),
    ("tombstones gone", "deleted_names"),
    ("times in doubt", lambda r: doubt(r["doubtful_times"], r["mend_times"])),
    ("", lambda r: "nothing was changed (--dry-run)" if r["dry_run"] else ""),
)
SUFFIXES = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2", ".qcow": "qcow2"}
BROUGHT = (("name", "name"), ("digest", "digest"), ("written", lambda r: size(r["written_bytes"])))
FETCHED = (*BROUGHT[:2], ("result", "result"), ("new", lambda r: size(r["new_bytes"])))
PULLED = (("file", "output"), ("name", "name"), ("digest", "digest"))

image = Group("image", needs=STORE, help="Push, pull and manage disk images.")
image.lazy["warm"] = ("cli.cloud.run:warm", "Have guests of an image resume instead of boot.")
image.lazy["build"] = ("cli.cloud.run:build", "Make an image by a recipe of cloud-init.")
path = click.Path(dir_okay=False, path_type=Path)


@image.add(
    examples="""sf image push debian-12.qcow2 debian:12
    sf image push disk.qcow2 my/x:1
    sf image push https://cloud.example/x.qcow2.xz x:1 --checksum sha256:…
    sf image push disk.raw shop:2026-11 --label team=shop --store 's3://images/sf?region=eu-central-1'"""
)
@click.argument("file", metavar="FILE|URL")
@click.argument("name")
@click.option("--checksum", default="", metavar="sha256:…", help="What FILE must have.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--input-format", "format_", type=click.Choice(["raw", "qcow2", "vmdk", "vhdx", "vdi", "vhd"]))
@click.option("--sparsify", is_flag=True, help="Leave out the blocks of deleted files (ext4).")
@click.option("--update/--no-update", default=None, help="Also make the step from the former version.")
def push(file: str, name: str, architecture: str, single_writer: bool, form: str, **given: Any) -> None:
    """Keep the disk in FILE under NAME[:TAG]: qcow2, raw, VMDK, VHDX, VDI, fixed VHD, or one of these in an OVA, or
    compressed (xz, gzip, zstd, bzip2).

    A URL is fetched again only when its server has another file; without --checksum, one that lies beside it counts.
    """
    given["labels"] = pairs(given["labels"])
    row = keep(file, name, architecture, single_writer, **given)
    show_one(row, FETCHED if "://" in file else PUSHED, form)


@image.add(
    examples="""sf image pull debian:12 -o copy.qcow2
    sf image pull official/debian:12 -o /dev/vg/web
    sf image pull official/debian:12"""
)
@click.option("-o", "--output", type=path, help="A file, a device or -; default: the local store.")
@click.option("--as", "kind", type=click.Choice(["qcow2", "raw"]), help="Default: by the suffix, else raw.")
@click.option("--seed", "seeds", multiple=True, metavar="NAME=FILE", help="Take equal parts from a raw disk.")
@click.option("--force", is_flag=True, help="Do not ask before a device is written.")
def pull(name: str, architecture: str, form: str, output: Path | None, force: bool, **given: Any) -> None:
    """Write an image to a file or a device, or bring it here from another store."""
    from imagestore import pull as pull_image

    imagestore.keep_buffers()
    if output is None:
        if given["kind"] or given["seeds"]:
            raise click.UsageError("--as and --seed are of an --output")
        _bring(name, architecture, form)
        return
    seeds: list[imagestore.Seed] = []
    for image_name, file in pairs(given["seeds"]).items():
        if not (Path(file).is_file() or Path(file).is_block_device()):
            raise Problem(f"no raw disk to take parts from: {file}", hint="--seed NAME=FILE", code=USAGE)
        with found(image_name, architecture) as (store, _, digest):
            seeds.append(imagestore.Seed(store.manifest(digest), Path(file)))
    stream, device = str(output) == "-", output.is_block_device()
    kind = given["kind"] or ("raw" if stream or device else SUFFIXES.get(output.suffix))
    if not kind:
        raise Problem(f"what is {output} to be?", hint="--as qcow2, or --as raw", code=USAGE)
    if stream and sys.stdout.isatty():
        raise Problem("a disk does not go to a terminal", hint=f"sf image pull {name} -o - | …", code=USAGE)
    confirm(f"overwrite what is on {output} with {name}?", force or not device)
    with found(name, architecture) as (store, full, digest), ExitStack() as stack:
        # What arrives in any order leaves in its own.
        whole = stack.enter_context(imagestore.durable.scratch("pull")) / "disk" if stream else output
        with progress(name) as tell:
            result = pull_image(store, digest, whole, format_=kind, progress=tell, seeds=seeds)
        if stream:
            shutil.copyfileobj(stack.enter_context(whole.open("rb")), sys.stdout.buffer, 1 << 20)
            return
    row = {"name": full, "output": str(output), "format": kind, **asdict(result), "digest": str(digest)}
    show_one(row, PULLED, form, name="output")


def _bring(name: str, architecture: str, form: str) -> None:
    here = opened(name="any", create=True, write=True)
    with found(name, architecture) as (source, full, digest), here as store:
        if not full:
            raise Problem(f"{name} has no name to keep it here", hint="NAME[:TAG][@b3:DIGEST]", code=USAGE)
        count = 0
        if source.url != store.url:
            say(f"from {source.url} to {store.url}")
            record = replace(source.names.get(*written(full)), images={architecture: digest})
            count = imagestore.copy_name(source, store, record)
    show_one({"name": full, "digest": str(digest), "written_bytes": count}, BROUGHT, form)


@image.add(examples="sf image ls\nsf image ls official\nsf image ls my\nsf image ls --format json")
@click.argument("remote", required=False)
@click.option("--removed", is_flag=True, help="Those that undelete can bring back, too.")
def ls(remote: str | None, form: str, removed: bool) -> None:
    """List images of the local store, of a remote, or what a namespace keeps (`my`: the current one)."""
    here = dict[str, str]()  # what part of which image this node holds
    if (settings().state_dir / "cache").is_dir():
        here = {row["digest"]: present(row) for row in held_images()}
    place = (remote or home() or "local").rstrip("/")
    url = settings().stores.get(place, "")
    name, make = "" if url else f"{place}/any", not remote and settings().store_is_default
    with opened(url, name=name, create=make) as store:
        records = list(store.names.list(removed=removed, lenient=True))
        wanted = {digest for record in records for digest in record.images.values()}
        sizes = store.sizes(wanted) if form != "name" else {}
        rows = [
            {
                "name": f"{r.name}:{r.tag}",
                "architecture": architecture,
                "digest": str(digest),
                "size_bytes": sizes.get(digest),
                "present": here.get(str(digest), ""),
                "removed": r.removed,
                "modified_s": r.modified_s,
            }
            for r in records
            for architecture, digest in r.images.items()
        ]
    show_list(rows, COLUMNS, form)


@image.add(examples="sf image show debian:12\nsf image show debian:12 --format json")
def show(name: str, architecture: str, form: str) -> None:
    """Show an image: its digest, its size, its labels and where it came from."""
    with found(name, architecture) as (store, full, digest):
        manifest, layout = store.manifest(digest), store.layout(digest)
        steps = imagestore.read_steps(store, digest)
    row = {
        "name": full,
        "digest": str(digest),
        "architecture": manifest.architecture,
        "size_bytes": manifest.size_bytes,
        "data_bytes": manifest.data_bytes,
        "stored_bytes": int(layout.frames["size"].sum()),
        "chunks": len(manifest.lengths),
        "packs": len(layout.packs),
        "os": manifest.os,
        "labels": dict(manifest.labels),
        "source": dict(manifest.source),
        "parent": str(manifest.parent or ""),
        "disk_id": str(manifest.disk_id),
        "updates": {str(base): step.size_bytes for base, step in steps.items()},
        "store": store.url,
    }
    show_one(row, FIELDS, form)


@image.add(examples="sf image verify debian:12")
def verify(name: str, architecture: str) -> None:
    """Read every byte of an image and check it; exit 1 when anything is wrong."""
    with found(name, architecture) as (store, full, digest), progress(name) as tell:
        report = imagestore.verify_image(store, digest, progress=tell)
    judge(report, f"{full} {digest}".strip(), "every byte is right")


@image.add(examples="sf image publish my/web-20261128t101500z golden:3")
@click.argument("new")
def publish(name: str, new: str, architecture: str, single_writer: bool, form: str) -> None:
    """Keep a cleaned copy of an image for everybody: without machine-id, host keys, logs, users' keys and what was
    deleted. Only ext4 is cleaned; `sf mirror publish` signs.
    """
    target, into = written(new), opened(create=True, write=True, alone=single_writer)
    with found(name, architecture) as (source, _, digest), into as store:
        store.check_public()
        row = keep_clean(source, digest, store, *target)
    show_one(row, PUSHED, form)


@image.add(examples="sf image tag debian:12 debian:stable")
@click.argument("new")
def tag(name: str, new: str, architecture: str, single_writer: bool) -> None:
    """Give an image of the store another name as well."""
    target, machine = written(new), imagestore.check_architecture(architecture)
    into = opened(name=new, write=True, alone=single_writer)
    with found(name, machine) as (source, full, digest), into as store:
        if source.url != store.url:
            hint = f"sf store copy {source.url} {store.url} {full or 'NAME'} brings it here"
            raise Problem(f"{name} is in {source.url}, not in {store.url}", hint=hint, code=MISSING)
        imagestore.tag(store, digest, *target, machine)
    print(f"{':'.join(target)} {digest}")


def _remove(names: tuple[str, ...], architecture: str | None, alone: bool) -> None:
    for text in names:
        with opened(name=text, write=True, alone=alone) as store:
            store.freeing(partial(store.names.remove, *written(text), architecture))
            say(f"{text} removed (sf image undelete {text} brings it back until gc has run)")


@image.add(examples="sf image rm debian:11")
def rm(names: tuple[str, ...], single_writer: bool) -> None:
    """Remove names; what no name needs any more goes with gc, after its grace."""
    _remove(names, None, single_writer)


@image.add(examples="sf image untag debian:12 --only aarch64")
@click.option("--only", metavar="ARCH", help="The other architectures of the name stay.")
def untag(name: str, single_writer: bool, only: str | None) -> None:
    """Remove a name, or one architecture of it."""
    _remove((name,), only, single_writer)


@image.add(examples="sf image undelete debian:11")
def undelete(name: str, single_writer: bool) -> None:
    """Bring back a name that was removed, as long as gc has not collected it."""
    with opened(name=name, write=True, alone=single_writer) as store:
        record = imagestore.undelete(store, *written(name))
    print(" ".join([f"{record.name}:{record.tag}", *map(str, record.images.values())]))


@image.add(examples="sf image history debian:12")
def history(name: str, form: str) -> None:
    """What a name stood for, newest first."""
    with opened(name=name) as store:
        changes = store.names.history(*written(name))
    rows = [asdict(c) | {"images": {a: str(d) for a, d in c.images.items()}} for c in changes]
    show_list(rows, HISTORY, form, name="revision")


@image.add(examples="sf image gc --dry-run\nsf image gc --grace 2h")
@click.option("--dry-run", is_flag=True, help="Only say what a run would do.")
@click.option("--grace", "grace_s", type=DURATION, default="24h", show_default=True, help="For caches.")
@click.option(
    "--repack-threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="SHARE"
)
@click.option("--mend-times", is_flag=True, help="What bears a time yet to come begins its grace now.")
def gc(form: str, single_writer: bool, **given: Any) -> None:
    """Free what no image needs; packs of which more than SHARE is unused are written anew."""
    if home():
        why = "what a namespace keeps, the server collects"
        raise Problem(why, hint="--store URL for another", code=USAGE)
    with opened(alone=single_writer) as store:
        report = imagestore.collect(store, **given)
    show_one({**asdict(report), "mend_times": given["mend_times"], "name": store.url}, COLLECTED, form)


@image.add(examples="sf image trace debian:12")
def trace(name: str, architecture: str) -> None:
    """Keep in the store what boots on this node read first, for the next node's first boot of the image."""
    with found(name, architecture) as (store, full, digest):
        path = settings().state_dir / "cache" / "traces" / digest.hex()
        if not path.exists():
            raise Problem(f"no boot of {full} was traced on this node", hint="boot it once", code=MISSING)
        boots = imagestore.Trace.decode(data := path.read_bytes()).boots
        store.check_writable()
        store.backend.put(imagestore.TRACES.key(digest), data)
    print(f"{full} {digest}: a trace of {boots:g} boots")
