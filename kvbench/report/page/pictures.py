"""The pictures of a page: size against loss, each difference with its interval, loss along a text, needles."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.render import Axis, Plot, View
from kvbench.report.page.found import MARKS, Found, said, scheme_name
from kvbench.report.verdicts import Comparison
from kvbench.results import Record, shown_number

Point = dict[str, Any]
FRONTIER = (
    "The line joins the caches of which no smaller one loses less, by the numbers alone: where intervals overlap, "
    "caches can't be told apart. Dashed: the margin. Arrow keys go from point to point."
)


# ---- scales: what a difference is drawn as


def drawn(row: Comparison) -> tuple[float, float | None, float | None]:
    """A difference and its interval on the scale of its axis: points, nats, or times the baseline."""
    values = (row.difference, row.ci_low, row.ci_high)
    if row.unit == "relative":
        return tuple(None if value is None else 1 + value for value in values)  # type: ignore[return-value]
    factor = 100 if row.unit == "share" else 1
    return tuple(None if value is None else factor * value for value in values)  # type: ignore[return-value]


def axis(row: Comparison, loss: bool = False) -> Axis:
    """The axis of a metric's differences. loss: upwards is worse, else as the metric goes."""
    margin = row.margin
    if row.unit == "relative":
        return Axis(f"{row.metric}, × the baseline's", True, () if margin is None else (1 / (1 + margin), 1 + margin))
    if row.unit == "nats" and row.test == "interval":
        return Axis(f"{row.metric}, nats", True, () if margin is None else (margin,))
    unit = {"share": "points", "pp": "points"}.get(row.unit, row.unit)
    what = "loss" if loss else "difference"
    margin = 100 * margin if margin is not None and row.unit == "share" else margin
    return Axis(
        f"{row.metric}: {what}{f' in {unit}' if unit else ''}", False, () if margin is None else (-margin, margin)
    )


# ---- size against loss


def pareto(found: Found) -> Plot | None:
    """True bits a value against loss, a picture a model and metric; KL divergence first."""
    views = [
        view
        for (model, task, metric), rows in _by_metric(found).items()
        if (view := _trade(found, model, f"{task} {metric}", rows))
    ]
    views.sort(key=lambda view: "kld" not in view.choice["metric"])
    return Plot("Size against loss", "points", views, [FRONTIER]) if views else None


def _by_metric(found: Found) -> dict[tuple[str, str, str], list[Comparison]]:
    groups: dict[tuple[str, str, str], list[Comparison]] = defaultdict(list)
    for row in found.rows:
        if row.difference is not None and row.verdict != "INVALID" and math.isfinite(row.difference):
            groups[row.model, found.task(row), row.metric].append(row)
    return dict(sorted(groups.items(), key=lambda item: found.tasks.index(item[0][1])))


def _trade(found: Found, model: str, metric: str, rows: Sequence[Comparison]) -> View | None:
    loss = axis(rows[0], loss=True)
    points = [point for row in rows if (point := _loss(found, row, loss.log))]
    base = found.baseline(model)
    origin = 0.0 if not loss.log else 1.0 if rows[0].unit == "relative" else None
    if base and base.bits and origin is not None:
        points.append(
            {"x": base.bits, "y": origin, "mark": "void", "label": base.name, "text": f"{base.name}: the baseline"}
        )
    least = math.inf
    for point in sorted(points, key=lambda point: (point["x"], point["y"])):
        if point["y"] < least:
            least = point["y"]
            point["front"] = True
    if len(points) < 2:
        return None
    front = sorted((point for point in points if point.get("front")), key=lambda point: -point["x"])
    says = f"{model}, {metric}. On the frontier, from large to small: {'; '.join(point['text'] for point in front)}."
    if origin is None:
        says += " The baseline, at 0, is below any logarithmic axis."
    return View({"model": model, "metric": metric}, says, Axis("bits a value, every scale counted", True), loss, points)


