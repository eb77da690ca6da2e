"""A few cases of what `python -m soak` does by the hundred: kills, signals, and faults at every call of a save."""

from pathlib import Path

import pytest

from soak import crashes, kills, signals

SAMPLE = 23  # of the calls of all saves, one in so many


@pytest.mark.parametrize("case", [1])
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bytes(case: int, tmp_path: Path) -> None:
    assert kills.run(case, tmp_path) is None


@pytest.mark.parametrize("case", [2])
def test_a_run_that_gets_a_signal_is_saved_and_resumed_exactly(case: int, tmp_path: Path) -> None:
    assert signals.run(case, tmp_path) is None


@pytest.mark.parametrize("case", range(0, crashes.COUNT, SAMPLE))
def test_a_save_that_fails_at_any_call_leaves_the_old_or_the_new_one(case: int, tmp_path: Path) -> None:
    assert crashes.run(case, tmp_path) is None
