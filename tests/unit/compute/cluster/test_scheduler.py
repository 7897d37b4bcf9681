"""Placement: a pure function."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.cluster.scheduler import Limits, Room, place
from compute.errors import NoCapacity, NotFound

LIMITS = Limits(cpu_ratio=2.0, memory_reserve_mib=512)


def room(node: str, memory_mib: int = 4096, used_mib: int = 0, used_cpus: int = 0, why_not: str = "") -> Room:
    return Room(node, 4, memory_mib, used_cpus, used_mib, why_not)


def test_the_node_with_most_free_memory_takes_it() -> None:
    assert place([room("a", used_mib=1000), room("b"), room("c", used_mib=1)], 1, 512, limits=LIMITS) == "b"


def test_a_node_that_holds_the_image_comes_first() -> None:
    assert place([room("a", used_mib=1000), room("b")], 1, 512, limits=LIMITS, holders=["a"]) == "a"


def test_equal_nodes_are_taken_by_name() -> None:
    assert place([room("b"), room("a")], 1, 512, limits=LIMITS) == "a"


def test_the_wanted_node_takes_it_or_nobody() -> None:
    rooms = [room("a", used_mib=4000), room("b")]
    assert place(rooms, 1, 512, limits=LIMITS, wanted="b") == "b"
    with pytest.raises(NoCapacity, match="a has 0 MiB"):
        place(rooms, 1, 512, limits=LIMITS, wanted="a")
    with pytest.raises(NotFound):
        place(rooms, 1, 512, limits=LIMITS, wanted="c")


def test_each_node_says_why_it_does_not_fit() -> None:
    rooms = [room("a", used_mib=3000), room("b", used_cpus=8), room("c", why_not="is drained")]
    with pytest.raises(NoCapacity, match="a has 584 MiB of memory free; b has 0 vCPUs free; c is drained"):
        place(rooms, 1, 600, limits=LIMITS)
    with pytest.raises(NoCapacity, match="there is no node"):
        place([], 1, 1, limits=LIMITS)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4096), st.booleans()), max_size=6),
    st.integers(1, 8),
    st.integers(1, 4096),
)
def test_a_placement_always_fits_and_is_found_when_there_is_one(
    used: list[tuple[int, int, bool]], cpus: int, memory_mib: int
) -> None:
    rooms = [Room(f"n{i}", 4, 4096, c, m, "" if ok else "away") for i, (c, m, ok) in enumerate(used)]
    fits = {
        r.node
        for r in rooms
        if not r.why_not and r.claimed_cpus + cpus <= 8 and r.claimed_memory_mib + memory_mib <= 4096 - 512
    }
    try:
        assert place(rooms, cpus, memory_mib, limits=LIMITS) in fits
    except NoCapacity:
        assert not fits