def _loss(found: Found, row: Comparison, log: bool) -> Point | None:
    bits = found.bits(row)
    value, low, high = drawn(row)
    if row.unit != "relative" and row.higher_is_better:
        value = -value
        low, high = (None if high is None else -high), (None if low is None else -low)
    if not bits or (log and value <= 0):
        return None
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        low = high = None
    name = scheme_name(row.dtype, row.rotation)
    return {
        "x": round(bits, 3),
        "y": value,
        "low": low,
        "high": high,
        "mark": MARKS[row.verdict],
        "label": short(name),
        "text": f"{name}, {bits:.2f} bits: {said(row)}",
    }


def short(name: str) -> str:
    """A scheme's name as a picture has room for it."""
    dtype, dot, rotation = name.partition(" · ")
    # of fp8 there are two
    dtype = (
        dtype.replace("fp8_per_token_head", "fp8/head").replace("_per_token_head", "").replace("_per_tensor", "/tensor")
    )
    # where only keys are centred the values' part says nothing more
    rotation = rotation.partition(":")[0].replace("randomized_hadamard", "random hadamard")
    return f"{dtype}{dot}{rotation}"


# ---- differences


def forest(found: Found) -> Plot | None:
    """Every scheme's difference from the baseline with its interval, a picture a model, task and metric."""
    views = []
    for (model, task, metric), rows in _by_metric(found).items():
        name = f"{task} {metric}"
        across = axis(rows[0])
        points = []
        for row in sorted(rows, key=lambda row: -(found.bits(row) or 0)):
            value, low, high = drawn(row)
            scheme = scheme_name(row.dtype, row.rotation)
            label = short(scheme)
            text = f"{scheme}: {said(row)}"
            if row.worse is not None and row.unit == "share":
                text += f"; {row.worse} documents worse, {row.better} better, of {row.n}"
            finite = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
            point = {"y": label, "x": value, "mark": MARKS[row.verdict], "text": text}
            points.append({**point, "low": low, "high": high} if finite else point)
        worse = [str(point["y"]) for point in points if point["mark"] == "worse"]
        says = f"{model}, {name}, {len(points)} schemes against the baseline. "
        says += f"WORSE: {', '.join(worse)}." if worse else "None is WORSE."
        views.append(View({"model": model, "metric": name}, says, across, Axis(""), points))
    notes = ["Bars: 95 % intervals of the paired difference over the same documents. Dashed: the margin."]
    return Plot("Differences from the baseline", "intervals", views, notes) if views else None


# ---- along a text


def positions(found: Found) -> Plot | None:
    """KL divergence by position, a line a scheme; None where no task measured it."""
    ranged = re.compile(r"kld@(\d+)-(\d+)$")
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for record in found.records:
        if not record.scored:
            continue
        spans = [(place, metric) for metric in record.metrics if (place := ranged.match(metric.name))]
        for place, metric in spans if len(spans) > 1 else []:
            if not (metric.value > 0 and math.isfinite(metric.value)):
                continue
            start, end = int(place[1]), int(place[2])
            scheme = scheme_name(record.dtype, record.rotation)
            error = metric.stderr or 0.0
            reach = {"low": max(metric.value - 1.96 * error, metric.value / 10), "high": metric.value + 1.96 * error}
            text = f"{scheme}, tokens {start} to {end}: {shown_number(metric.value)} ± {shown_number(error)} nats"
            groups[record.model["name"], found.labels[record.cell]].append(
                {"x": (start + end) / 2, "y": metric.value, **reach, "series": short(scheme), "text": text}
            )
    views = []
    for (model, task), points in groups.items():
        growth = []
        for series in dict.fromkeys(point["series"] for point in points):
            own = sorted((point for point in points if point["series"] == series), key=lambda point: point["x"])
            growth.append(f"{series} {own[-1]['y'] / own[0]['y']:.2f} ×")
        says = f"{model}, {task}. The last span against the first: {', '.join(growth)}."
        x, y = Axis("tokens before, middle of the span"), Axis("KL divergence, nats", True)
        views.append(View({"model": model, "task": task}, says, x, y, points))
    notes = ["Does the loss grow with the context? Bars: 1.96 standard errors over documents."]
    return Plot("Loss by position", "lines", views, notes) if views else None


