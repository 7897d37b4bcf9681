"""The judge of histories lets good ones pass, and no stale read, lost write or double grant."""

import random

import pytest

from tests.linearizable import Call, linearizable


def swap(expect: str, value: str, began: float, ended: float, result: str | None = "done") -> Call:
    return Call("k", "swap", expect, value, result, began, ended)


def read(result: str, began: float, ended: float) -> Call:
    return Call("k", "read", result=result, began=began, ended=ended)


INF = float("inf")


@pytest.mark.parametrize(
    "good",
    [
        [swap("", "a", 0, 1), read("a", 2, 3)],
        [swap("", "a", 0, 5), read("", 1, 2), read("a", 3, 4)],
        [swap("", "a", 0, INF, None), read("", 1, 2), read("a", 8, 9)],
        [swap("", "a", 0, INF, None), read("", 1, 2), read("", 8, 9)],
        [swap("", "a", 0, 3), swap("", "b", 1, 4, "refused"), read("a", 5, 6)],
    ],
)
def test_what_some_order_explains_passes(good: list[Call]) -> None:
    assert linearizable(good)


@pytest.mark.parametrize(
    "bad",
    [
        [swap("", "a", 0, 1), read("", 2, 3)],
        [swap("", "a", 0, 5), read("a", 1, 2), read("", 3, 4)],
        [swap("", "a", 0, 1), swap("", "b", 0, 1)],
        [swap("", "a", 0, 1), swap("a", "b", 2, 3), read("a", 4, 5)],
        [swap("", "a", 0, INF, None), read("a", 1, 2), read("", 3, 4)],
    ],
)
def test_a_stale_read_a_lost_write_and_a_thing_given_twice_are_found(bad: list[Call]) -> None:
    assert not linearizable(bad)


def test_one_stale_read_planted_in_a_long_history_is_found() -> None:
    rng, calls, value = random.Random(1), list[Call](), ""
    for n in range(150):
        if rng.random() < 0.5:
            calls.append(swap(value, f"v{n}", n, n + 1.5))
            value = f"v{n}"
        calls.append(read(value, n + 1.6, n + 1.9))
    assert linearizable(calls)
    calls[140] = read("v0" if value != "v0" else "", calls[140].began, calls[140].ended)
    assert not linearizable(calls)
