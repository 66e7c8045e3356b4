"""Writes tables of docs/two-bits.md from the committed records, between their marks: `make docs`; a test compares."""

import json
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

from kvbench.measured import paired, read

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "two-bits.md"
RESULTS = ROOT / "results"
SEARCHES = {"Qwen2.5-Coder-1.5B": "search-qwen", "SmolLM2-135M": "search-smollm2"}
BUDGETS = (2.25, 2.5, 3.0, 4.0)
POSITIONS = {"SmolLM2": "smollm2", "Gemma": "gemma3", "Qwen": "qwen"}

FIELD = runpy.run_path(str(ROOT / "docs" / "generate_field.py"))
table, nats, ABSENT = FIELD["table"], FIELD["nats"], FIELD["ABSENT"]


@cache
def found(folder: str) -> list[dict[str, Any]]:
    """The rows that a search verified, in the order of their bits."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / folder / "search.json").read_text(encoding="utf-8"))
    return rows


@cache
def measured(folder: str) -> dict[str, Any]:
    """A run's cells, by name."""
    return {cell.name: cell for cell in read(RESULTS / folder).cells}


def least(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the smallest divergence."""
    return min(rows, key=lambda row: row["kld"], default=None)


def shown(row: dict[str, Any] | None) -> str:
    """A scheme by its dtype, its divergence, and its bits."""
    if row is None:
        return ABSENT
    dtype = row["dtype"].replace("_per_token_head", "")
    return f"{nats(row['kld'])}: `{dtype}`, {row['bits_per_value']:.2f}"


def searches() -> str:
    """For each model and budget: the best listed scheme, the best pair of sides and the best by layer; the gain."""
    lines = []
    for model, folder in SEARCHES.items():
        if not (RESULTS / folder).exists():
            continue
        for budget in BUDGETS:
            within = [row for row in found(folder) if row["bits_per_value"] <= budget]
            kinds = [
                least([row for row in within if row["from"] == kind])
                for kind in ("listed", "keys and values", "by layer")
            ]
            uniform, best = kinds[0], least(within)
            gain = "nothing"
            if uniform is not None and best is not None and best is not uniform:
                a, b = (measured(folder)[row["cell"]].series[row["metric"]] for row in (best, uniform))
                test = paired(a, b)
                less = f"{100 * (1 - best['kld'] / uniform['kld']):.0f} %"
                gain = f"{less}: {_signed(test.ci_low)} to {_signed(test.ci_high)}"
            lines.append([model, f"{budget:g}", *map(shown, kinds), gain])
    return table(
        ["model", "budget", "best listed", "best pair", "best by layer", "gained, 95 % interval"], lines, last=":---"
    )


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def positions() -> str:
    """Each key side's loss of attention at the text's positions and behind, of each model."""
    runs = {model: RESULTS / "positions" / f"{file}.json" for model, file in POSITIONS.items()}
    read_ = {model: json.loads(path.read_text(encoding="utf-8")) for model, path in runs.items() if path.exists()}
    rows: dict[str, list[str]] = {}
    heads = []
    for model, run in read_.items():
        heads += [f"{model}, at {at}" for at in run["rows"][0]["kld"]]
    for model, run in read_.items():
        for row in run["rows"]:
            dtype, transforms, *more = row["keys"].replace("_per_token_head", "").split("/")
            name = f"`{dtype}`, `{transforms}`{', ' + more[0] if more else ''}"
            rows.setdefault(name, [ABSENT] * len(heads))
            for at, value in row["kld"].items():
                rows[name][heads.index(f"{model}, at {at}")] = nats(value)
    return table(["keys, transforms", *heads], [[name, *cells] for name, cells in rows.items()])


TABLES = {"searches": searches, "positions": positions}


def page() -> str:
    """docs/two-bits.md with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        text = re.sub(
            rf"(<!-- {name}: [^\n]*-->\n\n).*?(\n\n<!-- end of {name} -->)",
            lambda m, made=made: m[1] + made() + m[2],
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
