"""Reading the kernel's tables: rtnetlink(7) dumps, parsed here.

pyroute2 makes the changes (net.kernel), but takes 12 ms of CPU to read one namespace of ours, most of it in its event
loop and in attributes that nobody asked for. A reconcile reads hundreds of namespaces; this takes a tenth of that.
"""

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

from net.errors import Failed
from net.plan.facts import Entry, Kind, Link

_REQUEST, _REQUEST_DUMP, _ERROR, _DONE = 1, 0x301, 2, 3
_INTERRUPTED, _TRIES = 0x10, 9
_GETLINK, _GETADDR, _GETROUTE, _GETNEIGH = 18, 22, 26, 30
_MAIN_TABLE, _PROTO_KERNEL = 254, 2
_NOARP, _PERMANENT = 0x40, 0x80
_PROXY = 8
_SKIP_STATS = struct.pack("=HHL", 8, 29, 8)  # IFLA_EXT_MASK: RTEXT_FILTER_SKIP_STATS
Attributes = dict[int, bytes]


def _attributes(data: bytes, at: int, end: int) -> Attributes:
    found = {}
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3FFF] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def _dump(asking: socket.socket, request: int, header: bytes) -> list[tuple[bytes, Attributes]]:
    """Each message's fixed header (as long as the request's) and its attributes.

    A dump that a change came between may lack what is there (netlink(7), NLM_F_DUMP_INTR): it is asked for again.
    """
    fixed = {_GETLINK: 16, _GETADDR: 8, _GETROUTE: 12, _GETNEIGH: 12}[request]
    for _ in range(_TRIES):
        asking.send(struct.pack("=LHHLL", 16 + len(header), request, _REQUEST_DUMP, 1, 0) + header)
        found, torn, kind = [], 0, 0
        while kind != _DONE:
            answer, at = asking.recv(1 << 18), 0
            while at < len(answer):
                length, kind, flags = struct.unpack_from("=LHH", answer, at)
                torn |= flags & _INTERRUPTED
                body = at + 16
                if kind == _ERROR:
                    raise Failed(f"the kernel lists no tables: error {answer[body : body + 4].hex()}")
                if kind != _DONE:
                    head = answer[body : body + fixed]
                    found.append((head, _attributes(answer, body + fixed, at + length)))
                at += (length + 3) & ~3
        if not torn:
            break
    return found


def _both(asking: socket.socket, request: int, header: str) -> Iterator[tuple[int, bytes, Attributes]]:
    """Of IPv4 and then of IPv6."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for fixed, attributes in _dump(asking, request, struct.pack(header, family)):
            yield family, fixed, attributes


def _text(value: bytes | None) -> str:
    return value.rstrip(b"\0").decode(errors="replace") if value else ""


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")


def _ip(value: bytes | None) -> str:
    return str(ip_address(value)) if value else ""


def links(asking: socket.socket) -> dict[int, Link]:
    """Every device by its index; a master's name is looked up among them."""
    header = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _SKIP_STATS
    messages = [(struct.unpack("=BxHiII", h), a) for h, a in _dump(asking, _GETLINK, header)]
    names = {fixed[2]: _text(attributes.get(3)) for fixed, attributes in messages}
    return {fixed[2]: _link(fixed[3], attributes, names) for fixed, attributes in messages}


def find(asking: socket.socket, name: str) -> tuple[int, Link] | None:
    """One device by its name, with its index but without its master's name."""
    wanted = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(wanted), 3) + wanted + b"\0" * (-len(wanted) % 4)
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _SKIP_STATS + attribute
    asking.send(struct.pack("=LHHLL", 16 + len(body), _GETLINK, _REQUEST, 1, 0) + body)
    answer = asking.recv(1 << 16)
    if struct.unpack_from("=H", answer, 4)[0] == _ERROR:
        return None
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", answer, 16)
    return index, _link(flags, _attributes(answer, 32, len(answer)), {})


def _link(flags: int, attributes: Attributes, names: dict[int, str]) -> Link:
    info = attributes.get(18, b"")
    about = _attributes(info, 0, len(info))
    kind = _text(about.get(1))
    data = _attributes(about[2], 0, len(about[2])) if kind == "vxlan" and 2 in about else {}
    port = _attributes(about[5], 0, len(about[5])) if _text(about.get(4)) == "bridge" and 5 in about else {}
    return Link(
        name=_text(attributes.get(3)),
        kind=kind,
        alias=_text(attributes.get(20)),
        mtu_bytes=_number(attributes.get(4)),
        up=bool(flags & 1),
        mac=attributes.get(1, b"").hex(":"),
        master=names.get(_number(attributes.get(10)), ""),
        suppress=bool(_number(port.get(32))),
        learning=bool(_number(port.get(8))),
        vni=_number(data.get(1)),
        local=_ip(data.get(4)),
        carrier=bool(_number(attributes.get(33))),
    )


def entries(asking: socket.socket, names: dict[int, str], *, host: bool) -> Iterator[Entry]:
    """Addresses, routes, FDB and neighbours without what the kernel put there itself.

    Of the host, ARP proxies, too; elsewhere an address does not count whose subnet's route was taken away.
    """
    connected = set()
    for family, fixed, a in _both(asking, _GETROUTE, "=B11x"):
        length, table, protocol = struct.unpack("=xBxxBB6x", fixed)
        if table == _MAIN_TABLE and protocol != _PROTO_KERNEL:
            destination = f"{_ip(a.get(1, bytes(16 if family == socket.AF_INET6 else 4)))}/{length}"
            yield Entry(Kind.ROUTE, names.get(_number(a.get(4)), ""), destination, _ip(a.get(5)))
        elif table == _MAIN_TABLE:
            connected.add((_number(a.get(4)), _ip(a.get(7))))
    for family, fixed, a in _both(asking, _GETADDR, "=B7x"):
        length, index = struct.unpack("=xBxxI", fixed)
        address = _ip(a.get(1 if family == socket.AF_INET6 else 2))
        if host or length in (32, 64) or (index, address) in connected:
            yield Entry(Kind.ADDRESS, names.get(index, ""), f"{address}/{length}")
    for fixed, a in _dump(asking, _GETNEIGH, struct.pack("=B11x", socket.AF_BRIDGE)):
        index, state = struct.unpack("=xxxxiHxx", fixed)
        own = state == _PERMANENT and 9 in a and _number(a[9]) == index  # a bridge's for itself
        if 1 in a or own or (9 in a and state == _NOARP):  # has a remote end, or a bridge's static entry
            yield Entry(Kind.FDB, names.get(index, ""), a.get(2, b"").hex(":"), _ip(a.get(1)))
    for _, fixed, a in _both(asking, _GETNEIGH, "=B11x"):
        index, state = struct.unpack("=xxxxiHxx", fixed)
        if state == _PERMANENT:
            yield Entry(Kind.NEIGHBOUR, names.get(index, ""), _ip(a.get(1)), a.get(2, b"").hex(":"))
    asked = struct.pack("=BxxxiHBB", socket.AF_INET, 0, 0, _PROXY, 0)
    for fixed, a in _dump(asking, _GETNEIGH, asked) if host else ():
        yield Entry(Kind.PROXY, names.get(struct.unpack_from("=i", fixed, 4)[0], ""), _ip(a.get(1)))
