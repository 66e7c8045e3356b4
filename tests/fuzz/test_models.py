"""A model's folder is taken as it is, or refused in one line."""

from __future__ import annotations

import damage_models
from campaign import campaign


def test_damaged_models_end_in_an_answer_or_a_line(tmp_path, monkeypatch):
    """
    A seeded part of the campaign: wrong values and types, files lost, cut short or no files.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    tally = campaign("models", damage_models.cases(60, 1, tmp_path), seconds=60)

    assert not tally.broken, tally.broken[0]
    assert tally.outcomes["refused (2)"] > 10
    assert tally.outcomes["taken"] > 10
