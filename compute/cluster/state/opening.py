"""Which engine keeps the state, and whether the members of an etcd are well. Only for that is etcd3gw needed."""

from collections.abc import Iterator
from functools import partial
from timeit import repeat

from compute.cluster.state.protocol import StateStore
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import ComputeError, Invalid

SLOW_MS = 150
"""A member that takes longer for what it asks the others about, three times in a row, is said to be slow."""


def open_state(config: Config) -> StateStore:
    """Raises Unavailable, Conflict (a newer version's), Invalid (no etcd's URL), ComputeError (damage)."""
    if not config.state:
        return SqliteStore(config.state_dir / "sf.db")
    try:
        from compute.cluster.state.etcd import EtcdStore
    except ImportError as err:
        raise Invalid(f"state is {config.state}: {err}", hint="pip install 'sf-cloud[etcd]'") from err
    return EtcdStore(config.state, *config.state_access)


def state_members(config: Config) -> Iterator[tuple[str, str]]:
    """What is seen of each member of an etcd, and what mends it, "" where it is well."""
    from compute.cluster.state.gateway import Gateway

    gateway = Gateway(config.state, *config.state_access)
    for member in gateway.members:
        try:
            found = gateway.ask_one(member, "maintenance/status", {})
            look = partial(gateway.ask_one, member, "kv/range", {"key": "AA==", "count_only": True})
            took_ms, mib = 1000 * min(repeat(look, number=1, repeat=3)), int(found.get("dbSize", 0)) >> 20
            trouble = ", ".join(found.get("errors", []))
            cure = "etcdctl defrag; a larger quota" if trouble else "a faster disk, or way to its peers"
            words = f"{member.base_url}: {trouble or 'answers'} in {took_ms:.0f} ms, {mib} MiB"
            yield words, cure if trouble or took_ms > SLOW_MS else ""
        except ComputeError as err:
            yield f"{err}", err.hint or "start etcd there: most of its members must run"
