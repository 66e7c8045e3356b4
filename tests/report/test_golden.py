"""The report and the comparison of two committed sweeps, letter for letter: a text that moves is moved on purpose."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from kvbench.measured import read
from kvbench.render import Axis, View, render
from kvbench.render.picture import save
from kvbench.report.compare import compare
from kvbench.report.comparison_text import document
from kvbench.report.tables import Report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


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


def test_the_committed_pages_are_made_again():
    """
    `make pages` gives the report.html beside the records, to the byte.
    """
    pages = runpy.run_path(str(ROOT / "docs" / "generate_pages.py"))["pages"]

    for path, text in pages():
        assert path.read_text(encoding="utf-8") == text, f"{path.parent.name}: run make pages"


def test_the_pictures_are_drawn_again(tmp_path):
    """
    `make docs` draws README's and docs/field.md's, to the byte.
    """
    for path, views in runpy.run_path(str(ROOT / "docs" / "generate_picture.py"))["PICTURES"].items():
        save(views(), tmp_path / path.name)

        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run make docs"


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_picture_is_what_its_name_says(name, begins, tmp_path):
    """
    .svg and .png are drawn; another ending is refused with those two.
    """
    view = View({"model": "toy"}, "", Axis("bits"), Axis("loss"), [{"x": 4, "y": 1, "mark": "worse", "label": "int4"}])
    save([view], tmp_path / name)

    assert (tmp_path / name).read_bytes().startswith(begins)
    with pytest.raises(ValueError, match=r"ends in .svg or .png"):
        save([view], tmp_path / "a.pdf")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures, keep = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), keep(self, *a, **k)))
    return figures


def test_no_name_runs_past_the_axes_or_over_another(tmp_path, drawn):
    """
    Of points in every corner with long names, each name that is drawn lies within the axes, and none over another.
    """
    names = {"label": "int4+w64s4 · center_constant+random hadamard", "mark": "same"}
    points = [{"x": x, "y": y, **names} for x in (2.25, 4.5, 4.51, 8.25) for y in (1e-3, 1e-1)]

    save([View({"model": "toy"}, "", Axis("bits", True), Axis("kld", True), points)] * 2, tmp_path / "a.png")

    for panel in drawn[0].axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        inside = panel.get_window_extent()
        assert len(boxes) >= 4
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_no_name_lies_over_another_mark(tmp_path, drawn):
    """
    Of two schemes so close that one's name would cover the other's mark, the name goes to another place.
    """
    points = [
        {"x": x, "y": y, "label": label, "mark": "same"}
        for x, y, label in ((4, 0.1, "int4"), (4.3, 0.118, "int4_per_channel"), (2, 1, ""), (8, 0.001, ""))
    ]

    save([View({"model": "toy"}, "", Axis("bits", True), Axis("kld", True), points)], tmp_path / "a.png")

    (panel,) = drawn[0].axes
    names = [text for text in panel.texts if text.get_text()]
    marks = panel.transData.transform([(point["x"], point["y"]) for point in points])
    assert {text.get_text() for text in names} == {"int4", "int4_per_channel"}
    assert not any(text.get_window_extent().contains(*mark) for text in names for mark in marks)
