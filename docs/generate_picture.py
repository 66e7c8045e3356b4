"""Draws docs/trade-off.svg and docs/field.svg from the committed runs of schemes: `make docs`; a test compares."""

import runpy
from dataclasses import replace
from pathlib import Path

from kvbench.render.document import View
from kvbench.render.picture import save
from kvbench.report.page import trade_off
from kvbench.report.page.found import scheme_name
from kvbench.report.page.pictures import short
from kvbench.report.tables import Report

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def of_presets() -> list[View]:
    """KL divergence against bits, a panel a model."""
    views = [
        view for name in ("schemes", "schemes-smollm2") for view in trade_off(Report.read(ROOT / "results" / name))
    ]
    return [view for view in views if "kld" in view.choice["metric"]]


def of_field() -> list[View]:
    """The same of the field's schemes, by the names that docs/field.md has for them."""
    made = runpy.run_path(str(DOCS / "generate_field.py"))
    names = {
        short(scheme_name(*made["place"](scheme))): label.strip("`") for label, scheme in made["schemes"]().items()
    }
    names = {key: name.replace("`", "") for key, name in names.items()}
    return [
        replace(
            view, points=[{**point, "label": names.get(str(point["label"]), point["label"])} for point in view.points]
        )
        for view in trade_off(Report.read(ROOT / "results" / "field"))
    ]


PICTURES = {DOCS / "trade-off.svg": of_presets, DOCS / "field.svg": of_field}

if __name__ == "__main__":
    for path, views in PICTURES.items():
        save(views(), path)
