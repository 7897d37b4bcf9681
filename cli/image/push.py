"""What `sf image push` does with a file or a URL."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import imagestore
import imagestore.mirror
from cli.command import settings
from cli.errors import USAGE, Problem
from cli.image.stores import opened, written
from cli.output import Row, progress, say


def keep(
    file: str, text: str, machine: str, alone: bool = False, checksum: str = "", labels: Any = (), **how: Any
) -> Row:
    """Bring it into the store of the settings; the row that says what came. Raises Corrupt, Problem.

    how: format_, sparsify, update of a push.
    """
    from imagestore import push

    imagestore.keep_buffers()
    (name, tag), machine = written(text), imagestore.check_architecture(machine)
    title, labels = f"{name}:{tag}", dict(labels)
    if "://" in file:
        if any(how.values()):
            what = "--input-format, --sparsify and --update are for files"
            raise Problem(what, hint="download it", code=USAGE)
        source = imagestore.mirror.sources.of_url(file, name, tag, machine, checksum=checksum, labels=labels)
        with opened(name=text, create=True, alone=alone) as store, progress(title) as tell:
            say(f"from {file} to {store.url}")
            work = settings().cache_dir / "downloads"
            came = imagestore.mirror.bring(store, source, machine, work, trusted=True, progress=tell)
        return {**asdict(came), "name": title, "architecture": machine, "digest": str(came.digest)}
    if not Path(file).exists():  # before a store is made for it
        raise Problem(f"cannot read {file}: no such file", hint="FILE or URL", code=USAGE)
    if checksum:
        algorithm, digits = imagestore.mirror.sources.parse_checksum(checksum)
        if imagestore.mirror.hash_file(Path(file), algorithm) != digits:
            raise imagestore.Corrupt(f"{file}: its {algorithm} is not the one that was given")
    with opened(name=text, create=True, alone=alone) as store, progress(title) as tell:
        say(f"from {file} to {store.url}")
        done = push(store, Path(file), name, tag, architecture=machine, labels=labels, progress=tell, **how)
    return asdict(done) | {"name": title, "architecture": machine, "digest": str(done.digest)}


def keep_clean(source: Any, digest: Any, store: Any, *name: str, built: bool = False, **facts: Any) -> Row:
    """A cleaned copy of an image in another store; built: if its recipe was without errors. Raises Invalid."""
    from imagestore import pull, push

    imagestore.keep_buffers()
    say(f"from {source.url} to {store.url}")
    title = ":".join(name)
    with imagestore.durable.scratch("clean") as directory, progress(title) as tell:
        raw, was = directory / "disk.raw", source.manifest(digest)
        pull(source, digest, raw, format_="raw", durable=False, progress=tell)
        if built:
            imagestore.mirror.check_recipe(raw)
        gone = imagestore.mirror.clean(raw)
        facts |= {"architecture": was.architecture, "os_name": was.os}
        done = push(store, raw, *name, progress=tell, sparsify=True, format_="raw", **facts)
    say(f"{len(gone)} files are not in it, such as {', '.join(gone[:8])}")
    return asdict(done) | {"name": title, "digest": str(done.digest), "removed": gone}
