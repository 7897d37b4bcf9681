"""The drills' own counting."""

import pytest

from tests import drills


def test_a_sample_is_a_sixteenth_but_at_least_two_and_never_more_than_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SF_TEST_ALL", raising=False)
    assert [drills.rounds(full) for full in (1, 2, 20, 50, 300)] == [1, 2, 2, 3, 18]


def test_the_whole_of_a_drill_runs_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_TEST_ALL", "1")
    assert [drills.rounds(full) for full in (1, 50, 300)] == [1, 50, 300]


def test_one_session_has_one_seed() -> None:
    assert drills.seed() == drills.seed()
