"""A node's operations through JSON and back."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from compute.errors import Invalid
from compute.wire import operations


class Node(operations.NodeOperations):
    async def console(self, instance_uuid: str, length: int) -> bytes:
        return f"{instance_uuid} {length}\xff".encode("latin-1")

    async def clear_console(self, instance_uuid: str) -> None:
        self.cleared = instance_uuid

    async def ping(self, network_uuid: str, address: str) -> tuple[list[str], list[str]]:
        return [network_uuid], [address]

    async def doctor(self) -> list[tuple[str, str, str]]:
        return [("lan", "a rule is missing", "")]


def far(node: Node) -> operations.NodeOperations:
    async def ask(verb: str, arguments: Sequence[Any]) -> Any:
        sent = json.loads(json.dumps({"verb": verb, "arguments": arguments}))
        return json.loads(json.dumps(await operations.answer(node, sent["verb"], sent["arguments"])))

    return operations.client(ask)


def test_every_answer_comes_back_as_it_was_given() -> None:
    async def story() -> None:
        node = Node()
        client = far(node)
        assert await client.console("u", -1) == b"u -1\xff"
        await client.clear_console("u")
        assert node.cleared == "u"
        assert await client.ping("n", "10.0.0.2") == (["n"], ["10.0.0.2"])
        assert await client.doctor() == [("lan", "a rule is missing", "")]

    asyncio.run(story())


@pytest.mark.parametrize("verb", ["__init__", "cleared", "reboot", ""])
def test_nothing_is_called_that_is_not_declared(verb: str) -> None:
    with pytest.raises(Invalid, match="knows no"):
        asyncio.run(operations.answer(Node(), verb, []))


def test_a_wrong_number_of_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        asyncio.run(operations.answer(Node(), "console", ["u"]))
