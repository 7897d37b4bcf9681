"""What agents in guests are asked to do, as one server remembers it."""

import asyncio
from types import SimpleNamespace
from typing import Any

from compute.api import inside


def test_two_who_give_up_one_operation_at_once_both_have_their_way() -> None:
    async def story() -> None:
        ctx: Any = SimpleNamespace(find=lambda *_: None, request=SimpleNamespace(method="DELETE"))
        task = asyncio.create_task(asyncio.sleep(60))
        inside._operations["one"] = {"uuid": "one", "instance_uuid": "web"}, task
        both = await asyncio.gather(*(inside.show_operation(ctx, "one") for _ in range(2)))
        assert [answer.status_code for answer in both] == [200, 200] and "one" not in inside._operations

    asyncio.run(story())
