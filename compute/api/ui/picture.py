"""Networks as a picture: where everything stands, in pixels, for a template that draws it.

On the left a bar is what is outside; each network is a band with its router, a line, and its guests below the line. A
guest that is on several networks stands on each of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH, _LEFT, _BOX, _HIGH, _GAP, _TOP = 1000, 190, 152, 66, 10, 46
_STEP = _HIGH + 2 * _GAP + 8
_IN_ROW = (_WIDTH - _LEFT) // (_BOX + _GAP)


def picture(networks: Sequence[Mapping[str, Any]], instances: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Bands with the lines (one for each row) and the guests of each, out of the API's networks and instances."""
    links = [(instance, link) for instance in instances for link in instance["interfaces"]]
    bands, y = [], _GAP
    for network in networks:
        there = [(instance, link) for instance, link in links if link["network_uuid"] == network["uuid"]]
        lines = [y + _TOP + row * _STEP for row in range(max(1, -(-len(there) // _IN_ROW)))]
        guests = [
            {
                "x": _LEFT + number % _IN_ROW * (_BOX + _GAP),
                "y": lines[number // _IN_ROW] + _GAP + 8,
                "instance": instance,
                "address": link["ipv4"] or "by DHCP",
                "outside": " ".join(filter(None, (link["floating"], *link["published"]))),
            }
            for number, (instance, link) in enumerate(there)
        ]
        high = _TOP + len(lines) * _STEP + _GAP
        bands.append({"y": y, "high": high, "network": network, "lines": lines, "guests": guests})
        y += high + _GAP
    return {"width": _WIDTH, "height": y, "bands": bands, "left": _LEFT, "box": _BOX, "high": _HIGH}
