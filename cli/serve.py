"""`sf serve` and `sf completion`."""

import click

from cli.command import Command, settings
from cli.output import say


@click.command(cls=Command, examples="sf serve\nsf serve --listen 127.0.0.1:13001 --store /srv/images")
@click.option("--listen", metavar="HOST:PORT", help="Default: 127.0.0.1:13000.")
@click.option(
    "--store", metavar="URL", help="Where images are looked up first; default: the state directory's."
)
def serve(listen: str | None, store: str | None) -> None:
    """Run the API and this machine's agent, as root, until Ctrl-C; guests go on running without it."""
    import asyncio
    import logging

    from compute.config import load
    from compute.serve import serve as run

    level = logging.DEBUG if settings().flags.get("debug") else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    asyncio.run(run(load(listen=listen, store=store), say))


@click.command(cls=Command, examples='eval "$(sf completion bash)"\nsf completion zsh > ~/.zfunc/_sf')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's completion script."""
    from click.shell_completion import get_completion_class

    from cli.main import sf

    found = get_completion_class(shell)
    assert found
    print(found(sf, {}, "sf", "_SF_COMPLETE").source())
