"""`sf backup`: snapshots of guests that the server takes by itself, and keeps by a rule."""

from typing import Any

import click

from cli.cloud.api import Api
from cli.cloud.instance import SNAPSHOT, SNAPSHOT_FIELDS
from cli.cloud.snapshots import take
from cli.command import API, DURATION, Group
from cli.output import confirm, say, show_list, show_one, when

RULES = (
    ("name", "name"),
    ("every", lambda r: f"{r['every_s'] / 3600:.4g} h"),
    ("keep", lambda r: " ".join(f"{count} {span}" for span, count in r["keep"].items() if count) or "all"),
    ("last", lambda r: when(r["last_s"])),
    ("next", lambda r: when(r["due_s"])),
    ("error", "error"),
)
backup = Group("backup", needs=API, help="Keep guests' disks, regularly.")


@backup.add("set", examples="sf backup set web --every 1d --keep-daily 7 --keep-weekly 4")
@click.option("--every", type=DURATION, default="1d", show_default=True)
@click.option("--keep-daily", "daily", default=0, help="The newest of each of so many days; so with:")
@click.option("--keep-weekly", "weekly", default=0)
@click.option("--keep-monthly", "monthly", default=0)
@click.option("--store", default="", metavar="URL", help="Complete copies go there, too.")
def set_(name: str, form: str, **rule: Any) -> None:
    """Back a guest up from now on; without a --keep all backups stay."""
    show_one(Api()("PUT", "instances", name, "backup", **rule), RULES, form)


@backup.add(examples="sf backup unset web")
def unset(name: str) -> None:
    """Back a guest up no more; its backups stay."""
    Api()("DELETE", "instances", name, "backup")


@backup.add(examples="sf backup run web")
def run(name: str, form: str) -> None:
    """Make one now."""
    show_one(take(Api(), name, "backup", 3600), SNAPSHOT_FIELDS, form)


@backup.add(examples="sf backup ls")
def ls(form: str) -> None:
    """List which guests are backed up, and how that goes."""
    show_list(Api()("GET", "backups"), RULES, form)


@backup.add(examples="sf backup show web")
def show(name: str, form: str) -> None:
    """List the backups of a guest, the newest first."""
    show_list([s for s in Api()("GET", "instances", name, "snapshot") if s["backup"]], SNAPSHOT, form)


@backup.add(examples="sf backup delete web my/web:20261224-180000")
@click.argument("which", metavar="BACKUP")
def delete(name: str, which: str, force: bool) -> None:
    """Remove a backup or snapshot of a guest."""
    confirm(f"remove {which}?", force)
    Api()("DELETE", "instances", name, "snapshot", which.rpartition(":")[2])
    say(f"{which} removed; the next collection frees its space")
