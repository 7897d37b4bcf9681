"""`sf serve` and `sf agent`, and `sf state`: the server's own records, kept elsewhere and put back."""

from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import click

import compute
from cli.command import Command, Group, flag, kept, settings
from cli.errors import MISSING, Problem, cleaned
from cli.output import confirm, say, show_list, show_one, size, status, when

COLUMNS = (
    ("name", "name"),
    ("made", lambda row: when(row["made_s"])),
    ("size", lambda row: size(row["size_bytes"])),
    ("guests", "instances"),
    ("of earlier versions", "upgrade"),
    ("what is wrong", "trouble"),
)
where = click.argument("where", metavar="FILE|STORE")


def _back_up(where: str) -> Any:
    config = compute.load(settings())
    records = compute.open_state(config) if config.state else None
    return compute.back_up_state(config.state_dir, where, records=records)


state = Group("state", help="The server's own records, kept elsewhere and put back.")


@state.add(examples="sf state backup /mnt/usb/sf.state\nsf state backup 's3://home/sf?region=eu-central-1'")
@where
def backup(where: str, form: str) -> None:
    """Write the state into a file or a store, beside a running server, and read it again from there.

    It holds every key of this installation: who can read it is root here.
    """
    with status() as tell:
        tell(f"{settings().get('state') or settings().state_dir} to {where}")
        made = _back_up(where)
    show_one(asdict(made), COLUMNS, form)


@state.add(examples="sf state check\nsf state check 's3://home/sf?region=eu-central-1'")
@click.argument("where", metavar="[FILE|STORE]", default="")
def check(where: str, form: str) -> None:
    """Read every backup of a state that is there, the newest first, and say what is in it; alone: the server's state.

    Records of earlier versions are read as they are, and written anew when they next change.
    """
    with status() as tell, TemporaryDirectory(prefix="sf-state-") as place:
        tell(f"reading {where or 'the state'}")
        rows = [asdict(made) for made, _ in compute.state_backups(where or _back_up(f"{place}/now").name)]
    show_list(rows, COLUMNS, form)
    if not rows:
        raise Problem(f"no backup of a state is in {where}", hint="sf state backup", code=MISSING)
    if wrong := sum(bool(row["trouble"]) for row in rows):
        raise Problem(f"{wrong} of {len(rows)} are no backups")


@state.add(examples="sf state restore /mnt/usb/sf.state\nsf state restore 's3://home/sf?region=eu-central-1'")
@where
@click.option("--from", "name", default="", metavar="NAME", help="One of a store's; default: the newest.")
def restore(where: str, name: str, force: bool) -> None:
    """Put the state back, with the server stopped; what is there is kept beside it.

    Nothing is started or made then before every node has said what runs there.
    """
    place = settings().state_dir
    if (place / "sf.db").exists():
        confirm(f"put an earlier state in the place of the one in {place}?", force)
    with compute.only_one(place), status() as tell:
        tell(f"{where} to {place}")
        into = compute.open_state(compute.load(settings())) if settings().get("state") else None
        made = compute.restore_state(place, where, name, into)
    say(f"{made.name}, with {made.instances} guests, is back in {place}: start sf serve, then ask sf doctor")


@state.add(examples="sf state copy /var/lib/sf etcd://10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379")
@click.argument("source", metavar="DIR|URL")
@click.argument("target", metavar="DIR|URL")
def copy(source: str, target: str) -> None:
    """Copy the state of a directory into an empty etcd, or back, with the server stopped.

    Nothing is started or made then before every node has said what runs there.
    """
    with compute.only_one(settings().state_dir), status() as tell:
        tell(f"{source} to {target}")
        made = compute.copy_state(compute.load(settings()), source, target)
    say(f"{made.instances} guests are in {target}: start sf serve --state URL, or without it for a directory")


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
