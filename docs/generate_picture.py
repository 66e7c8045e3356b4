"""Draws README's picture, docs/trade-off.svg, from the committed runs of schemes: `make docs`; a test compares."""

from pathlib import Path

from kvbench.render.document import View
from kvbench.render.picture import save
from kvbench.report.page import trade_off
from kvbench.report.tables import Report

ROOT = Path(__file__).parents[1]
RUNS = ("schemes-qwen", "schemes-smollm2")
PICTURE = ROOT / "docs" / "trade-off.svg"


def views() -> list[View]:
    """KL divergence against bits, a panel a model."""
    return [view for name in RUNS for view in trade_off(Report.read(ROOT / "results" / name))]


if __name__ == "__main__":
    save(views(), PICTURE)
