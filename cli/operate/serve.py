"""`sf serve`, `sf agent` and `sf completion`."""

import click

import compute
from cli.command import Command, flag, kept, settings
from cli.errors import cleaned
from cli.output import say


def _log() -> None:
    """Lines for the journal; with --debug all of ours."""
    import logging

    level = logging.DEBUG if flag("debug") else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger().handlers[0].addFilter(cleaned)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@click.command(cls=Command, examples="sf serve\nsf serve --listen 127.0.0.1:13001 --store /srv/images")
@kept("--listen", metavar="HOST:PORT", help="Default: 127.0.0.1:13000.")
@kept("--store", metavar="URL", help="Where images are looked up first; default: the state directory's.")
@kept("--state", metavar="URL", help="etcd://H1:2379,H2:2379,H3:2379 to keep the records; default: a file.")
def serve() -> None:
    """Run the API and this machine's agent, as root, until Ctrl-C; guests go on running without it."""
    import asyncio

    from compute import serve as run

    _log()
    asyncio.run(run(compute.load(settings()), say))


@click.command(cls=Command, examples="sf agent --join https://10.0.0.1:13001 --token TOKEN\nsf agent")
@click.option("--join", "url", metavar="URL", help="The server to belong to, once; several as U1,U2.")
@click.option("--token", metavar="T", help="Single-use join token of that server.")
@kept("--name", "node_name", metavar="NAME", help="This node's name; default: the host's.")
def agent(url: str | None, token: str | None) -> None:
    """Run this machine as a node of a server elsewhere, as root, until Ctrl-C; guests go on without it."""
    import asyncio

    from compute import serve_agent

    _log()
    asyncio.run(serve_agent(compute.load(settings()), url or "", token or "", say))


@click.command(cls=Command, examples='eval "$(sf completion bash)"\nsf completion zsh > ~/.zfunc/_sf')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's completion script."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found
    sf = click.get_current_context().find_root().command
    print(found(sf, {}, "sf", "_SF_COMPLETE").source())
