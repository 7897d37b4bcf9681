"""Names fit the kernel's limits and belong to exactly one installation and network."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.errors import Invalid
from net.plan import names
from net.plane import Plane

INSTALLATIONS = st.integers(0, 2**32 - 1).map("{:08x}".format)
VNIS = st.integers(1, 2**24 - 1)


@given(INSTALLATIONS, INSTALLATIONS, VNIS, VNIS)
def test_two_uplinks_on_one_host_have_two_names(one: str, two: str, first: int, second: int) -> None:
    left, right = names.host_uplink(one, first), names.host_uplink(two, second)
    assert (left == right) == ((one, first) == (two, second))
    assert left.startswith(names.host_uplink_prefix(two)) == (one == two)


@given(INSTALLATIONS, VNIS, st.uuids())
def test_interface_names_have_at_most_fifteen_characters(installation: str, vni: int, port: object) -> None:
    made = [names.bridge(vni), names.vxlan(vni), names.uplink(vni), names.host_uplink(installation, vni)]
    for name in [*made, names.tap(installation, str(port))]:
        assert len(name) <= 15
        assert name.isascii()
        assert "/" not in name


@given(INSTALLATIONS, VNIS)
def test_macs_are_local_and_unicast(installation: str, vni: int) -> None:
    made = {
        names.router_mac(installation, vni),
        names.bridge_mac(installation, vni, "n1"),
        names.port_mac("x"),
    }
    assert len(made) == 3
    for mac in made:
        assert int(mac[:2], 16) & 3 == 2


@pytest.mark.parametrize("text", ["", "xyz", "1234567", "123456789", "ABCDEF01", "1234567g"])
def test_an_id_that_is_not_eight_hex_digits_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        Plane(text, Path())
