"""A node whose guests are played, as a process: real link, lease, fence and TLS. DIR/routes says for whom it routes.

python -m tests.system.played DIR NAME URLS TOKEN
"""

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from compute.agent import link
from compute.errors import ComputeError
from imagestore import durable
from tests.api_server import PlayedAgent
from tests.unit.compute.test_remote import Wires


async def play(directory: Path, name: str, urls: str, token: str) -> None:
    identity = link.load(directory) or await link.join(directory, urls, token, name)
    (directory / "pid").write_text(str(os.getpid()))
    plane = Wires()
    controller = link.RemoteController(identity, directory, plane)  # type: ignore[arg-type]
    agent = PlayedAgent(controller, name)  # type: ignore[arg-type]

    async def acting() -> None:
        while True:
            with suppress(ComputeError, OSError):
                await agent.run()
            await asyncio.sleep(0.2)

    async def saying() -> None:
        while True:
            known = agent.desired.networks.networks if agent.desired and plane.lease.firm() else ()
            mine = " ".join(n.uuid for n in known if n.router_node == name)
            durable.write(directory / "routes", mine.encode())
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        for part in (controller.run, acting, saying):
            group.create_task(part())


if __name__ == "__main__":
    asyncio.run(play(Path(sys.argv[1]), *sys.argv[2:]))
