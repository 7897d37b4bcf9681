"""`sf agent`: this machine as a node of a server elsewhere. The entry point that builds its adapters."""

import hashlib
import logging
from contextlib import ExitStack, closing

from compute import process
from compute.agent import link as remote
from compute.agent.memory import Memory
from compute.config import Config
from compute.errors import Conflict, Invalid
from imagestore import listening

log = logging.getLogger(__name__)


async def serve_agent(config: Config, url: str = "", token: str = "", say: process.Say = log.info) -> None:
    """Join if a token is given, then run until SIGINT or SIGTERM. Guests and networks outlive it.

    Raises Conflict (it joined another server already), Invalid (it never joined), Denied, Unavailable.
    """
    with ExitStack() as stack:
        state_dir = config.state_dir
        stack.enter_context(process.only_one(state_dir))
        listening.raise_limits()
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
        memory = Memory(state_dir, proof=hashlib.sha256(identity.secret.encode()).hexdigest()[:32])
        stack.enter_context(memory.alone(identity.installation))
        stores = stack.enter_context(closing(process.NodeStores(config, default=False)))
        agent, link = process.joined(config, identity, stores, memory, say)
        say(f"sf agent {process.release()}: node {identity.node} of {identity.url}")
        await process.run(agent, link, stores.keep)
        say("stopped; guests and their networks go on running")
