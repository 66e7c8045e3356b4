"""Writes the page of each committed sweep, results/NAME/report.html: `make pages`; a test compares."""

from collections.abc import Iterator
from pathlib import Path

from kvbench.render import render
from kvbench.report.page import page
from kvbench.report.tables import Report

RESULTS = Path(__file__).parents[1] / "results"
# with the H100's kernels beside accuracy that was measured on it
SWEEPS = {"qwen": "kernels-h100", "schemes-qwen": "kernels-h100", "quickstart": None, "field-cpu": None}


def pages() -> Iterator[tuple[Path, str]]:
    """Each page's place and text."""
    for name, kernels in SWEEPS.items():
        report = Report.read(RESULTS / name, RESULTS / kernels if kernels else None)
        yield RESULTS / name / "report.html", render(page(report), "html")


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
