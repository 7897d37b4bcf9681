"""The table of an instance's states."""

import pytest

from compute.cluster.reports import TRANSITIONS, path_to
from compute.wire.spec import InstanceState

S = InstanceState


def test_every_state_can_still_be_deleted_but_the_deleted_one() -> None:
    for state, following in TRANSITIONS.items():
        reachable = state in (S.DELETE_WAIT, S.DELETED) or S.DELETE_WAIT in following
        assert reachable, state
    assert TRANSITIONS[S.DELETED] == frozenset()


def test_every_error_state_leads_to_error() -> None:
    for state in S:
        if state.value.endswith("-error"):
            assert S.ERROR in TRANSITIONS[state]


@pytest.mark.parametrize(
    ("now", "reported", "path"),
    [
        (S.INITIAL, S.CREATED, [S.PREFLIGHT, S.CREATING, S.CREATED]),
        (S.CREATING, S.CREATED, [S.CREATED]),
        (S.CREATING, S.CREATING_ERROR, [S.CREATING_ERROR]),
        (S.CREATED, S.ERROR, [S.CREATED_ERROR, S.ERROR]),
        (S.CREATED, S.CREATING, []),
        (S.CREATED, S.CREATED, []),
        (S.CREATED, S.DELETED, []),
        (S.DELETE_WAIT, S.CREATED, []),
        (S.DELETE_WAIT, S.DELETED, [S.DELETED]),
        (S.DELETED, S.CREATED, []),
        (S.ERROR, S.CREATED, []),
    ],
)
def test_a_report_moves_an_instance_only_along_the_table(
    now: InstanceState, reported: InstanceState, path: list[InstanceState]
) -> None:
    assert path_to(now, reported) == path
