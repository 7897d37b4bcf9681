"""The data plane of one node: the public face of this package.

Every method is synchronous and may be repeated; what was half done by a call that was killed, the next `apply` sees
and finishes. One lock per Plane, so that calls from several threads come one after the other.
"""

import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

from net.doctor import Finding, describe, examine
from net.errors import Conflict, Failed, Invalid, NetError
from net.kernel import dnsmasq, netns, taps
from net.kernel.netns import NetlinkError, Netns
from net.kernel.observe import observe
from net.plan import names, nft, ruleset
from net.plan.facts import HOST, Admission, Dnsmasq, Entry, Facts, Kind, Link, Observed
from net.plan.model import Network, NodeNetworks, Port
from net.plan.plan import Action, Space, Transaction, Verb, diff, plan
from net.plan.target import VXLAN_OVERHEAD_BYTES, on_lan, port_link, unfit, without_routers


class Plane:
    """Networks of one installation on this node. `state_dir`/net holds what dnsmasq reads."""

    def __init__(self, installation: str, state_dir: Path) -> None:
        if not re.fullmatch(r"[0-9a-f]{8}", installation):
            raise Invalid(f"an installation's id has 8 lower-case hex digits, not {installation!r}")
        self.installation = installation
        self._directory = state_dir.resolve() / "net"
        self._lock = threading.RLock()
        self._announce: dict[Entry, int] = {}
        self._taps: dict[str, str] | None = None  # tap to namespace, from the last look
        self._holders = taps.Holders()

    def observe(self, underlay: IPv4Address = IPv4Address("127.0.0.1")) -> Observed:
        """What is there of ours, without who listens on the host."""
        with self._lock:
            return self._look(underlay, self._running())

    def apply(self, desired: NodeNetworks) -> list[Action]:
        """Makes this node what it must be and says what that took; nothing when it was so already.

        A network that cannot be made does not hinder the others: they are done, then Failed names it.
        """
        if desired.installation != self.installation:
            raise Invalid(f"desired state is {desired.installation}'s, this is {self.installation}")
        with self._lock:
            self._announce_again()
            observed = self._look(desired.underlay, self._end_strays())
            here = (
                port_link(desired, n, p) for n in desired.networks for p in n.ports if p.node == desired.node
            )
            if back := self._holders.put_back({link.name: link.alias for link in here}, observed):
                observed = self._look(desired.underlay, self._running())
            if any(network.led() for network in desired.networks):  # 10 ms, which many nodes need not spend
                observed = replace(observed, listening=netns.listening())
            told = {n.uuid: why for n in desired.networks if (why := unfit(desired, observed, n))[0]}
            odd = (n for n in desired.networks if n.uuid in told)
            # Those that are here stay as they are.
            refused = [n for n in odd if self.namespace(n) not in observed.namespaces]
            kept = tuple(n for n in desired.networks if n not in refused)
            actions = plan(replace(desired, networks=kept), observed)
            self._carry_out(actions)
            for network in (*refused, *(n for n, _ in on_lan(desired).values() if n.uuid in told)):
                text, hint = told[network.uuid]
                raise Failed(f"{network.name}: {text}", hint=hint)
            return [Action(Verb.ADD, HOST, Link(name, "tun", "", 0)) for name in back] + actions

    def drop_routers(self) -> list[Action]:
        """Stops routing on this node, whatever was desired last: another may have taken over. Guests' ports stay."""
        with self._lock:
            observed = self.observe()
            actions = diff(without_routers(observed), observed)
            self._carry_out(actions)
            return actions

    def remove_all(self) -> None:
        """Removes everything that carries this installation's id, and nothing else: the node's package goes."""
        with self._lock:
            observed = self.observe()
            self._carry_out(diff({HOST: Facts()}, observed, guests_too=True))
            for running in self._running():
                dnsmasq.stop(running.pid)
            dnsmasq.Daemon(self._directory, "").forget()  # of all

    def doctor(self, desired: NodeNetworks) -> list[Finding]:
        """What is not as desired, in words; nothing is changed."""
        with self._lock, Netns(HOST) as host:
            observed = replace(self.observe(desired.underlay), listening=netns.listening())
            return examine(desired, observed, host.nft("list ruleset", json=True))

    def largest_mtu(self, underlay: IPv4Address) -> int:
        """The largest packet of a guest that the mesh carries unfragmented, 0 where nothing has that address."""
        room = self.observe(underlay).mtu_bytes
        return room - VXLAN_OVERHEAD_BYTES if room else 0

    def namespace(self, network: Network) -> str:
        """The network's namespace on this node, for `ip netns exec`; the host's own for one on its bridge."""
        return HOST if network.bridge else names.namespace(self.installation, network.vni)

    # A guest's port

    def create_tap(self, port: Port) -> str:
        """A persistent tap in the host's namespace, down, for a guest that is about to be started paused.

        One that a stopped guest left in its network is made anew; Conflict where a process still holds it.
        """
        name = port.tap or names.tap(self.installation, port.uuid)
        alias = f"{names.table(self.installation)} port {port.uuid}"
        with self._lock, _refusals(f"the tap {name} cannot be made"):
            self._clear(name, alias)
            taps.create_tap(name, alias)
            return name

    def adopt_tap(self, network: Network, port: Port) -> None:
        """Moves a port's tap into its network's namespace: filters first, then the bridge, then up."""
        name = port.tap or names.tap(self.installation, port.uuid)
        desired = NodeNetworks(self.installation, port.node)
        with (
            self._lock,
            _refusals(f"the tap {name} cannot be moved"),
            Netns(HOST) as host,
            Netns(self.namespace(network)) as space,
        ):
            bridge = space.link(network.bridge or names.bridge(network.vni))
            if bridge is None and network.bridge:
                hint = "make it, or run the guest elsewhere"
                raise Failed(f"this node has no bridge {network.bridge}", hint=hint)
            if bridge is None:
                raise Failed(f"network {network.name} is not on this node yet", hint="apply it first")
            network = replace(network, mtu_bytes=bridge.mtu_bytes) if network.bridge else network
            if port.mac in names.own_macs(self.installation, network.vni, [port.node]):
                raise Conflict(f"{port.mac} is the MAC address of network {network.name} itself")
            self._pin(space, network, port, name)
            if space.link(name) is None:
                host.move_link(name, space)
            if self._taps is not None:
                self._taps[name] = space.name
            link = port_link(desired, network, replace(port, tap=name))
            space.change_link(link)
            if not network.bridge:
                space.entry(Entry(Kind.FDB, name, port.mac), add=True)

    def remove_tap(self, port: Port) -> None:
        """Removes a port's tap wherever it is, held or not. Twice is once. Its filters go when it is not desired."""
        name = port.tap or names.tap(self.installation, port.uuid)
        with self._lock, _refusals(f"the tap {name} cannot be removed"):
            self._clear(name)

    # How it is done

    def _running(self) -> list[dnsmasq.Running]:
        return dnsmasq.running(names.namespace_prefix(self.installation))

    def _pin(self, space: Netns, network: Network, port: Port, tap: str) -> None:
        """This port's filters, where the last apply did not know the port yet."""
        own = nft.ports_table(self.installation, {tap: (network, port)})
        have = space.tables(f"list table bridge {own.name}")["bridge", own.name]
        both = {
            n: replace(e, items=e.items | had.items)
            for n, e in own.elements.items()
            if (had := have.elements.get(n, e))
        }
        chains, counters = {**have.chains, **own.chains}, have.counters | own.counters
        want = replace(own, chains=chains, elements={**have.elements, **both}, counters=counters)
        space.nft(ruleset.script(want, have))

    def _carry_out(self, actions: Iterable[Action]) -> None:
        """One namespace after the other; what fails in one does not hinder the others."""
        failed: dict[str, NetError] = {}
        with Netns(HOST) as host:
            for name, group in itertools.groupby(actions, key=lambda action: action.namespace):
                if name not in failed:
                    try:
                        self._carry_out_in(name, group, host)
                    except NetError as error:
                        failed[name] = error
        if failed:
            first = next(iter(failed.values()))
            said = "; ".join(f"{name or 'host'}: {error}" for name, error in failed.items())
            raise Failed(said, hint=first.hint) from first

    def _carry_out_in(self, name: str, actions: Iterable[Action], host: Netns) -> None:
        with ExitStack() as opened:
            space = host if name == HOST else None
            for action in actions:
                with _refusals(describe(action)):
                    if isinstance(action.item, Space) and action.verb is Verb.DELETE:
                        netns.remove_namespace(name)
                        dnsmasq.Daemon(self._directory, name).forget()
                        space = None
                        continue
                    if isinstance(action.item, Space):
                        netns.create_namespace(name)
                    if space is None:
                        space = opened.enter_context(Netns(name))
                    self._do(action, space, host)

    def _do(self, action: Action, space: Netns, host: Netns) -> None:
        add = action.verb is not Verb.DELETE
        match action.item:
            case Link() as link if not add:
                space.delete_link(link.name)
            case Link() as link:
                if action.verb is Verb.ADOPT:
                    host.move_link(link.name, space)
                elif action.verb is Verb.ADD:
                    space.create(link, host)
                space.change_link(link, action.had if isinstance(action.had, Link) else None)
            case Entry() as item:
                space.entry(item, add=add)
                if item.kind is Kind.PROXY:
                    self._announce.pop(item, None)
                    if add:
                        self._announce[item] = 3
                        self._announce_again(item)
            case Transaction() as item:
                space.nft(item.commands)
            case Admission() as item:
                space.nft(ruleset.admission(item, add=add))
            case Space():
                space.raise_loopback()
            case Dnsmasq() if not add:
                self._stop(space.name)
            case Dnsmasq() as item:
                self._serve(space, item, action.had if isinstance(action.had, Dnsmasq) else None)

    def _serve(self, space: Netns, wanted: Dnsmasq, had: Dnsmasq | None) -> None:
        daemon = dnsmasq.Daemon(self._directory, space.name)
        kept = set(wanted.hosts.splitlines())
        added = had and had.config == wanted.config and kept.issuperset(had.hosts.splitlines())
        for running in dnsmasq.running(space.name) if added else ():
            daemon.reload(wanted, running.pid)
            return
        if had is not None:
            self._stop(space.name)
        with space.entered():
            daemon.start(wanted)

    def _look(self, underlay: IPv4Address, processes: list[dnsmasq.Running]) -> Observed:
        with _refusals("the state of the network cannot be read"):
            seen = observe(self.installation, self._directory, underlay, processes)
        spaces = ((name, facts.links.values()) for name, facts in seen.namespaces.items())
        self._taps = {link.name: name for name, links in spaces for link in links if link.kind == "tun"}
        return seen

    def _end_strays(self) -> list[dnsmasq.Running]:
        """A dnsmasq that outlived the name of its namespace holds it, with the VNI of its mesh device."""
        kept = []
        for running in self._running():
            path = netns.DIRECTORY / running.namespace
            if path.exists() and path.stat().st_ino == running.netns:
                kept.append(running)
            else:
                dnsmasq.stop(running.pid)
        return kept

    def _clear(self, name: str, alias: str = "") -> None:
        """Removes a tap where it was seen last, and in the host. With the alias of a port that is to have it anew: one
        without an alias, too, but none that a process holds."""
        if self._taps is None:
            self.observe()
        seen = (self._taps or {}).get(name, HOST)
        for space_name in {seen, HOST} if (netns.DIRECTORY / seen).exists() else {HOST}:
            with Netns(space_name) as space:
                if (held := space.link(name)) is None:
                    continue
                if alias and held.alias not in ("", alias):
                    raise Conflict(f"there is a device {name} which is not this port's: {held.alias!r}")
                if alias and held.carrier:
                    raise Conflict(f"{name} is held by a running guest", hint="stop the guest first")
                if not alias and not held.alias.startswith(f"{names.table(self.installation)} "):
                    raise Conflict(f"the device {name} is not ours: alias {held.alias!r}")
                space.delete_link(name)

    def _stop(self, namespace: str) -> None:
        for running in dnsmasq.running(namespace):
            dnsmasq.stop(running.pid)
        dnsmasq.Daemon(self._directory, namespace).forget()

    def _announce_again(self, *proxies: Entry) -> None:
        """A neighbour ignores a second MAC within a second of the first, so floating IPs are announced when they
        come and at the next two reconciles."""
        for proxy in proxies or tuple(self._announce):
            with suppress(OSError):  # a device that is down or gone has nobody to tell
                netns.announce(proxy.dev, proxy.key)
            self._announce[proxy] -= 1
            if not self._announce[proxy]:
                del self._announce[proxy]


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """The kernel's errors as ours."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        raise Failed(f"{what}: {error}") from error
