"""The tables of a run folder: for a terminal, as Markdown, as CSV and as JSON. Loads without torch."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench import measured
from kvbench.files import write_text
from kvbench.render import Column, Document, Table, all_renderers, render
from kvbench.report import compare, comparison_text
from kvbench.report.cost import cost_table
from kvbench.report.labels import group_of, notes_of, task_labels, title_of, warnings_of
from kvbench.report.speed import kernel_tables, speed_column
from kvbench.report.verdicts import VERDICTS
from kvbench.results import Metric, NotARunError, Record, Store, headline, shown_metric

FIELDS = (
    "model",
    "dtype",
    "rotation",
    "task",
    "metric",
    "value",
    "stderr",
    "n",
    "unit",
    "verdict",
    "bits_per_value",
    "kv_bytes_per_token",
    "scoring",
    "compute_dtype",
    "limit",
    "task_limit",
    "seed",
    "status",
    "cell",
)
KEPT = ("md", "csv", "json")  # the formats that stand beside the records
NAMED = 3  # metrics that a verdict names at most
LEGEND = (
    "± is one standard error over documents; - was not measured. Sizes count every scale and zero-point. "
    "Verdicts come from paired tests against the baseline, one by one in `kvbench compare`."
)


@dataclass(frozen=True)
class Report:
    """What a run folder says. problems: a line for each record that cannot be read.

    kernels: records of `kvbench kernel`, of this folder or another, whose speed stands beside accuracy.
    """

    folder: Path
    records: list[Record]
    run: dict[str, Any]
    problems: list[str]
    kernels: list[Record]

    @classmethod
    def read(cls, folder: Path, kernels: Path | None = None) -> Report:
        """The report of a run folder; `kernels`: another one, whose kernels' speed is shown beside accuracy.

        Raises:
            FileNotFoundError: there is no such folder.
            NotARunError: it holds no cell.
        """
        if kernels is not None:
            found = cls.read(folder)
            other = cls.read(kernels)
            return replace(found, kernels=found.kernels + other.kernels, problems=found.problems + other.problems)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is a file, not a run folder" if folder.exists() else f"no folder {folder}"
            )
        store = Store(folder)
        if not store.cells.is_dir():
            raise NotARunError(
                f"nothing to report: {folder} is no run folder, it has no cells/ (kvbench sweep makes one)"
            )
        contents = store.load()
        if not contents.records:
            broken = f"; {contents.problems[0]}" if contents.problems else ""
            raise NotARunError(f"nothing to report: {folder} has no finished cell{broken}")
        records = list(contents.records.values())
        return cls(folder, records, store.run(), contents.problems, [record for record in records if record.kernel])

    @property
    def store(self) -> Store:
        """Where the records are."""
        return Store(self.folder)

    # ---- one list, a row a metric

    def rows(self) -> list[dict[str, Any]]:
        """A row a metric of each cell, and one without a metric for each failed cell; the canary has none.

        A value that JSON has no number for (an infinite perplexity) is None here, and stands in the cell's record.
        """
        rows = []
        for record in self._ordered():
            common = {
                "model": record.model["name"],
                "dtype": record.dtype,
                "rotation": record.rotation,
                "task": record.task,
                "bits_per_value": _finite(record.bits_per_value),
                "kv_bytes_per_token": _finite(record.kv_bytes_per_token),
                "scoring": record.scoring,
                "compute_dtype": record.model.get("compute_dtype"),
                "limit": record.limit,
                "task_limit": (record.identity.get("task") or {}).get("limit"),
                "seed": record.identity.get("seed"),
                "status": record.status,
                "cell": record.cell,
            }
            for metric in record.metrics or (None,):
                number: dict[str, Any] = dict.fromkeys(("metric", "value", "stderr", "n", "unit", "verdict"))
                if metric is not None:
                    number = {
                        "metric": metric.name,
                        "value": _finite(metric.value),
                        "stderr": _finite(metric.stderr),
                        "n": metric.n,
                        "unit": metric.unit,
                        "verdict": self._verdicts.get((record.cell, metric.name)),
                    }
                row = {**common, **number}
                rows.append({column: row[column] for column in FIELDS})
        return rows

    @cached_property
    def compared(self) -> tuple[measured.Measured, compare.Comparisons] | None:
        """Every cell against the baseline; None for a run that names none."""
        if not self.run.get("baseline"):
            return None
        cells = measured.of_records(self.folder, self.records, self.run)
        return cells, compare.compare(cells)

    @cached_property
    def _verdicts(self) -> dict[tuple[str, str], str | None]:
        """The verdict of each cell and metric that was compared."""
        return {(row.cell, row.metric): row.verdict for row in self.compared[1].rows} if self.compared else {}

    def _verdict(self, cells: Collection[Record]) -> str:
        """The metrics that are WORSE, by name where they are few, and how many got each other verdict."""
        found: dict[str, list[str]] = defaultdict(list)
        names = Counter(metric.name for record in cells for metric in record.metrics)
        for record in cells:
            for metric in record.metrics:
                if verdict := self._verdicts.get((record.cell, metric.name)):
                    found[verdict].append(metric.name if names[metric.name] == 1 else f"{record.task} {metric.name}")
        worse = found.pop("WORSE", [])
        few = 0 < len(worse) <= NAMED
        parts = [f"WORSE {', '.join(worse)}"] if few else [f"{len(worse)} WORSE"] if worse else []
        others = ", ".join(f"{len(found[verdict])} {verdict}" for verdict in VERDICTS if found[verdict])
        return "; ".join(filter(None, [*parts, others])) or "-"

    def _ordered(self) -> list[Record]:
        """The records without the canary's: models as they come, schemes as the sweep lists them, others by size."""
        order = [(scheme["dtype"], scheme["rotation"]) for scheme in self.run.get("schemes", [])]
        of_cell = {record.cell: record.task for record in self.records}
        tasks = list(dict.fromkeys(of_cell[cell] for cell in self._planned() if cell in of_cell))

        def key(record: Record) -> tuple[Any, ...]:
            # the A/A cell stands below what it repeats
            baseline = self.run.get("baseline") or {}
            own = record.identity.get("scheme", {}).get("dtype") or baseline.get("dtype", "")
            scheme = (own if record.again else record.dtype, record.rotation)
            place = order.index(scheme) if scheme in order else len(order)
            task = tasks.index(record.task) if record.task in tasks else len(tasks)
            return (
                group_of(record),
                place,
                -(record.bits_per_value or 0),
                scheme,
                record.again,
                record.dtype,
                task,
                record.task,
                record.cell,
            )

        return sorted((record for record in self.records if not record.canary), key=key)

    def _planned(self) -> list[str]:
        return list(self.run.get("cells", []))

    # ---- tables

    def tables(self) -> list[Table]:
        """A table a model, compute dtype, scoring mode and limit, and below each what it took; then the kernels'."""
        groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
        for record in self._ordered():
            if not record.kernel:
                groups[group_of(record)].append(record)
        own = [record for record in self.records if record.kernel]
        tables = []
        for records in groups.values():
            tables.append(self._table(records))
            if cost := cost_table(tables[-1].title, records):
                tables.append(cost)
        return tables + kernel_tables(own)

    def _table(self, records: list[Record]) -> Table:
        labels = task_labels(records)
        by_place: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
        by_label: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            by_place[record.dtype, record.rotation][labels[record.cell]] = record
            by_label[labels[record.cell]].append(record)
        measures: list[tuple[str, str]] = []
        for label, of_task in by_label.items():
            names = dict.fromkeys(metric.name for record in of_task for metric in headline(record.metrics))
            measures += [(label, name) for name in names]

        def matters(measure: tuple[str, str]) -> tuple[bool, bool, int]:
            label, name = measure
            first = next(other for task, other in measures if task == label)
            far = any(m.name == name and m.kind == "distance" for r in by_label[label] for m in r.metrics)
            return name != first, not far, measures.index(measure)

        # what a narrow terminal shows first: each task's first metric before another's second, and before all the
        # distance from the baseline, which tells schemes apart where no score does
        order = sorted(measures, key=matters)
        columns = [
            Column(("dtype",), numeric=False, prose=True),
            Column(("rotation",), numeric=False, prose=True, joins="none"),
            Column(("bits/", "value")),
            Column(("KV KiB/", "token"), drop=len(measures) + 2),
            Column(("smaller", "than fp16"), drop=len(measures) + 1),
        ]
        for label, name in measures:
            found = [m for r in by_label[label] for m in r.metrics if m.name == name]
            counts = sorted({metric.n for metric in found})
            # a perplexity is called one
            unit = f" ({found[0].unit})" if found[0].unit not in ("", "%", "ppl") else ""
            size = f"n={counts[0]}" if len(counts) == 1 else f"n={counts[0]}..{counts[-1]}"
            columns.append(Column((label, f"{name}{unit}", size), drop=1 + order.index((label, name))))
        judged = self._verdict(records) != "-"
        if judged:
            columns.append(Column(("verdict",), numeric=False, verdict=True, prose=True))

        layers = {(heads, head_dim) for heads, head_dim in records[0].model.get("layers") or ()}
        speed = speed_column(self.kernels, by_place, layers)
        columns += [speed.column] if speed else []

        rows = []
        for (dtype, rotation), cells in by_place.items():
            bits = next((r.bits_per_value for r in cells.values() if r.bits_per_value), None)
            size_bytes = next((r.kv_bytes_per_token for r in cells.values() if r.kv_bytes_per_token), None)
            row = [
                dtype,
                rotation,
                f"{bits:.2f}" if bits else "-",
                f"{size_bytes / 1024:.1f}" if size_bytes else "-",
                f"{16 / bits:.2f} ×" if bits else "-",
            ]
            for label, name in measures:
                metric = _metric(cells.get(label), name)
                row.append(shown_metric(metric) if metric else "-")
            if judged:
                row.append(self._verdict(cells.values()))
            if speed:
                row.append(speed.cell((dtype, rotation)))
            rows.append(row)
        notes = notes_of(records) + ([speed.note] if speed else [])
        return Table(title_of(records[0]), columns, rows, warnings_of(records), notes)

    def summary(self) -> list[str]:
        """Lines below all tables: how much is done, the canary, what failed, what cannot be read."""
        lines = [self.progress]
        lines += self._without_verdicts()
        lines += list(self._agreement())
        lines += list(self._canary())
        if self.compared:
            cells, found = self.compared
            lines += comparison_text.summary(cells, found)
        for record in self.records:
            if record.status == "failed":
                label = f"{record.model['name']} · {record.dtype} · {record.rotation} · {record.task}"
                lines.append(f"failed: {label}: {record.error}: {self.folder / 'cells' / record.cell / 'record.json'}")
        return lines + self.problems

    @property
    def progress(self) -> str:
        """How many cells are done, failed, and not run."""
        counts = {status: sum(record.status == status for record in self.records) for status in ("done", "failed")}
        noun = "cell" if counts["done"] == 1 else "cells"
        return f"{counts['done']} {noun} done, {counts['failed']} failed, {len(self._left)} of the sweep not run"

    @property
    def whole(self) -> bool:
        """Whether each cell of the sweep is done."""
        return not self._left and all(record.status == "done" for record in self.records)

    @property
    def _left(self) -> set[str]:
        return set(self._planned()) - {record.cell for record in self.records}

    @property
    def faults(self) -> list[str]:
        """Lines of what can't be read, which a table of numbers alone has no place for."""
        unrun = sorted(set(self._planned()) - {record.cell for record in self.records})
        return self._without_verdicts() + measured.unrun_line(unrun) + self.problems

    def _without_verdicts(self) -> list[str]:
        if self.run.get("baseline") or all(record.kernel for record in self.records):
            return []
        if "baseline" in self.run:
            return ["no verdicts: there is no baseline to compare with; these cells measure distances from one"]
        return ["no verdicts: run.json is missing or broken, which names the baseline; a sweep writes it again"]

    def _agreement(self) -> Iterator[str]:
        """A line a model, of how its exact cache agrees with transformers; none where that was not asked yet."""
        asked = (self.run.get("config") or {}).get("agreement")
        if asked is False:
            yield "agreement: turned off, so it was not tested that the exact cache is the model"
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for record in self.records:
            if isinstance(kept := record.facts.get("agreement"), dict):
                found[str(kept.get("key"))] = f"{record.model['name']}, {record.model.get('compute_dtype')}", kept
        for model, kept in sorted(found.values(), key=lambda one: one[0]):
            line = (
                f"exact cache = model: {model}: max |Δ log p| {kept['largest']:.0e} nats over {kept['tokens']} "
                f"positions (transformers against itself: {kept['noise']:.0e})"
            )
            if unreached := " and ".join(map(str, kept["unreached"])):
                line += f"; no prompt was longer than the window of {unreached} tokens"
            yield line

    def _canary(self) -> Iterator[str]:
        if all(record.kernel for record in self.records):
            return
        judgements = self.run.get("canary", [])
        if judgements is None:
            yield "canary: turned off, so it was not tested that the cache is read"
            return
        if not judgements:
            yield "canary: no verdict, so it was not tested that the cache is read"
        meaning = {
            "wrecked": "canary (a zeroed cache) breaks the scores, as it must",
            "unmoved": "QUANTIZATION NOT IN EFFECT: a zeroed cache leaves the scores where they were",
            "undecided": "canary undecided: the baseline can't be told from chance",
        }
        for verdict, text in meaning.items():
            those = [one for one in judgements if one["verdict"] == verdict]
            if those:
                yield f"{text}: " + "; ".join(f"{one['task']}{_limited(one['limit'])}: {one['why']}" for one in those)

    # ---- texts

    def document(self, portable: bool = True) -> Document:
        """All of it; portable: with paths from the report itself, which may be committed."""
        notes = self.summary()
        if portable:
            notes = [line.replace(f"{self.folder}/", "") for line in notes]
        title = self.run.get("sweep") or self.folder.resolve().name
        tables, rows = self._contents
        return Document(title, tables, self.run.get("note") or "", LEGEND, notes, rows, FIELDS)

    @cached_property
    def _contents(self) -> tuple[list[Table], list[dict[str, Any]]]:
        """Tables and rows, which a report that is shown and kept has twice."""
        return self.tables(), self.rows()

    def write(self) -> list[Path]:
        """Puts report.md, report.csv and report.json into the run folder."""
        document = self.document()
        return [self.write_as(name, document) for name in KEPT]

    def write_as(self, name: str, document: Document) -> Path:
        """Puts a document of this report in one format into the run folder."""
        path = self.folder / f"report.{all_renderers()[name].ending}"
        write_text(path, render(document, name))
        return path


def _limited(limit: int | None) -> str:
    return "" if limit is None else f" (--limit {limit})"


def _metric(record: Record | None, name: str) -> Metric | None:
    return next((metric for metric in record.metrics if metric.name == name), None) if record else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
