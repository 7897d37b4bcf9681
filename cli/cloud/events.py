"""`sf events` and `sf top`: what happens to all that one sees, and what that uses."""

import json
import time

import click

from cli.cloud.api import Api
from cli.cloud.network import EVENTS
from cli.command import API, Command
from cli.errors import clean
from cli.output import Row, show_list, size

COLUMNS = (EVENTS[0], ("of", lambda e: f"{e['object']} {e['name']}"), *EVENTS[1:])


@click.command(
    "events",
    cls=Command,
    needs=API,
    examples="sf events --limit 20\nsf events -f\nsf events -f --format json | jq -r .message",
)
@click.option("-f", "--follow", is_flag=True, help="Those to come, as they come; JSON is a line for each.")
def events(limit: int, form: str, follow: bool) -> None:
    """What happened to what you see: guests, networks, nodes and images, newest first."""
    api = Api()
    if not follow:
        show_list(api("GET", "events", limit=limit), COLUMNS, form, name="message")
        return
    for event in api.follow("events"):
        at = time.strftime("%H:%M:%S", time.localtime(event["timestamp"]))
        line = f"{at}  {event['by'] or event['fqdn']}  {event['object']} {event['name']}: {event['message']}"
        print(json.dumps(event) if form == "json" else clean(line), flush=True)


def _rates(row: Row, *names: str) -> str:
    return " ".join(size(row["usage"]["per_s"].get(name)) for name in names)


@click.command("top", cls=Command, needs=API, examples="sf top\nwatch sf top")
def top(form: str) -> None:
    """What guests use, in the last 15 seconds, the busiest first."""
    columns = (
        ("name", "name"),
        ("cpus", lambda i: f"{i['cpus'] * (i['usage']['cpu_share'] or 0):.2f} of {i['cpus']}"),
        ("memory", lambda i: size(i["usage"]["memory_bytes"])),
        ("disk r w /s", lambda i: _rates(i, "read_bytes", "written_bytes")),
        ("net in out /s", lambda i: _rates(i, "in_bytes", "out_bytes")),
    )
    found = [one for one in Api()("GET", "instances") if one["usage"]]
    show_list(sorted(found, key=lambda i: -i["cpus"] * (i["usage"]["cpu_share"] or 0)), columns, form)
