"""`sf agent`: this machine as a node of a server elsewhere. The entry point that builds its adapters."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack

from compute.agent import link as remote
from compute.agent.agent import Agent
from compute.config import Config
from compute.errors import Conflict, Invalid
from compute.serve import close_stores, only_one, open_stores, release, reopen_stores, served
from imagestore import ImageCache
from net import Plane

log = logging.getLogger(__name__)

_UNSET = Config().mesh_address


async def serve_agent(
    config: Config, url: str = "", token: str = "", say: Callable[[str], None] = log.info
) -> None:
    """Join if a token is given, then run until SIGINT or SIGTERM. Guests and networks outlive it.

    Raises Conflict (it joined another server already), Invalid (it never joined), Denied, Unavailable.
    """
    with ExitStack() as stack:
        state_dir = config.state_dir
        for name in ("", "run", "instances", "cache"):
            (state_dir / name).mkdir(mode=0o711, parents=True, exist_ok=True)
        stack.enter_context(only_one(state_dir))
        identity = remote.load(state_dir)
        if identity is None:
            if not (url and token):
                hint = "sf node token on the server, then here: sf agent --join URL --token T"
                raise Invalid(f"this machine has not joined a server ({state_dir})", hint=hint)
            identity = await remote.join(state_dir, url, token, config.node_name)
            say(f"joined {identity.url} as {identity.node}")
        elif url and url != identity.url:
            hint = f"sf node remove {identity.node} there, then remove {state_dir}/agent.json here"
            raise Conflict(f"this machine belongs to {identity.url} already", hint=hint)
        address = identity.local_address() if config.mesh_address == _UNSET else config.mesh_address
        images = ImageCache(state_dir / "cache", {})
        images.stores = open_stores(config, {})
        stack.callback(close_stores, images)
        plane = Plane(identity.installation, state_dir)
        controller = remote.RemoteController(identity, state_dir, plane, config.uplink)
        mtu_bytes = await asyncio.to_thread(plane.largest_mtu, address)
        agent = Agent(
            controller,
            identity.node,
            state_dir,
            controller.plane,
            served(config, images, address),
            config.libvirt_uri,
            address=address,
            mtu_bytes=mtu_bytes or 1450,
            release=release(),
        )
        say(f"sf agent {release()}: node {identity.node} of {identity.url}, mesh address {address}")
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        tasks = [
            asyncio.create_task(stop.wait()),
            asyncio.create_task(controller.run()),
            asyncio.create_task(agent.run()),
            asyncio.create_task(reopen_stores(config, images)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await agent.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            for task in done:
                task.result()
        say("stopped; guests and their networks go on running")
