"""Writes the engine's times into docs/method.md from the committed records: `make docs`; a test compares."""

import json
import runpy
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "method.md"
renewed = runpy.run_path(str(ROOT / "docs" / "renew.py"))["renewed"]
ABSENT = "–"
# a row's name, its record in results/hflm, its task there
WHOLE = (
    ("ARC-Easy", "engine-h100-2.json", "arc_easy"),
    ("PIQA", "engine-h100-2.json", "piqa"),
    ("PIQA again", "engine-h100-3.json", "piqa"),
    ("LAMBADA", "engine-h100-3.json", "lambada_openai"),
    ("GSM8K", "engine-h100-1.json", "gsm8k"),
    ("ARC-Easy, H200", "engine-h200.json", "arc_easy"),
    ("PIQA, H200", "engine-h200.json", "piqa"),
    ("PIQA, H200, again", "engine-h200-piqa-2.json", "piqa"),
    ("PIQA, H200, once more", "engine-h200-piqa-3.json", "piqa"),
    ("LAMBADA, H200", "engine-h200.json", "lambada_openai"),
    ("GSM8K, 1.5B, H200", "engine-h200-gsm8k.json", "gsm8k"),
    ("ARC-Easy, H200, in turn", "engine-h200-in-turn.json", "arc_easy"),
    ("PIQA, H200, in turn", "engine-h200-in-turn.json", "piqa"),
    ("LAMBADA, H200, in turn", "engine-h200-in-turn.json", "lambada_openai"),
    ("GSM8K, 1.5B, H200, in turn", "engine-h200-in-turn-gsm8k.json", "gsm8k"),
)
CELLS = ("fp16", "A/A", "int8", "int4", "int2")
# a design as the record names it, what it is, and the seconds by which it was to be faster
DESIGNS = (
    ("as before", "none", ABSENT),
    ("products apart", "all but products of one input as one", "0.11"),
    ("captures wait", "all but captures that don't wait for the GPU", "0.25"),
    ("blocks of 16", "all but blocks of 8 steps", "0.04"),
    ("graphs by quarters", "all but smaller graphs at half the rows", "0.03"),
    ("all", "all", ABSENT),
    ("passes of 16384", "all, and passes of 16384 tokens", "0.03"),
)
WORKS = (("ARC-Easy", "arc_easy"), ("PIQA", "piqa"), ("LAMBADA", "lambada_openai"))


def rows(*path: str) -> list[dict[str, Any]]:
    """The rows of a record in results/."""
    found: list[dict[str, Any]] = json.loads(ROOT.joinpath("results", *path).read_text(encoding="utf-8"))["rows"]
    return found


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines]).replace("|  |", "| |")


def figure(value: float) -> str:
    """Seconds in as many digits as they are known."""
    return f"{value:.2f}" if value < 3 else f"{value:.1f}"


def whole() -> str:
    """Seconds of whole tasks, in the model alone in brackets; HFLM's at the batch size at which it was fastest."""
    lines = []
    for name, file, task in WHOLE:
        own: dict[str, dict[str, Any]] = {}
        theirs: list[dict[str, Any]] = []
        for row in rows("hflm", file):
            if row["task"] == task and row["cell"].startswith("HFLM"):
                theirs.append(row)
            elif row["task"] == task:
                own["A/A" if row["cell"] in own else row["cell"]] = row
        best = min(theirs, key=lambda row: row["seconds"])
        size = best["cell"].split()[-1] if "batch" in best["cell"] else ABSENT
        shown = [f"{figure(row['seconds'])} ({figure(row['model_seconds'])})" for row in [best]]
        for cell in CELLS:
            row = own.get(cell)
            shown.append(f"{figure(row['seconds'])} ({figure(row['model_seconds'])})" if row else ABSENT)
        times = best["seconds"] / own["fp16"]["seconds"]
        lines.append([name, size, *shown, f"{times:.1f} ×"])
    return table(["", "HFLM's batch", "HFLM", *CELLS, "fp16 against HFLM"], lines)


def works() -> str:
    """Of `score`'s seconds those in which the GPU works."""
    found = {(row["task"], row["cell"]): row for row in rows("host", "busy-h200.json")}
    cells, lines = ("fp16", "int8", "int4"), []
    for name, task in WORKS:
        shown = [found.get((task, cell)) for cell in cells]
        if any(shown):
            lines.append(
                [name]
                + [f"{r['busy']:.3f} of {r['wall']:.3f}: {100 * r['share']:.0f} %" if r else ABSENT for r in shown]
            )
    return table(["GPU's seconds of all", *cells], lines)


def long() -> str:
    """A decode step of many long requests, and all of it."""
    lines = []
    for row in rows("long", "qwen3-8b-h200.json"):
        of = row.get("step_ms_of", {}).get("attention", row.get("attention_ms"))
        lines.append(
            [
                row["cell"],
                f"{row['step_ms']:.2f}",
                f"{row['decode_ratio']:.2f}",
                f"{of:.2f}" if of else ABSENT,
                f"{row['prefill_seconds']:.2f}",
                f"{row['seconds']:.2f}",
            ]
        )
    head = ["", "a decode step, ms", "× fp16", "attention of it, ms", "prompts, s", "all with 65 tokens, s"]
    return table(head, lines)


def designs() -> str:
    """Seconds of GSM8K's answers under what was tried: medians of three."""
    tried = rows("checks-h200", "gsm8k-designs.json")[2:]  # the first two runs compiled
    columns = ("seconds", "prefill_seconds", "decode_seconds", "capture_seconds")
    lines = []
    for name, what, faster in DESIGNS:
        own = [row for row in tried if row["design"] == name]
        lines.append([what, *(f"{median(row[column] for row in own):.2f}" for column in columns), faster])
    return table(["designs", "seconds", "prompts", "steps", "captures", "was to gain"], lines)


TABLES = {"whole": whole, "works": works, "long": long, "designs": designs}


def page() -> str:
    """docs/method.md with its tables made anew."""
    made: str = renewed(PAGE, TABLES)
    return made


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
