"""What `sf image push` does with a file or a URL."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.command import settings
from cli.errors import USAGE, Problem
from cli.image.stores import opened, written
from cli.output import Row, progress, say


class Source(click.Path):
    """A file that is there, or a web address as it stands."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(value) if "://" in str(value) else super().convert(value, param, ctx)


def keep(file: Path | str, text: str, architecture: str, alone: bool, **given: Any) -> Row:
    """Bring it into the store of the settings; the row that says what came. Raises Corrupt, Problem.

    given: checksum, labels, input_format, sparsify, update.
    """
    from imagestore import Corrupt, check_architecture, keep_buffers, push

    keep_buffers()
    (name, tag), machine = written(text), check_architecture(architecture)
    title = f"{name}:{tag}"
    shared, checksum = {"labels": given["labels"]}, given["checksum"]
    if isinstance(file, str):
        from imagestore.mirror import bring, sources

        if given["input_format"] or given["sparsify"] or given["update"]:
            what = "--input-format, --sparsify and --update are for files"
            raise Problem(what, hint="download it", code=USAGE)
        source = sources.of_url(file, name, tag, machine, checksum=checksum, **shared)
        with opened(name=text, create=True, alone=alone) as store, progress(title) as tell:
            say(f"from {file} to {store.url}")
            work = settings().cache_dir / "downloads"
            came = bring(store, source, machine, work, trusted=True, progress=tell)
        row: Row = {"result": came.result, "new_bytes": came.new_bytes, "digest": str(came.digest)}
        return {**row, "name": title, "architecture": machine}
    if checksum:
        from imagestore.mirror import hash_file, sources

        algorithm, digits = sources.parse_checksum(checksum)
        if hash_file(file, algorithm) != digits:
            raise Corrupt(f"{file}: its {algorithm} is not the one that was given")
    how = {**shared, "format_": given["input_format"]} | {key: given[key] for key in ("sparsify", "update")}
    with opened(name=text, create=True, alone=alone) as store, progress(title) as tell:
        say(f"from {file} to {store.url}")
        done = push(store, file, name, tag, architecture=machine, progress=tell, **how)
    return asdict(done) | {"name": title, "architecture": machine, "digest": str(done.digest)}
