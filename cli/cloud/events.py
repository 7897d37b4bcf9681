"""`sf events`: what happens to all that one sees."""

import json
import time

import click

from cli.cloud.api import Api
from cli.cloud.network import EVENTS
from cli.command import API, Command
from cli.errors import clean
from cli.output import show_list

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
        line = f"{at}  {event['fqdn']}  {event['object']} {event['name']}: {event['message']}"
        print(json.dumps(event) if form == "json" else clean(line), flush=True)
