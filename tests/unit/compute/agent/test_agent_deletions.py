"""Deletions that a node has done and its server has not heard of yet."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, MagicMock

from compute.agent.agent import Agent
from compute.wire.spec import InstanceSpec, NodeDesired
from net import NodeNetworks

UUID = "11111111-0000-4000-8000-000000000001"
NETWORKS = NodeNetworks("0badcafe", "n2", ())


def test_a_guest_that_was_here_before_and_is_here_again_is_deleted_when_it_is_to_be() -> None:
    """It went away, and came back before this node was told of anything without it."""
    node: Any = MagicMock(_deleted=set(), _guest=AsyncMock(return_value=MagicMock()))

    def apply(*, delete: bool) -> Any:
        node.reset_mock()
        spec = InstanceSpec(UUID, "web", "system", 1, 16, (), delete=delete)
        asyncio.run(Agent._apply_instances(node, MagicMock(), NodeDesired(1, NETWORKS, (spec,))))
        return node

    assert apply(delete=True)._guest.called
    node._deleted.add(UUID)
    assert apply(delete=True)._reports.deleted.called and not node._guest.called
    assert apply(delete=False)._guest.called
    assert apply(delete=True)._guest.called and not node._reports.deleted.called
