"""A sweep that is killed loses no finished cell."""

from __future__ import annotations

import kill_sweeps
from campaign import campaign


def test_killed_sweeps_end_with_the_tables_of_one_left_alone(tmp_path, monkeypatch):
    """
    A seeded part of the campaign: SIGKILL at any moment, also of a sweep that goes on.
    """
    monkeypatch.setattr("kvbench.sweep.command.default_device", lambda: "cpu")

    tally = campaign("kills", kill_sweeps.cases(6, 1, tmp_path), seconds=120)

    assert not tally.broken, tally.broken[0]
    assert sum(count for outcome, count in tally.outcomes.items() if outcome.startswith("killed")) >= 3
