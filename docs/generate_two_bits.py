"""Writes tables of docs/two-bits.md from the committed records, between their marks: `make docs`; a test compares."""

import json
import re
import runpy
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from scipy.stats import bootstrap

from kvbench.attention.triton import in_copy
from kvbench.measured import Cell, paired, read
from kvbench.report.compare import compare
from kvbench.report.verdicts import Comparison
from kvbench.schemes import Scheme

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "two-bits.md"
renewed = runpy.run_path(str(ROOT / "docs" / "renew.py"))["renewed"]
RESULTS = ROOT / "results"
SEARCHES = {"Qwen2.5-Coder-1.5B": "search-qwen", "SmolLM2-135M": "search-smollm2", "Gemma-3-270M": "search-gemma"}
BUDGETS = (2.25, 2.5, 3.0, 4.0)
INT8 = ("int8_per_token_head", "center:none")
FULL = (5, 11, 17)  # Gemma's layers without a sliding window
SCORE, MARGIN = "exact_match,strict-match", "2pp"
MODELS = {"Qwen": "qwen2.5-coder-1.5b-instruct", "SmolLM2": "smollm2-135m-instruct", "Gemma": "gemma3-270m"}
LAYERS = {"Qwen": ((2, 128),) * 28, "SmolLM2": ((3, 64),) * 30, "Gemma": ((1, 256),) * 18}
PRESETS = (
    "int8_centered",
    "int4_centered_window",
    "tcq4_centered_window",
    "tcq4_balanced_window",
    "tcq4_balanced_full_window",
    "tcq3_centered_window",
    "int2_centered_window",
    "tiers421_centered_window",
    "tiers421_far_centered_window",
    "tcq4321_centered_window",
)
SHAPE = "qwen3-8b (random weights)"
POSITIONS = {"SmolLM2": "smollm2", "Gemma": "gemma3", "Qwen": "qwen"}

FIELD = runpy.run_path(str(ROOT / "docs" / "generate_field.py"))
table, nats, ABSENT, SIGNS = (FIELD[name] for name in ("table", "nats", "ABSENT", "SIGNS"))


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
            if not within:
                continue
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


def kinds() -> str:
    """Each key side's loss of attention on Gemma: in its layers that read a window of tokens, and in the others."""
    run = json.loads((RESULTS / "positions" / "gemma3.json").read_text(encoding="utf-8"))
    rows = []
    for row in run["rows"]:
        dtype, transforms = row["keys"].replace("_per_token_head", "").split("/")
        losses = list(enumerate(row["layers"]["0"]))
        means = [fmean(loss for i, loss in losses if (i in FULL) is full) for full in (False, True)]
        rows.append([f"`{dtype}`, `{transforms}`", *map(nats, means)])
    return table(["keys, transforms", "15 layers that read 512 tokens", "3 layers that read all"], rows)


