"""A damaged run folder is read as it was, or a line names what is not as it was written."""

from __future__ import annotations

import damage_folders
from campaign import campaign


def test_damaged_folders_end_in_the_same_tables_or_a_line(tmp_path, monkeypatch):
    """
    A seeded part of the campaign: bits, ends, values, types, columns, and what is no file.
    """
    monkeypatch.setattr("kvbench.sweep.command.default_device", lambda: "cpu")
    monkeypatch.setattr(damage_folders, "COMMAND_LINE", 10**9)

    tally = campaign("folders", damage_folders.cases(20, 1, tmp_path), seconds=60)

    assert not tally.broken, tally.broken[0]
    assert tally.outcomes["named in a line"] > 3
    assert tally.outcomes["refused"] > 1
