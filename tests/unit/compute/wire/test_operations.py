"""What a server asks of a node, and what it makes of the node's answer."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from compute.errors import Unavailable
from compute.wire.operations import client


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        *(("console", ("i", 10), said) for said in (None, 7, "é", "%%%", ["YQ=="], {"a": 1})),
        *(("ping", ("n", "10.0.0.1"), said) for said in (None, [], [[1], []], "ab", [["a"], "b"])),
        *(("doctor", (), said) for said in (None, 3, [["a", "b"]], [[1, 2, 3]], ["abc"])),
        *(
            ("cached", ("",), said)
            for said in (None, {}, [1], [{"digest": "b3:"}], [{"used_s": "yesterday"}])
        ),
        *(
            ("usage", (), said)
            for said in (None, [], {"": []}, {"": {"cpu_s": "much"}}, {"": {"cpu_s": None}})
        ),
        *(("usage", (), {"i": {"cpu_s": said}}) for said in (-1, 2**63, 1e300, "nan", "inf")),
        ("clear_console", ("i",), "done"),
    ],
)
def test_a_node_that_answers_with_nonsense_is_away_and_nobodys_request_is_wrong(
    verb: str, arguments: Sequence[Any], said: Any
) -> None:
    """E4, of its whole kind."""

    async def ask(verb: str, arguments: Sequence[Any]) -> Any:
        return said

    with pytest.raises(Unavailable, match="nonsense"):
        asyncio.run(getattr(client(ask), verb)(*arguments))
