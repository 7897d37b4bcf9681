"""The plan: pure, complete, and nothing to do where all is as desired."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from net.ipam import UNKNOWN
from net.plan import names, nft
from net.plan.facts import HOST, Dnsmasq, Entry, Facts, Hook, Kind, Link, Observed
from net.plan.model import Network, NodeNetworks, Peer, Port, Published
from net.plan.plan import Space, Transaction, Verb, diff, plan
from net.plan.target import target, transits, without_routers

INSTALLATION = "1a2b3c4d"
NODES = ("n1", "n2", "n3")


@st.composite
def networks(draw: st.DrawFn, number: int) -> Network:
    block = IPv4Network(f"10.{number}.0.0/24")
    hosts = draw(st.sets(st.integers(2, 200), max_size=4))
    ports = tuple(
        Port(
            f"port-{number}-{host}",
            f"02:00:00:00:{number:02x}:{host:02x}",
            block[host],
            f"guest{host}",
            draw(st.sampled_from(NODES)),
            floating=IPv4Address(f"192.0.2.{host}") if draw(st.booleans()) else None,
            published=(Published("tcp", 8000 + number, 80),) if draw(st.booleans()) else (),
        )
        for host in sorted(hosts)
    )
    routed = (
        ((IPv4Address(f"203.0.113.{number}"), block[min(hosts)]),) if hosts and draw(st.booleans()) else ()
    )
    if draw(st.integers(0, 3)) == 0:
        unknown = (replace(port, address=UNKNOWN[n]) for n, port in enumerate(ports))
        on_it = tuple(unknown) if draw(st.booleans()) else ports
        on_it = tuple(replace(port, floating=None, published=()) for port in on_it)
        uuid, bridge = f"network-{number}", draw(st.sampled_from(["br0", "br1"]))
        return Network(uuid, number, f"lan{number}", block, block[1], bridge=bridge, ports=on_it)
    return Network(
        uuid=f"network-{number}",
        vni=1000 + number,
        name=f"lan{number}",
        netblock=block,
        gateway=block[1],
        provide_dhcp=draw(st.booleans()),
        provide_nat=draw(st.booleans()),
        provide_dns=draw(st.booleans()),
        router_node=draw(st.sampled_from(NODES)),
        router_floating=draw(st.sampled_from([None, IPv4Address(f"198.51.100.{number}")])),
        ports=ports,
        routed=routed,
    )


@st.composite
def states(draw: st.DrawFn) -> NodeNetworks:
    numbers = draw(st.sets(st.integers(1, 9), max_size=4))
    peers = tuple(Peer(node, IPv4Address(f"172.16.0.{n}")) for n, node in enumerate(NODES, 1))
    made = tuple(draw(networks(number)) for number in sorted(numbers))
    return NodeNetworks(INSTALLATION, draw(st.sampled_from(NODES)), made, peers, IPv4Address("172.16.0.1"))


EMPTY = Observed(
    {HOST: Facts()}, uplink="eth0", bridges={"br0": 1500}, resolvers=(IPv4Address("192.0.2.53"),)
)


def _as_desired(desired: NodeNetworks, observed: Observed) -> Observed:
    """What a kernel would hold that did all that the plan says: taps are made by others, so there are none."""
    spaces = {}
    for name, facts in target(desired, observed).items():
        links = {
            n: replace(link, mac=link.mac or "02:11:11:11:11:11", peer="")
            for n, link in facts.links.items()
            if link.kind != "tun"
        }
        entries = frozenset(e for e in facts.entries if not e.dev or e.dev in links or e.kind is Kind.PROXY)
        spaces[name] = replace(facts, links=links, entries=entries)
    return replace(observed, namespaces=spaces)


@given(states())
def test_a_second_plan_finds_nothing_to_do(desired: NodeNetworks) -> None:
    assert plan(desired, _as_desired(desired, EMPTY)) == []


@given(states(), states())
def test_whatever_was_there_before_the_plan_names_every_difference_once(
    old: NodeNetworks, new: NodeNetworks
) -> None:
    before = _as_desired(replace(old, node="n1"), EMPTY)
    actions = plan(replace(new, node="n1"), before)
    assert len({(a.namespace, a.verb, repr(a.item)) for a in actions}) == len(actions)
    kept = {names.namespace(INSTALLATION, network.vni) for network in new.networks}
    for action in actions:
        if action.verb is Verb.DELETE and isinstance(action.item, Space):
            assert action.namespace not in kept
    gone = set(before.namespaces) - kept - {HOST}
    removed = {a.namespace for a in actions if isinstance(a.item, Space) and a.verb is Verb.DELETE}
    assert removed == gone


@given(states())
def test_in_each_namespace_filters_come_before_any_link_and_the_server_last(desired: NodeNetworks) -> None:
    actions = plan(desired, EMPTY)
    for name in {action.namespace for action in actions}:
        items = [action.item for action in actions if action.namespace == name]
        filters = [n for n, item in enumerate(items) if isinstance(item, Transaction)]
        links = [n for n, item in enumerate(items) if isinstance(item, Link)]
        assert max(filters) < min(links, default=len(items))
        assert not [item for item in items[:-1] if isinstance(item, Dnsmasq)]
    spaces = [action.namespace for action in actions]
    assert spaces == sorted(spaces, key=lambda name: name != HOST) or spaces[-1] == HOST
    up = [n for n, a in enumerate(actions) if a.namespace == HOST and isinstance(a.item, Link)]
    assert min(up, default=len(actions)) > max(
        (n for n, name in enumerate(spaces) if name != HOST), default=-1
    )


@given(states())
def test_a_node_without_its_lease_keeps_its_guests_ports_and_drops_what_routes(desired: NodeNetworks) -> None:
    observed = _as_desired(desired, EMPTY)
    wanted = without_routers(observed)
    for name, facts in wanted.items():
        assert not [e for e in facts.entries if e.kind in (Kind.ADDRESS, Kind.ROUTE, Kind.PROXY)]
        assert facts.dnsmasq is None
        assert not [link for link in facts.links.values() if link.kind == "veth"]
        assert facts.tables == observed.namespaces[name].tables
    assert diff(wanted, replace(observed, namespaces=wanted)) == []


@given(states())
def test_uplinks_keep_their_addresses_and_meet_nobodys(desired: NodeNetworks) -> None:
    first = transits(desired, EMPTY)
    assert len(set(first.values())) == len(first)
    assert transits(desired, _as_desired(desired, EMPTY)) == first
    taken = replace(EMPTY, host_addresses=frozenset(first.values()))
    assert not set(transits(desired, taken).values()) & set(first.values())


def test_a_guest_whose_network_or_port_nobody_wants_keeps_its_tap() -> None:
    """A1: networks and taps of guests that the state did not know went with it. A stray one is shut, no more."""
    block = IPv4Network("10.1.0.0/24")
    port = Port("p", "02:00:00:00:00:01", block[2], "web", "n1")
    network = Network("u", 5, "lan", block, block[1], router_node="n1", ports=(port,))
    desired = NodeNetworks(INSTALLATION, "n1", (network,))
    observed = _as_desired(desired, EMPTY)
    space, tap = names.namespace(INSTALLATION, 5), names.tap(INSTALLATION, "p")
    facts, whole = observed.namespaces[space], target(desired, EMPTY)[space]
    held = replace(facts, links={**facts.links, tap: whole.links[tap]}, entries=whole.entries)
    observed = replace(observed, namespaces={**observed.namespaces, space: held})
    gone = plan(replace(desired, networks=()), observed)
    assert gone and {action.namespace for action in gone} == {HOST}
    without = plan(replace(desired, networks=(replace(network, ports=()),)), observed)
    (shut,) = [action for action in without if isinstance(action.item, Link) and action.item.kind == "tun"]
    assert (shut.verb, shut.namespace, shut.item.name, shut.item.up) == (Verb.CHANGE, space, tap, False)
    assert any(action.item == Space(space) for action in diff({HOST: Facts()}, observed, guests_too=True))


def test_a_dead_tap_goes_and_one_that_waits_for_its_guest_stays() -> None:
    block = IPv4Network("10.1.0.0/24")
    port = Port("p", "02:00:00:00:00:01", block[2], "web", "n1")
    network = Network("u", 5, "lan", block, block[1], router_node="n2", ports=(port,))
    desired = NodeNetworks(INSTALLATION, "n1", (network,))
    observed = _as_desired(desired, EMPTY)
    waits = Link(names.tap(INSTALLATION, "p"), "tun", "sf-1a2b3c4d port p", 1500, up=False, carrier=False)
    dead = replace(waits, name="sftdead", alias="sf-1a2b3c4d port q")
    host = replace(observed.namespaces[HOST], links={waits.name: waits, dead.name: dead})
    observed = replace(observed, namespaces={**observed.namespaces, HOST: host})
    (action,) = plan(desired, observed)
    assert (action.verb, action.item) == (Verb.DELETE, dead)
    held = replace(host, links={waits.name: replace(waits, carrier=True)})
    adopted, entry = plan(desired, replace(observed, namespaces={**observed.namespaces, HOST: held}))
    assert (adopted.verb, adopted.item.name) == (Verb.ADOPT, waits.name)  # type: ignore[union-attr]
    assert entry.item == Entry(Kind.FDB, waits.name, port.mac)


def test_only_a_firewall_that_drops_by_policy_gets_a_rule_of_ours() -> None:
    chains = {
        ("ip", "filter", "FORWARD"): Hook("filter", "forward", 0, "drop"),
        ("inet", "filter", "forward"): Hook("filter", "forward", 0, "accept"),
        ("inet", "filter", "input"): Hook("filter", "input", 0, "drop"),
    }
    made = nft.admissions(INSTALLATION, chains, [IPv4Address("172.16.0.2")], ("ip", "inet"))
    assert sorted((a.table, a.chain) for a in made) == [
        ("filter", "FORWARD"),
        ("filter", "FORWARD"),
        ("filter", "input"),
    ]
    assert all(a.rule.mark.startswith("sf-1a2b3c4d:") for a in made)
    assert nft.admissions(INSTALLATION, chains, [], ()) == frozenset()
    six = {("ip6", "filter", hook): Hook("filter", hook, 0, "drop") for hook in ("forward", "input")}
    assert nft.admissions(INSTALLATION, six, [IPv4Address("172.16.0.2")], ("ip", "inet")) == frozenset()
    texts = [made.rule.text for made in nft.admissions(INSTALLATION, six, [], ("ip", "inet", "ip6"))]
    assert sorted(text.split()[0] for text in texts) == ["iifname", "oifname"]


def test_an_uplink_that_is_down_on_the_host_is_raised_though_it_has_no_carrier() -> None:
    network = Network("n", 7, "n", IPv4Network("10.0.0.0/24"), IPv4Address("10.0.0.1"), router_node="n1")
    desired = NodeNetworks(INSTALLATION, "n1", (network,))
    observed = _as_desired(desired, EMPTY)
    host = observed.namespaces[HOST]
    (name,) = host.links
    down = {name: replace(host.links[name], up=False, carrier=False)}
    broken = replace(observed, namespaces={**observed.namespaces, HOST: replace(host, links=down)})
    assert [(action.verb, action.namespace) for action in plan(desired, broken)] == [(Verb.CHANGE, HOST)]
