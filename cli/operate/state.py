"""`sf state`: the server's own records, kept elsewhere and put back."""

from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import click

import compute
from cli.command import Group, settings
from cli.errors import MISSING, Problem
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
