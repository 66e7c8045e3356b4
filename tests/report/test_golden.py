"""The report and the comparison of two committed sweeps, letter for letter: a text that moves is moved on purpose."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvbench.measured import read
from kvbench.render import render
from kvbench.report.compare import compare
from kvbench.report.comparison_text import document
from kvbench.report.tables import Report

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", ["quickstart", "matrix-gemma3"])
def test_a_committed_comparison_is_made_again(name):
    """
    `kvbench compare results/NAME --format md` gives the compare.md beside the records.
    """
    measured = read(RESULTS / name)

    assert render(document(measured, compare(measured)), "md") == (RESULTS / name / "compare.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", ["quickstart", "throughput", "peers-h100"])
def test_a_committed_report_is_made_again(name, tmp_path):
    """
    `kvbench report results/NAME` gives report.md, .csv and .json as they were committed: a sweep's with verdicts,
    speeds alone, and kernels.
    """
    folder = tmp_path / name
    shutil.copytree(RESULTS / name, folder)

    paths = Report.read(folder).write()

    for path in paths:
        assert path.read_text(encoding="utf-8") == (RESULTS / name / path.name).read_text(encoding="utf-8"), path.name
