"""Guests start in their order once their machine has."""

import asyncio
from dataclasses import replace

from compute.agent import turns
from compute.agent.turns import Turns
from compute.wire.spec import InstanceSpec, Power


def guest(name: str, order: int, **more: object) -> InstanceSpec:
    spec = InstanceSpec(name, name, "system", 1, 64, (), order=order)
    return replace(spec, **more)  # type: ignore[arg-type]


def run(story: "object") -> None:
    asyncio.run(story)  # type: ignore[arg-type]


async def soon() -> None:
    """Let what is due now happen."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_guest_waits_for_those_of_a_lower_order_and_their_delay() -> None:
    async def story() -> None:
        heard = asyncio.Event()
        db, web, other = guest("db", 1, delay_s=0), guest("web", 2), guest("other", 9, namespace="shop")
        order = Turns()
        order.begin([db, web, other], heard.set)
        assert order.come(db) and not order.come(web), "one after the other"
        assert order.come(other), "another namespace's guests are not waited for"
        order.settled(web)  # it looked, and it was not its turn
        assert not order.come(web)
        order.settled(db, started=True)
        await asyncio.wait_for(heard.wait(), 5)
        assert order.come(web)

    run(story())


def test_a_delay_is_not_cut_short_by_a_second_look() -> None:
    async def story() -> None:
        db, web = guest("db", 0, delay_s=600), guest("web", 1)
        order = Turns()
        order.begin([db, web], lambda: None)
        order.settled(db, started=True)
        order.settled(db)
        await soon()
        assert not order.come(web)

    run(story())


def test_what_will_not_start_holds_nobody_up() -> None:
    async def story() -> None:
        off, doomed, web = guest("off", 0), guest("doomed", 1), guest("web", 2)
        order = Turns()
        order.begin([off, doomed, web, guest("never", 0, power=Power.OFF)], lambda: None)
        order.settled(replace(doomed, delete=True))
        order.settled(replace(off, power=Power.OFF))
        await soon()
        assert order.come(web)

    run(story())


def test_a_guest_that_cannot_be_started_is_waited_for_within_a_limit() -> None:
    async def story() -> None:
        heard = asyncio.Event()
        stuck, web = guest("stuck", 0), guest("web", 1)
        order = Turns()
        order.begin([stuck, web], heard.set)
        assert order.come(stuck) and not order.come(web)
        await asyncio.wait_for(heard.wait(), 5)
        assert order.come(web)

    limit, turns._LIMIT_S = turns._LIMIT_S, 0.05
    try:
        run(story())
    finally:
        turns._LIMIT_S = limit


def test_a_guest_that_is_made_later_waits_for_nobody() -> None:
    async def story() -> None:
        order = Turns()
        order.begin([guest("db", 0)], lambda: None)
        order.begin([guest("db", 0), guest("new", 5)], lambda: None)
        assert order.come(guest("new", 5))

    run(story())