def records(folder: str, task: str) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """By model, dtype and rotation: the metrics of a task of a run, of its cells alone."""
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for path in (RESULTS / folder / "cells").glob("*/record.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        if row["task"] == task and not row.get("canary") and not row.get("again"):
            metrics = {metric["name"]: metric for metric in row["metrics"]}
            rows[row["model"]["name"], row["dtype"], row["rotation"]] = metrics
    return rows


def name_of(dtype: str, rotation: str) -> list[str]:
    """What a row of a table is called: dtypes and window, the keys' transforms and the values'."""
    key, _, value = rotation.partition(":")
    short = dtype.replace("_per_token_head", "")
    return [f"`{short}`", f"`{key}`", f"`{value or key}`"]


def bits(dtype: str, rotation: str) -> list[float]:
    """True bits a value of 8192 tokens, of each model; designs that were not kept have the bits of `rank`."""
    scheme = Scheme.parse(dtype, re.sub(r"xrank_\w+", "rank", rotation))
    return [bits_on(scheme, model) for model in LAYERS]


def bits_on(scheme: Scheme, model: str) -> float:
    """True bits a value of 8192 tokens."""
    layers = LAYERS[model]
    values = 8192 * 2 * sum(heads * width for heads, width in layers)
    return 8 * scheme.nbytes(layers, 8192, torch.bfloat16) / values


def designs() -> str:
    """Divergence behind 1536 tokens and perplexity's ratio on three models, by bits."""
    found_ = records("two-bits-designs", "divergence")
    rows = []
    for dtype, rotation in dict.fromkeys(place[1:] for place in found_):
        if (dtype, rotation) == ("fp16", "none"):
            continue
        sizes, cells = bits(dtype, rotation), []
        for model in MODELS.values():
            metrics = found_.get((model, dtype, rotation))
            cells.append(nats(metrics["kld@1536-2048"]["value"] if metrics else None))
            cells.append(f"{metrics['ppl_ratio']['value']:.3f}" if metrics else ABSENT)
        shown_bits = " / ".join(f"{size:.2f}" for size in sizes)
        rows.append((sizes, dtype, rotation, [*name_of(dtype, rotation), shown_bits, *cells]))
    heads = ["keys, values", "keys' transforms", "values'", "bits"]
    for model in MODELS:
        heads += [model, "ppl ×"]
    return table(heads, [cells for *_, cells in sorted(rows)])


def far() -> str:
    """Divergence by position over 32k tokens, and the last part's as a multiple of the first one's."""
    found_ = records("two-bits-long", "divergence-32k")
    rows = []
    for (_, dtype, rotation), metrics in sorted(found_.items()):
        if dtype == "fp16":
            continue
        parts = [metric for name, metric in metrics.items() if name.startswith("kld@")]
        values = [part["value"] for part in parts]
        rows.append([*name_of(dtype, rotation), *map(nats, values), f"{values[-1] / values[0]:.2f}"])
    heads = [name[4:] for name in next(iter(found_.values())) if name.startswith("kld@")]
    return table(["keys, values", "keys' transforms", "values'", *heads, "last over first"], rows)


def far_more() -> str:
    """The same of more documents, with the growth's 95 % interval (bootstrap over documents)."""
    rows, heads = [], []
    for cell in read(RESULTS / "two-bits-far").cells:
        parts = {name[4:]: series.values for name, series in cell.series.items() if name.startswith("kld@")}
        first, *_, last = parts.values()
        if last.any():
            test = bootstrap((last, first), _share, paired=True, method="percentile", rng=0)
            low, high = test.confidence_interval
            growth = f"{_share(last, first):.2f} ({low:.2f} to {high:.2f})"
            rows.append([*name_of(cell.dtype, cell.rotation), *(nats(x.mean()) for x in parts.values()), growth])
            heads = list(parts)
    return table(["keys, values", "keys' transforms", "values'", *heads, "last over first"], sorted(rows))


def answers() -> str:
    """GSM8K's share of right answers, and by how many points it differs from 16 bits' and from int8_centered's."""
    run, own = read(RESULTS / "two-bits-tasks"), records("two-bits-tasks", "gsm8k")
    beside = [
        {
            (row.dtype, row.rotation): row
            for row in compare(run, baseline=base, margin=MARGIN).rows
            if row.metric == SCORE
        }
        for base in (None, INT8)
    ]
    rows = []
    for (_, dtype, rotation), metrics in sorted(own.items(), key=lambda item: (-bits(*item[0][1:])[0], item[0])):
        cells = [_beside(found_.get((dtype, rotation))) for found_ in beside]
        share = f"{100 * metrics[SCORE]['value']:.1f} %"
        rows.append([*name_of(dtype, rotation), f"{bits(dtype, rotation)[0]:.2f}", share, *cells])
    heads = ["keys, values", "keys' transforms", "values'", "bits", "right", "beside 16 bits", "beside `int8_centered`"]
    return table(heads, rows)


def _beside(row: Comparison | None) -> str:
    """Points, their interval and the verdict."""
    if row is None or row.difference is None or row.ci_low is None or row.ci_high is None:
        return ABSENT
    points = [f"{100 * x:+.1f}".replace("-", "−") for x in (row.difference, row.ci_low, row.ci_high)]
    return f"{points[0]} ({points[1]} to {points[2]}){SIGNS[row.verdict or '']}"


def needles() -> str:
    """How many of 80 numbers each scheme finds, on each model."""
    found_ = records("two-bits-tasks", "needle")
    rows = []
    for dtype, rotation in sorted({place[1:] for place in found_}, key=lambda place: (-bits(*place)[0], place)):
        cells = []
        for model in MODELS.values():
            metric = found_.get((model, dtype, rotation), {}).get("acc")
            cells.append(f"{round(metric['value'] * metric['n'])}" if metric else ABSENT)
        rows.append([*name_of(dtype, rotation), *cells])
    return table(["keys, values", "keys' transforms", "values'", *MODELS], rows)


def many_needles() -> str:
    """Of 320 numbers, how many SmolLM2 finds under each scheme, by context, and as a share of what 16 bits find."""
    cells = sorted(read(RESULTS / "two-bits-needles").cells, key=lambda cell: (-_size(cell), cell.name))
    exact = cells[0].series["acc"].values
    rows = []
    for cell in cells:
        acc, *by_context = cell.series.values()
        found_ = [str(round(one.values.sum())) for one in (acc, *by_context)]
        share = ABSENT
        if acc.values is not exact:
            test = bootstrap((acc.values, exact), _share, paired=True, method="percentile", rng=0)
            low, high = (f"{100 * x:.1f}" for x in test.confidence_interval)
            share = f"{100 * _share(acc.values, exact):.1f} % ({low} to {high})"
        rows.append([*name_of(cell.dtype, cell.rotation), f"{_size(cell):.2f}", *found_, share])
    contexts = [name.removeprefix("acc@") for name in list(cells[0].series)[1:]]
    heads = ["keys, values", "keys' transforms", "values'", "bits", "found of 320", *contexts, "beside 16 bits"]
    return table(heads, rows)


def _share(a: Any, b: Any, axis: int = -1) -> Any:
    """What a found, as a share of what b found."""
    return a.mean(axis) / b.mean(axis)


def _size(cell: Cell) -> float:
    """Bits a value of a cell, of 8192 tokens."""
    path = RESULTS / "two-bits-needles" / "cells" / cell.name / "record.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["bits_per_value"])


def speeds() -> str:
    """Tokens a second of two models under the presets, and how many tokens 80 GB hold."""
    found_ = records("two-bits-speed", "8 × 8k")
    rows = []
    for model in dict.fromkeys(place[0] for place in found_):
        own = {place[1:]: metrics for place, metrics in found_.items() if place[0] == model}
        exact = own["fp16", "none"]["decode"]["value"]
        for (dtype, rotation), metrics in sorted(own.items(), key=lambda item: item[1]["memory_holds"]["value"]):
            decode, held = (metrics[name]["value"] for name in ("decode", "memory_holds"))
            rates = [f"{metrics['prefill']['value']:,.0f}", f"{decode:,.0f}", f"{decode / exact:.2f}"]
            rows.append([model, *name_of(dtype, rotation)[:2], *rates, f"{held:,.0f}"])
    heads = [
        "model",
        "keys, values",
        "keys' transforms",
        "prefill, tokens/s",
        "decode, tokens/s",
        "× fp16",
        "tokens held",
    ]
    return table(heads, rows)


def reading() -> str:
    """How long a trellis takes to be read, and a decode step over it, beside the decode kernels of the same run."""
    run = json.loads((RESULTS / "reading-h200.json").read_text(encoding="utf-8"))
    rows = []
    for row in run["rows"]:
        predicted = row.get("predicted", {})
        by = max(predicted, key=predicted.__getitem__, default=None)
        said = ABSENT if by is None else f"{predicted[by]:.0f}, {by}"
        rows.append((row["dtype"], not row["way"].startswith("decode"), row["us"], row["way"], said))
    lines = [[f"`{dtype}`", way, f"{us:.1f}", said] for dtype, _, us, way, said in sorted(rows)]
    for row in run["peers"]:
        name = row["dtype"].removesuffix("_per_token_head")
        lines.append([f"`{name}`", "decode, by kvbench's kernel", f"{row['us']:.1f}", ABSENT])
    peer = run["peers"][0]
    lines.append(["bf16", f"decode, {peer['best_16bit_peer']}", f"{peer['best_16bit_us']:.1f}", ABSENT])
    return table(["dtype", "way", "µs", "predicted, by"], lines)


def by_kind() -> str:
    """Gemma with keys by layer: bits, divergence and perplexity's ratio."""
    listed = yaml.safe_load((ROOT / "configs" / "two-bits-gemma.yaml").read_text(encoding="utf-8"))["schemes"]
    found_ = records("two-bits-gemma", "divergence")
    rows = []
    for scheme in map(Scheme.of, listed[1:]):
        own: defaultdict[str, list[str]] = defaultdict(list)
        metrics = found_.get((MODELS["Gemma"], *FIELD["place"](scheme)))
        if metrics is None:
            continue
        for layer in scheme.layers:
            if layer.key:
                own[layer.key.dtype.name].append(str(layer.index))
        rows.append(
            [
                f"`{scheme.key.dtype.name}`, `{scheme.key.name}`",
                f"`{scheme.value.dtype.name}`",
                "; ".join(f"`{name}` in {', '.join(layers)}" for name, layers in own.items()) or "the same",
                scheme.window.label() if scheme.window else ABSENT,
                f"{bits_on(scheme, 'Gemma'):.2f}",
                nats(metrics["kld@1536-2048"]["value"]),
                f"{metrics['ppl_ratio']['value']:.3f}",
            ]
        )
    heads = ["keys", "values", "keys of other layers", "window", "bits", "KLD, 1536 to 2048", "ppl ×"]
    return table(heads, sorted(rows, key=lambda row: (row[4], row)))


@cache
def presets() -> str:
    """What a reader must know of the presets of this page first, from the records of the sections below."""
    loss = {place: value for run in ("field", "two-bits", "two-bits-designs") for place, value in _losses(run).items()}
    answered = {
        (row.dtype, row.rotation): row
        for run in ("schemes", "two-bits-tasks")
        for row in compare(read(RESULTS / run), margin=MARGIN).rows
        if row.metric == SCORE and row.model == MODELS["Qwen"]
    }
    timed = {place[1:]: metrics for place, metrics in records("two-bits-speed", "8 × 8k").items() if place[0] == SHAPE}
    exact = timed["fp16", "none"]
    rows = []
    for name in PRESETS:
        scheme = Scheme.parse(name)
        place = FIELD["place"](scheme)
        copied = any(in_copy(dtype) for dtype in scheme.resolve(torch.bfloat16).dtypes)
        speeds_ = [ABSENT, ABSENT]
        if place in timed:
            ratios = [timed[place][of]["value"] / exact[of]["value"] for of in ("decode", "memory_holds")]
            speeds_ = [ABSENT if copied else f"{ratios[0]:.2f}", f"{ratios[1]:.1f}"]
        rows.append(
            [
                f"`{name}`",
                " / ".join(f"{size:.2f}" for size in bits(*place)),
                *(nats(loss.get((model, *place))) for model in MODELS.values()),
                _beside(answered.get(place)),
                "a 16-bit copy" if copied else "packed rows",
                *speeds_,
            ]
        )
    heads = ["preset", "bits, D=128 / 64 / 256", *(f"KLD, {model}" for model in MODELS), "GSM8K, points"]
    return table([*heads, "kernels read", "× tokens/s", "× tokens held"], rows)


def held() -> str:
    """Divergences of the documents that presets were chosen by, and of as many others, by the first model's loss."""
    runs = ("field", "two-bits", "two-bits-gemma", "two-bits-designs")
    chosen = {place: value for run in runs for place, value in _losses(run).items()}
    others = _losses("two-bits-held")
    rows: dict[tuple[str, str], list[str]] = {}
    for model, dtype, rotation in sorted(others, key=lambda place: others[place]):
        if dtype != "fp16":
            cells = rows.setdefault((dtype, rotation), [ABSENT] * len(MODELS))
            pair = (found_.get((model, dtype, rotation)) for found_ in (chosen, others))
            cells[list(MODELS.values()).index(model)] = ", ".join(map(nats, pair))
    lines = []
    for (dtype, rotation), cells in rows.items():
        short, *layered = dtype.split("+l")
        name, *transforms = name_of(short, rotation)
        lines.append([f"{name}, keys by layer" if layered else name, *transforms, *cells])
    return table(["keys, values", "keys' transforms", "values'", *MODELS], lines)


def _losses(folder: str) -> dict[tuple[str, str, str], float]:
    """By model, dtype and rotation: the divergence behind 1536 tokens."""
    return {place: metrics["kld@1536-2048"]["value"] for place, metrics in records(folder, "divergence").items()}


TABLES = {
    "presets": presets,
    "searches": searches,
    "positions": positions,
    "kinds": kinds,
    "designs": designs,
    "held": held,
    "by_kind": by_kind,
    "far": far,
    "far_more": far_more,
    "answers": answers,
    "needles": needles,
    "many_needles": many_needles,
    "speeds": speeds,
    "reading": reading,
}


def page() -> str:
    """docs/two-bits.md with its tables made anew."""
    made: str = renewed(PAGE, TABLES)
    return made


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
