"""Writes the tables of docs/field.md from the committed records, between its marks: `make docs`; a test compares."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench.measured import read
from kvbench.report.compare import compare
from kvbench.report.verdicts import Comparison
from kvbench.schemes import Scheme

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "field.md"
MODELS = {"SmolLM2": "smollm2-135m-instruct", "Gemma": "gemma3-270m", "Qwen": "qwen2.5-coder-1.5b-instruct"}
LAYERS = {"field": ((2, 128),) * 28, "field-cpu": ((4, 64),)}  # of the 1.5B, and one of SmolLM2's
CONTEXTS = {"1k": 1024, "8k": 8192, "32k": 32768}
SIGNS = {"WORSE": " **▼**", "EQUIVALENT": " =", "INCONCLUSIVE": " ?", "BETTER": " **▲**"}
ABSENT = "–"
CPU_METRICS = ("kld", "kld@512-1024", "ppl_ratio", "same_top")

Place = tuple[str, str]  # dtype and rotation, as records have them


def schemes() -> dict[str, Scheme]:
    """The schemes of configs/field.yaml by what the page calls them, without the baseline."""
    listed = yaml.safe_load((ROOT / "configs" / "field.yaml").read_text(encoding="utf-8"))["schemes"]
    return {label(spec): Scheme.of(spec) for spec in listed if spec != "fp16"}


def label(spec: str | Mapping[str, Any]) -> str:
    """`kivi2+w64s4`, or a dtype with centred keys."""
    if isinstance(spec, str):
        return f"`{spec}`"
    window = Scheme.of(spec).window
    name = spec.get("dtype") or spec["scheme"]
    centred = ", centred" if "center" in str(spec.get("rotation")) else ""
    return f"`{name}{'+' + window.label() if window else ''}`{centred}"


def place(scheme: Scheme) -> Place:
    """Where its records are."""
    columns = scheme.columns()
    return columns["dtype"], columns["rotation"]


@cache
def records(folder: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """By model, task, dtype and rotation: the metrics of a run's records."""
    found = {}
    for path in (ROOT / "results" / folder / "cells").glob("*/record.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["model"]["name"], row["task"], row["dtype"], row["rotation"]] = {m["name"]: m for m in row["metrics"]}
    return found


@cache
def comparisons() -> dict[tuple[str, str, str, str, str], Comparison]:
    """By model, task, metric, dtype and rotation: the field's rows of `kvbench compare`."""
    rows = compare(read(ROOT / "results" / "field")).rows
    return {(row.model, row.task, row.metric, row.dtype, row.rotation): row for row in rows}


def bits(scheme: Scheme, folder: str) -> list[str]:
    """Of each context, a 16-bit model's keys and values, tails and first tokens counted."""
    layers = LAYERS[folder]
    values = 2 * sum(heads * width for heads, width in layers)
    return [f"{8 * scheme.nbytes(layers, n, torch.bfloat16) / (n * values):.2f}" for n in CONTEXTS.values()]


def nats(value: float | None) -> str:
    """Three digits, four places at most."""
    return ABSENT if value is None else f"{value:.2f}" if value >= 1 else f"{value:.{3 if value >= 0.1 else 4}f}"


def times(value: float | None) -> str:
    """Of perplexities: the nearer to 1, the more places."""
    return ABSENT if value is None else f"{value:.{0 if value >= 100 else 2 if value >= 1.1 else 3}f}"


def table(head: list[str], rows: list[list[str]], last: str = "---:") -> str:
    """Markdown, the first column to the left, the last as is said."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    marks = [":---", *["---:"] * (len(head) - 2), last]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def on_three_models() -> str:
    """Divergence behind 1536 tokens, and perplexity as a multiple."""
    found = records("field")
    rows = []
    for name, scheme in schemes().items():
        own = [found.get((model, "divergence", *place(scheme)), {}) for model in MODELS.values()]
        cells = [
            show(one.get(metric, {}).get("value"))
            for metric, show in (("kld@1536-2048", nats), ("ppl_ratio", times))
            for one in own
        ]
        rows.append([name, *bits(scheme, "field"), *cells])
    head = ["scheme", "bits: 1k", "8k", "32k", *MODELS, *(f"ppl × {model}" for model in MODELS)]
    return table(head, rows)


def answers() -> str:
    """Needles that were found, GSM8K's share of right answers, and what 16 bits gain or lose beside it."""
    found, compared = records("field"), comparisons()
    rows = []
    for name, scheme in {"`fp16`": Scheme.parse("fp16"), **schemes()}.items():
        cells = []
        for model in MODELS.values():
            metric = found.get((model, "needle", *place(scheme)), {}).get("acc")
            row = compared.get((model, "needle", "acc", *place(scheme)))
            sign = SIGNS.get(row.verdict or "", "") if row else ""
            cells.append(f"{round(metric['value'] * metric['n'])}/{metric['n']}{sign}" if metric else ABSENT)
        rows.append([name, *cells, *_gsm8k(scheme)])
    return table(["scheme", *(f"needles: {model}" for model in MODELS), "GSM8K: Qwen", "points beside 16 bits"], rows)


def _gsm8k(scheme: Scheme) -> Iterator[str]:
    score = "exact_match,strict-match"
    for task in ("gsm8k", "gsm8k-50"):  # what is destroyed answers the first questions alone
        at = (MODELS["Qwen"], task, *place(scheme))
        if (metrics := records("field").get(at)) is None:
            continue
        metric, row = metrics[score], comparisons().get((at[0], task, score, *place(scheme)))
        sign = SIGNS.get(row.verdict or "", "") if row else ""
        yield f"{100 * metric['value']:.1f} % of {metric['n']}{sign}"
        if row is None or row.ci_low is None or row.ci_high is None or row.difference is None:
            yield ABSENT
        else:
            yield f"{_signed(row.difference)} ({_signed(row.ci_low)} to {_signed(row.ci_high)})"
        return
    yield from (ABSENT, ABSENT)


def _signed(share: float) -> str:
    points = f"{100 * share:+.1f}"
    return "0.0" if float(points) == 0 else points.replace("-", "−")


def on_a_cpu() -> str:
    """The divergence of one model with its standard error, the later half's, and what a scheme needs."""
    rows = []
    for name, scheme in schemes().items():
        rows += _on_a_cpu(name, scheme)
        dtype, rotation = place(scheme)
        # of a block format, under a Hadamard rotation of both sides too
        if rotation == "none" and name == f"`{dtype}`":
            rows += _on_a_cpu(f"{name}, Hadamard", Scheme.parse(dtype, "hadamard"))
    head = ["scheme", "1k", "8k", "32k bits", "KLD", "later", "ppl ×", "top", "needs beside its rows"]
    return table(head, rows, last=":---")


def _on_a_cpu(name: str, scheme: Scheme) -> list[list[str]]:
    metrics = records("field-cpu").get((MODELS["SmolLM2"], "divergence", *place(scheme)))
    if metrics is None:
        return []
    (mean, later, ratio, top), error = (metrics[key]["value"] for key in CPU_METRICS), metrics["kld"]["stderr"]
    shown = [f"{mean:.{digits(mean)}f} ± {error:.{digits(mean)}f}", f"{later:.{digits(later)}f}"]
    return [[name, *bits(scheme, "field-cpu"), *shown, f"{ratio:.3f}", f"{top:.1f} %", needs(scheme)]]


def digits(value: float) -> int:
    """Places of a divergence: more, the smaller it is."""
    return 5 if value < 0.001 else 4 if value < 0.1 else 3


def needs(scheme: Scheme) -> str:
    """What a scheme keeps or learns beside its rows."""
    window = scheme.window
    recent = 0 if window is None or window.recent is None else window.recent * window.page
    sinks = window.sinks if window else 0
    parts = [
        "a text" if scheme.learns else "",
        f"last {recent} to {recent + window.page - 1} tokens in 16 bits" if window and recent else "",
        f"first {sinks}" + ("" if recent else " in 16 bits") if sinks else "",
    ]
    return ", ".join(filter(None, parts)) or ABSENT


TABLES = {"three models": on_three_models, "answers": answers, "a cpu": on_a_cpu}


def page() -> str:
    """docs/field.md with its tables made anew."""
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
