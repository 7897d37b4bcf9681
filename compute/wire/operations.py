"""What a server asks of a node directly, declared once: client, dispatch and the forms in JSON are made from it.

A new operation is a method here and its doing in `agent.operations`.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from inspect import iscoroutinefunction
from types import SimpleNamespace
from typing import Annotated, Any, Protocol, cast, get_type_hints

from pydantic import Field

from compute.errors import Invalid, Unavailable
from compute.wire.codec import Base64, from_plain, to_plain
from compute.wire.spec import CachedImage

Ask = Callable[[str, Sequence[Any]], Awaitable[Any]]
"""Carries (verb, arguments) as JSON to the node and brings the result back; raises ComputeError."""


COUNTED = ("cpu_s", "read_bytes", "written_bytes", "in_bytes", "out_bytes")
"""Of processors, disks and networks, since the start of the guest or the machine."""
HELD = ("memory_bytes", "disk_bytes", "memory_total_bytes", "disk_total_bytes")  # now; totals are a node's
Figures = dict[str, Annotated[float, Field(ge=0, lt=2**63)]]


class NodeOperations(Protocol):
    """All quick; raise ComputeError. Idempotent, so safe to retry."""

    async def console(self, instance_uuid: str, length: int) -> Base64:
        """The last `length` bytes of the serial console; -1 for all that is kept."""
        ...

    async def clear_console(self, instance_uuid: str) -> None:
        """Forget what the console said so far."""
        ...

    async def ping(self, network_uuid: str, address: str) -> tuple[list[str], list[str]]:
        """Standard output and error of a ping from inside the network: three packets, at most five seconds."""
        ...

    async def listening(self) -> list[tuple[str, int]]:
        """(tcp or udp, port) on which the node's own servers listen."""
        ...

    async def doctor(self) -> list[tuple[str, str, str]]:
        """What of the node's networks is not as desired: (network's name or "", what is wrong, how to mend it)."""
        ...

    async def cached(self, wanted: str) -> list[CachedImage]:
        """What its cache holds, complete or not, once it brings the image `wanted`, if any, in the background."""
        ...

    async def usage(self) -> dict[str, Figures]:
        """Of each running guest by its uuid, and of the node by ""."""
        ...

    async def stream(self, kind: str, target: str, options: dict[str, Any], ticket: str) -> None:
        """Bring the stream of this ticket to the server, once: what `agent.operations` has of that kind.

        target: the instance's uuid; of `connect` the network's.
        """
        ...


@cache
def _declared() -> dict[str, tuple[list[Any], Any]]:
    """Verb → types of its arguments, type of its result."""
    found = {}
    for verb, call in vars(NodeOperations).items():
        if iscoroutinefunction(call):
            *arguments, result = get_type_hints(call, include_extras=True).values()
            found[verb] = arguments, result
    return found


def client(ask: Ask) -> NodeOperations:
    """A node's operations from afar."""

    async def call(verb: str, result: Any, *arguments: Any) -> Any:
        said = await ask(verb, to_plain(arguments))
        try:
            return from_plain(result, said)
        except Invalid as err:  # whoever asked is not to blame
            raise Unavailable(f"the node answers {verb} with nonsense") from err

    verbs = {verb: partial(call, verb, result) for verb, (_, result) in _declared().items()}
    return cast(NodeOperations, SimpleNamespace(**verbs))


async def answer(operations: NodeOperations, verb: str, arguments: Sequence[Any]) -> Any:
    """Carry out what a client asked; the result as JSON. Raises Invalid for what is not declared."""
    if verb not in _declared():
        raise Invalid(f"this node's agent knows no {verb}")
    kinds, result = _declared()[verb]
    given = [from_plain(kind, argument) for kind, argument in zip(kinds, arguments, strict=True)]
    return to_plain(await getattr(operations, verb)(*given), result)
