"""Leases that end at once, for tests that have no time to wait for it."""

from functools import partial

from compute.cluster.state.sqlite import SqliteStore


def lapse(store: SqliteStore, lease: int) -> None:
    """Its time is over, and what lived with it is gone."""
    store._submit(partial(store._expired, lease))
