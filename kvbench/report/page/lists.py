"""The tables of a page: every comparison, size and speed, documents that flipped, controls, and what to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from kvbench.measured import Cell as Measured
from kvbench.render import Cell, Column, Prose, Table
from kvbench.report.comparison_text import shown_difference
from kvbench.report.flips import answer, moved
from kvbench.report.labels import machine_of
from kvbench.report.page.found import (
    MARKS,
    Found,
    Scheme,
    difference,
    interval_cell,
    number_cell,
    scheme_name,
    verdict_cell,
)
from kvbench.report.verdicts import Comparison
from kvbench.results import Record, shown_number

ITEMS = 1500  # flipped documents in a page, over all cells; more make it slow to open
SHOWN = 12  # of one cell and metric, at most
LONGEST = 500  # characters of an answer


def glance(found: Found) -> Table | None:
    """A row a scheme, a column a task: the difference in its first metric, with the verdict as a sign."""
    metrics: dict[str, str] = {}
    for row in found.rows:
        metrics.setdefault(found.task(row), row.metric)
    first = {task: metrics[task] for task in found.tasks if task in metrics}
    if not first:
        return None
    several = len(found.models) > 1
    columns = [
        *([Column(("model",), numeric=False, choose=True)] if several else []),
        Column(("scheme",), numeric=False),
        Column(("bits/", "value")),
        Column(("verdicts",), numeric=False),
        # as narrow as its numbers: all tasks fit a screen
        *(
            Column((*_broken(task), *(part for one in metric.split(",") for part in _broken(one))))
            for task, metric in first.items()
        ),
    ]
    rows = []
    for one in found.schemes:
        if one.baseline or not one.rows:
            continue
        by_task = {(found.task(row), row.metric): row for row in one.rows}
        rows.append(
            [
                *([one.model] if several else []),
                one.name,
                Cell(f"{one.bits:.2f}" if one.bits else "-", one.bits),
                counted(one),
                *(_glance(by_task.get(place)) for place in first.items()),
            ]
        )
    notes = [
        "Differences from the baseline on the same documents. ▼ WORSE (p below 0.05 after Holm's correction; of a "
        "distance, its interval is beyond the margin), = EQUIVALENT (the 95 % interval lies within the margin of "
        f"{found.comparisons.margin}), ? INCONCLUSIVE, ▲ BETTER, ○ could not tell: the baseline scores next to "
        "nothing, or no more than a zeroed cache; - was not measured."
    ]
    return Table("At a glance", columns, rows, notes=notes)


def _broken(name: str) -> list[str]:
    """A name in lines that end where a part does."""
    return name.replace("_", "_ ").replace("-", "- ").split()


def counted(one: Scheme) -> Cell:
    """How many comparisons of a scheme got each verdict; as a sign, the worst."""
    for verdict in ("WORSE", "INVALID", "INCONCLUSIVE", "EQUIVALENT"):
        if found := one.having(verdict):
            return Cell(f"{len(found)} of {len(one.rows)} {verdict}", -float(len(found)), mark=MARKS[verdict])
    return Cell(f"{len(one.rows)} could not tell", mark="void")


def _glance(row: Comparison | None) -> str:
    if row is None:
        return "-"
    if row.difference is None:
        return Cell(str(row.verdict), mark=MARKS[row.verdict])
    return Cell(difference(row), row.difference, mark=MARKS[row.verdict])


def comparisons(found: Found) -> Table:
    """A row a comparison, its verdict first."""
    several = len(found.models) > 1
    columns = [
        Column(("verdict",), numeric=False),
        Column(("difference",)),
        Column(("95 % interval",)),
        *([Column(("model",), numeric=False, choose=True)] if several else []),
        Column(("scheme",), numeric=False, choose=True),
        Column(("task",), numeric=False, choose=True),
        Column(("metric",), numeric=False),
        Column(("baseline",)),
        Column(("value",)),
        Column(("bits/", "value")),
        Column(("flips", "−/+")),
        Column(("n",)),
        Column(("p", "(Holm)")),
    ]
    rows = []
    for row in found.rows:
        bits = found.bits(row)
        flips = row.unit == "share"
        rows.append(
            [
                verdict_cell(row),
                Cell(difference(row), row.difference),
                interval_cell(row),
                *([row.model] if several else []),
                scheme_name(row.dtype, row.rotation),
                found.task(row),
                row.metric,
                number_cell(row.baseline),
                number_cell(row.value),
                Cell(f"{bits:.2f}" if bits else "-", bits),
                Cell(f"{row.worse}/{row.better}" if flips else "-", float(row.worse or 0) if flips else None),
                Cell(str(row.n) if row.n else "-", row.n),
                Cell("-" if row.p_holm is None else f"{row.p_holm:.2g}", row.p_holm),
            ]
        )
    notes = [
        "Bars: the interval against 0; the shaded band is the margin, and the bar ends five margins from 0.",
        "(n≥…): so many documents would decide it, whether the truth is no difference or one as wide as the margin.",
        "Paired tests over the same documents, p after Holm over all of them. "
        "A distance from the baseline (kld, same_top) is nonzero by construction and has no p. "
        "Intervals are not corrected for their number: one may exclude 0 where its verdict is INCONCLUSIVE.",
    ]
    return Table("Every comparison", columns, rows, notes=notes)


# ---- size and speed


def gains(found: Found) -> Table | None:
    """A row a scheme: its size at long contexts, and how fast its kernels are there."""
    longest = found.longest or 32768
    lengths = sorted({length for length in (8192, 32768, longest) if length <= longest})
    sized = [one for one in found.schemes if one.bytes_per_token]
    if not sized:
        return None
    timed = _timings(found)
    columns = [
        *([Column(("model",), numeric=False, choose=True)] if len(found.models) > 1 else []),
        Column(("scheme",), numeric=False),
        Column(("bits/", "value")),
        *(Column((f"cache of {length}", "tokens, MiB")) for length in lengths),
        Column(("smaller",)),
        *(Column((f"decode {batch}×{context}", "× 16 bits' speed")) for batch, context in timed),
        Column(("peak memory", "GiB")),
    ]
    rows = []
    for one in sized:
        base = found.baseline(one.model)
        ratio = base.size(longest) / one.size(longest) if base else None
        peak = _peak(found, one)
        rows.append(
            [
                *([one.model] if len(found.models) > 1 else []),
                one.name,
                Cell(f"{one.bits:.2f}" if one.bits else "-", one.bits),
                *(Cell(f"{one.size(length) / 2**20:.0f}", one.size(length)) for length in lengths),
                Cell(f"{ratio:.2f} ×" if ratio else "-", ratio),
                *(_speed(times, one) for times in timed.values()),
                Cell(f"{peak / 2**30:.1f}" if peak else "-", peak),
            ]
        )
    return Table("Memory and speed", columns, rows, notes=list(_gain_notes(found, timed)))


def gain_lines(found: Found) -> list[str]:
    """What is gained in memory and speed at the longest context, a sentence each; none where no size is known."""
    longest = found.longest or 32768
    model = found.models[0] if found.models else ""
    sized = [one for one in found.schemes if one.model == model and one.bytes_per_token]
    by_dtype = {one.dtype: one.size(longest) for one in reversed(sized)}
    if not by_dtype:
        return []
    ordered = sorted(by_dtype.items(), key=lambda item: -item[1])
    sizes = ", ".join(f"{dtype} {size / 2**20:.0f}" for dtype, size in ordered)
    lines = [f"Memory of one sequence of {longest} tokens, MiB: {sizes}."]
    timed = _timings(found)
    if not timed:
        return [*lines, "Speed: no kernel was timed for this page; `--kernels DIR` puts a folder of timings beside it."]
    context = max(context for _, context in timed)
    speeds = []
    for batch in sorted(batch for batch, length in timed if length == context):
        records = timed[batch, context]
        each = sorted(records.items(), key=lambda item: item[1].facts["speedup"])
        told = ", ".join(f"{dtype} {record.facts['speedup']:.2f} ×" for dtype, record in each)
        speeds.append(f"{batch} sequence{'s' if batch > 1 else ''}: {told}")
    record = next(iter(timed[max(batch for batch, length in timed if length == context), context].values()))
    heads = f"{record.facts['query_heads']} query and {record.facts['kv_heads']} KV heads"
    layers = dict.fromkeys(heads for one in found.records for heads, _ in one.model.get("layers") or ())
    other = "" if _own(found, record) else f" (this model: {' or '.join(map(str, layers))} KV heads)"
    lines.append(
        f"Speed at {context} tokens: one layer's decode attention kernel, {heads}{other}, against the best 16-bit "
        f"attention. {'; '.join(speeds)}. A whole model gains less: its other layers take as long as before."
    )
    return lines


def reach_line(found: Found) -> str | None:
    """Up to which context accuracy was measured, in a sentence; None where no task says its context."""
    reached: dict[str, int] = {}
    for record in found.records:
        task = record.identity.get("task") or {}
        lengths = task.get("contexts") or task.get("context")
        if record.status == "done" and isinstance(lengths, int | list) and record.metrics:
            label = found.labels[record.cell]
            reached[label] = max(reached.get(label, 0), lengths if isinstance(lengths, int) else max(lengths))
    if not reached:
        return None
    most = max(reached.values())
    longest = found.longest or 32768
    told = ", ".join(f"{label} up to {tokens} tokens" for label, tokens in reached.items())
    beyond = f"; nothing here says what a cache loses at {longest}" if most < longest else ""
    return f"Context that accuracy was measured in: {told}{beyond}."


def _own(found: Found, record: Record) -> bool:
    """Whether a kernel was timed with the KV heads of a model that was measured."""
    layers = {(heads, dim) for one in found.records for heads, dim in one.model.get("layers") or ()}
    return (record.facts["kv_heads"], record.facts["head_dim"]) in layers


def _timings(found: Found) -> dict[tuple[int, int], dict[str, Record]]:
    """Decode timings by batch and context, then dtype: of the model's own heads where they were timed."""
    timed = [one for one in found.kernels if one.facts.get("op") == "decode" and one.facts.get("speedup")]
    own = [one for one in timed if _own(found, one)]
    chosen = own or [one for one in timed if _shape(one) == _commonest([_shape(one) for one in timed])]
    sizes: dict[tuple[int, int], dict[str, Record]] = {}
    for one in sorted(chosen, key=lambda one: (one.facts["batch"], one.facts["context"])):
        sizes.setdefault((one.facts["batch"], one.facts["context"]), {}).setdefault(one.dtype, one)
    return {size: sizes[size] for size in sizes if size[0] in (1, max(batch for batch, _ in sizes))}