def needles(found: Found) -> Plot | None:
    """Needles found by length and depth, a grid a scheme; None where no task hid any."""
    views = []
    for record in found.records:
        if not record.scored or record.identity.get("task", {}).get("task") != "needle":
            continue
        try:
            samples = found.store.samples(record.cell)
        except (OSError, ValueError):
            continue
        if not {"context", "depth", "acc"} <= set(samples.columns):
            continue
        scheme = scheme_name(record.dtype, record.rotation)
        points = []
        for (depth, context), hits in samples.groupby(["depth", "context"])["acc"]:
            share = float(hits.mean())
            text = f"{scheme}, {context} tokens, depth {depth:.0%}: {hits.sum():.0f} of {len(hits)}"
            label = f"{hits.sum():.0f}/{len(hits)}"
            points.append({"x": str(context), "y": f"{depth:.0%}", "value": share, "label": label, "text": text})
        whole = samples["acc"]
        says = f"{record.model['name']}, {scheme}: {whole.sum():.0f} of {len(whole)} needles found."
        choice = {"model": record.model["name"], "task": found.labels[record.cell], "scheme": scheme}
        x, y = Axis("tokens of the text"), Axis("depth of the needle")
        views.append(View(choice, says, x, y, sorted(points, key=lambda one: (float(one["y"][:-1]), float(one["x"])))))
    # the page opens on what loses most
    views.sort(key=lambda view: sum(point["value"] for point in view.points) / len(view.points))
    return Plot("Needles by length and depth", "grid", views) if views else None


# ---- speed


def speed(kernels: Sequence[Record]) -> Plot | None:
    """How fast decode attention is against context, a line a dtype; a picture a measure, batch and shape."""
    measures = {
        "speed-up": ("speedup", 1, Axis("times as fast as the best 16-bit attention", False, (1.0,)), "{:.2f} ×"),
        "share of copy": (
            "share_of_copy",
            100,
            Axis("share of the bandwidth of a copy, %", False, (100.0,)),
            "{:.0f} %",
        ),
    }
    groups: dict[tuple[str, str], dict[tuple[str, int], Record]] = defaultdict(dict)
    for record in kernels:
        row = record.facts
        if row.get("op") == "decode" and row.get("speedup") and not row.get("prefix"):
            shape = f"{row['query_heads']}/{row['kv_heads']} heads × {row['head_dim']}, pages of {row['page_size']}"
            # the same dtype under another rotation is as fast: decoding turns queries, not keys
            groups[shape, f"{row['batch']}"].setdefault((row["dtype"], row["context"]), record)
    views = []
    for measure, (name, factor, y, form) in measures.items():
        for (shape, batch), timed in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            if len({context for _, context in timed}) < 2:
                continue
            longest = max(context for _, context in timed)
            points = [
                {"x": context, "y": factor * timed[dtype, context].facts[name], "series": short(dtype)}
                | {"text": _timing(timed[dtype, context].facts)}
                for dtype, context in sorted(timed)
            ]
            told = [f"{point['series']} {form.format(point['y'])}" for point in points if point["x"] == longest]
            says = f"Decode attention, {batch} sequences of {longest} tokens, {shape}, {measure}: {', '.join(told)}."
            choice = {"measure": measure, "shape": shape, "batch": batch}
            views.append(View(choice, says, Axis("tokens of a sequence", True), y, points))
    notes = ["One layer's attention, rotation included; dashed: as fast as 16 bits, or as a plain copy of the bytes."]
    return Plot("Kernel speed against context", "lines", views, notes) if views else None


def _timing(row: Mapping[str, Any]) -> str:
    return (
        f"{row['dtype']}, {row['batch']} sequences of {row['context']} tokens: {row['us']:.0f} µs, "
        f"{row['speedup']:.2f} × the speed of {row['best_16bit_peer']}, {row['share_of_copy']:.0%} of copy bandwidth"
    )
