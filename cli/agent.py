"""`sf agent`."""

import click

from cli.command import Command, settings
from cli.output import say


@click.command(cls=Command, examples="sf agent --join https://10.0.0.1:13001 --token TOKEN\nsf agent")
@click.option("--join", "url", metavar="URL", help="The server to belong to, once; sf node token prints it.")
@click.option("--token", metavar="T", help="Single-use join token of that server.")
@click.option("--name", "node_name", metavar="NAME", help="This node's name; default: the host's.")
def agent(url: str | None, token: str | None, node_name: str | None) -> None:
    """Run this machine as a node of a server elsewhere, as root, until Ctrl-C; guests go on without it."""
    import asyncio
    import logging

    from compute.config import load
    from compute.serve_agent import serve_agent

    level = logging.DEBUG if settings().flags.get("debug") else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(serve_agent(load(node_name=node_name), url or "", token or "", say))