def _shape(record: Record) -> tuple[Any, ...]:
    return tuple(record.facts[name] for name in ("query_heads", "kv_heads", "head_dim", "page_size"))


def _commonest(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    return max(dict.fromkeys(shapes), key=shapes.count, default=None)


def _speed(times: Mapping[str, Record], one: Scheme) -> Cell:
    record = times.get(one.dtype)
    # a rotation costs decoding nothing, what was taken off keys does
    if record is None or "center" in one.rotation or "balance" in one.rotation:
        return Cell("-")
    return Cell(f"{record.facts['speedup']:.2f} ×", record.facts["speedup"])


def _peak(found: Found, one: Scheme) -> float | None:
    peaks = [
        record.timings["peak_memory_bytes"]
        for record in found.records
        if (record.model["name"], record.dtype, record.rotation) == (one.model, one.dtype, one.rotation)
        and record.timings.get("peak_memory_bytes")
    ]
    return max(peaks, default=None)


def _gain_notes(found: Found, timed: Mapping[tuple[int, int], Mapping[str, Record]]) -> Iterator[str]:
    yield "Sizes count every scale and zero-point. Peak memory: the allocator's, weights and activations included."
    records = [record for times in timed.values() for record in times.values()]
    if records:
        row = records[0].facts
        devices = ", ".join(dict.fromkeys(str(record.identity.get("device")) for record in records))
        yield (
            f"Speed: one layer's decode attention kernel on {devices}, {row['query_heads']} query and "
            f"{row['kv_heads']} KV heads of {row['head_dim']} channels"
            f"{'' if _own(found, records[0]) else ', which is not the shape of this model'}; "
            "with or without a Hadamard rotation. A whole model gains less: its other layers take as long as before."
        )


# ---- documents


def flipped(found: Found, texts: Mapping[str, Mapping[str, str]]) -> Table | None:
    """A row a scheme and metric with right and wrong answers; behind it documents that moved, with both answers.

    texts: of documents by their hash, where they are at hand: what was asked, and the right answer.
    """
    cells = {cell.name: cell for cell in found.measured.cells}
    wanted = [row for row in found.rows if row.unit == "share" and (row.worse or row.better) and "@" not in row.metric]
    wanted = [row for row in wanted if row.cell in cells and row.verdict != "INVALID"]
    if not wanted:
        return None
    room = max(2, min(SHOWN, ITEMS // len(wanted)))
    rows, details = [], []
    said: dict[str, dict[tuple[str, str, str], str]] = {}
    for row in wanted:
        cell = cells[row.cell]
        base = next(
            one
            for one in found.measured.cells
            if one.key == cell.key and not one.control and " · ".join(one.scheme) == row.against
        )
        changes = moved(cell.series[row.metric], base.series[row.metric])
        # of both directions, the losses first
        changes = sorted(changes, key=lambda change: change[2] > change[1])
        half = room - min(room // 3, sum(after > before for _, before, after in changes))
        lost = [one for one in changes if one[2] < one[1]][:half]
        picked = lost + [one for one in changes if one[2] > one[1]][: room - len(lost)]
        for one in (cell, base):
            if one.name not in said:
                said[one.name] = _answers(found, one)
        hashes = {document[:3]: document[3] for document in cell.series[row.metric].documents}
        details.append(
            [
                {
                    "document": f"{task or found.task(row)} {document}",
                    **texts.get(hashes[task, document, chosen], {}),
                    f"{row.against}: {_score(before)}": said[base.name].get((task, document, chosen), "-"),
                    f"{scheme_name(row.dtype, row.rotation)}: {_score(after)}": said[cell.name].get(
                        (task, document, chosen), "-"
                    ),
                }
                for (task, document, chosen), before, after in picked
            ]
        )
        name = scheme_name(row.dtype, row.rotation)
        label = f"{row.model} · {name}" if len(found.models) > 1 else name
        shown = f"{len(picked)} of {len(changes)}"
        rows.append(
            [
                label,
                found.task(row),
                row.metric,
                Cell(str(row.worse), row.worse),
                Cell(str(row.better), row.better),
                Cell(str(row.n), row.n),
                Cell(shown, len(picked)),
            ]
        )
    columns = [
        Column(("scheme",), numeric=False),
        Column(("task",), numeric=False, choose=True),
        Column(("metric",), numeric=False, choose=True),
        Column(("worse",)),
        Column(("better",)),
        Column(("n",)),
        Column(("shown",)),
    ]
    notes = ["A scheme's name opens documents whose score moved, with both answers. `kvbench show` lists all of them."]
    if not texts:
        notes.append("Prompts and targets are the data set's, and not in a run folder: `--data DIR` puts them here.")
    return Table("Answers that flipped", columns, rows, notes=notes, details=details)


def _score(score: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(score, shown_number(score))


def _answers(found: Found, cell: Measured) -> dict[tuple[str, str, str], str]:
    try:
        samples: list[dict[str, Any]] = found.store.samples(cell.name).to_dict("records")  # type: ignore[assignment]
        return {(str(row.get("task", "")), str(row["doc_id"]), str(row["filter"])): _said(row) for row in samples}
    except (OSError, TypeError, ValueError, LookupError):
        return {}


def _said(row: Mapping[str, Any]) -> str:
    """An answer, the text that it was taken from after it, cut where it is long."""
    line = answer(dict(row))
    if row.get("resps") is not None and row.get("filtered_resps") is not None:
        line += f"\n{str(row['resps'][0]).strip()}"
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


# ---- controls, and what to copy


def controls(found: Found, run: Mapping[str, Any]) -> Table:
    """What had to come out as it did for the rest to mean anything."""
    rows: list[list[str]] = []
    judged = run.get("canary", [])
    means: dict[str, Cell] = {
        "wrecked": Cell("passed", mark="good"),
        "unmoved": Cell("FAILED: the cache is not read", mark="bad"),
        "undecided": Cell("undecided: the baseline can't be told from chance", mark="open"),
    }
    if not judged:
        off = "turned off" if judged is None else "not judged"
        rows.append(["a zeroed cache must break the scores", "-", Cell(off, mark="open"), "-"])
    for one in judged or []:
        where = f"{one['model']} · {one['task']}" if len(found.models) > 1 else one["task"]
        rows.append(["a zeroed cache must break the scores", where, means[one["verdict"]], one["why"]])
    for row in found.comparisons.again:
        what = "the baseline once more" if row.dtype == "again" else f"{row.against} once more, under one ulp of noise"
        moves = shown_difference(row.difference, row.unit)
        if row.unit == "share":
            moves = f"{(row.worse or 0) + (row.better or 0)} of {row.n} answers flip"
        fair = (
            Cell("measured", mark="good") if row.verdict is None else Cell(f"{row.verdict}: {row.reason}", mark="bad")
        )
        where = f"{row.model} · {found.task(row)}" if len(found.models) > 1 else found.task(row)
        rows.append([what, f"{where} {row.metric}", fair, moves])
    if not found.comparisons.again:
        rows.append(["the baseline once more: what moves by chance", "-", Cell("not measured", mark="open"), "-"])
    rows += _agreements(found)
    gates = {str(record.facts.get("gate")) for record in found.kernels}
    if gates:
        wrong = sorted(gate for gate in gates if gate != "ok")
        passed = Cell("; ".join(wrong), mark="bad") if wrong else Cell("passed", mark="good")
        rows.append(["kernels against attention in float64", f"{len(found.kernels)} timings", passed, "-"])
    columns = [Column((name,), numeric=False) for name in ("control", "of", "result", "what was seen")]
    return Table("Controls", columns, rows)


def _agreements(found: Found) -> Iterator[list[str]]:
    kept: dict[str, tuple[Record, dict[str, Any]]] = {}
    for record in found.records:
        if isinstance(one := record.facts.get("agreement"), dict):
            kept[str(one.get("key"))] = record, one
    for record, one in kept.values():
        seen = f"largest |Δ log p| {one['largest']:.2g} nats over {one['tokens']} positions, "
        seen += f"transformers against itself {one['noise']:.2g}"
        if "tolerance" in one:
            seen = (
                f"three quarters of positions differ by less than {one['typical']:.2g} nats; allowed: "
                f"{one['tolerance']:.2g}, 3 × the same of transformers against itself, or rounding; {seen}"
            )
        of = f"{record.model['name']}, {record.model.get('compute_dtype')}"
        yield ["the exact cache is the model", of, Cell("passed", mark="good"), seen]
    if not kept:
        yield ["the exact cache is the model", "-", Cell("not asked", mark="open"), "-"]


def environment(found: Found) -> Prose:
    """Machines, versions, source and weights."""
    machines = dict.fromkeys(machine_of(record) for record in found.records if record.environment)
    dates = sorted(record.finished for record in found.records)
    models = dict.fromkeys(
        f"{record.model['name']}, revision {record.model.get('revision')}, "
        f"computes in {record.model.get('compute_dtype')}"
        for record in found.records
        if not record.kernel
    )
    lines = [*machines, *models, f"finished {dates[0]} to {dates[-1]}"]
    lines += [
        f"kernels timed on {name}" for name in dict.fromkeys(str(one.identity["device"]) for one in found.kernels)
    ]
    return Prose("Environment", lines)


def again(run: Mapping[str, Any]) -> Prose | None:
    """The commands and the YAML that make such a run; None where it is not known."""
    config = run.get("config")
    if not config:
        return None
    name = shlex.quote(f"{config.get('name', 'sweep')}.yaml")
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100).rstrip()
    return Prose("Run it again", [f"# kvbench plan {name}", f"# kvbench sweep {name}", *text.split("\n")], copy=True)
