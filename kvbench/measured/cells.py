"""What a run folder holds for a paired test: of each cell's metrics a number a document. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench.measured.series import NoSeriesError, Samples, Series, series_of
from kvbench.results import Record, Store, describe, headline, plain_json


@dataclass(frozen=True)
class Cell:
    """One measured cell. environment: processor and versions, without kvbench's own; series: by name of metric.

    absent: why a metric has no series. values: of all metrics, of records alone.
    """

    name: str
    model: str
    dtype: str
    rotation: str
    task: str
    identity: dict[str, Any]
    environment: str
    series: dict[str, Series]
    absent: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def scheme(self) -> tuple[str, str]:
        """dtype and rotation as the tables have them; a control's is "canary", "again", or "again 1 of" a dtype."""
        return self.dtype, self.rotation

    @property
    def again(self) -> bool:
        """Whether this is a scheme once more."""
        return bool(self.identity.get("again"))

    @property
    def repeats(self) -> tuple[str, str]:
        """What tables call the scheme that it stores by: of an A/A cell, the one that it is once more."""
        scheme = self.identity["scheme"]
        return scheme["dtype"], scheme["rotation"]

    @property
    def control(self) -> bool:
        """Whether this is the zeroed cache, or a scheme once more."""
        return self.dtype == "canary" or self.again

    @cached_property
    def key(self) -> str:
        """What it has in common with the cells that it may be compared with."""
        return key_of(self.identity)


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what a comparison is about: the scheme, and that this is an A/A cell."""
    return {name: value for name, value in identity.items() if name not in ("scheme", "again")}


def key_of(identity: dict[str, Any]) -> str:
    """The same text for identities that may be compared."""
    return json.dumps(plain_json(comparable(identity)), sort_keys=True)


def prompt_forms(tasks: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A line that says which tasks of lm-eval got plain prompts and which a chat, if there are any.

    tasks: what tables call each, and its part of a cell's identity.
    """
    forms: dict[str, dict[str, None]] = {}
    for name, task in tasks:
        if "apply_chat_template" not in task:
            continue
        form = "in the model's chat template" if task["apply_chat_template"] else "plain"
        if task.get("fewshot_as_multiturn") is False:
            form += ", few-shot examples in one turn"
        if system := task.get("system_instruction"):
            form += f", after {json.dumps(system, ensure_ascii=False)}"
        forms.setdefault(form, {})[name] = None
    each = [f"{form} ({', '.join(names)})" if len(forms) > 1 else form for form, names in forms.items()]
    return [f"prompts of lm-eval's tasks: {'; '.join(each)}"] if each else []


@dataclass(frozen=True)
class Measured:
    """The cells of a run folder or of a baseline file, and what the sweep said of them.

    problems: a line for each file that cannot be read. unrun: cells of the sweep of which there is no record.
    """

    path: Path
    cells: list[Cell]
    run: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    unrun: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Lines of what is not there, which rows of numbers have no place for."""
        return self.problems + unrun_line(self.unrun)

    @property
    def baseline(self) -> tuple[str, str] | None:
        """The scheme that the sweep compares with."""
        scheme = self.run.get("baseline")
        return (scheme["dtype"], scheme["rotation"]) if scheme else None

    @property
    def schemes(self) -> list[tuple[str, str]]:
        """Every measured scheme once, without the controls."""
        return list(dict.fromkeys(cell.scheme for cell in self.cells if not cell.control))

    @property
    def margin(self) -> str | None:
        """The margin that the sweep's YAML fixed."""
        margin: str | None = self.run.get("config", {}).get("margin")
        return margin

    def without(self, control: str) -> bool:
        """Whether a control, "canary" or "again", was turned off by name."""
        return self.run.get("config", {}).get(control) is False


def unrun_line(cells: Sequence[str]) -> list[str]:
    """A line on cells of a sweep that have no record, if there are any."""
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return [f"not run, of the sweep's cells: {cells[0]}{more}"] if cells else []


def of_records(folder: Path, records: Sequence[Record], run: dict[str, Any], problems: Sequence[str] = ()) -> Measured:
    """The cells of records in the sweep's order, with their samples read from the folder."""
    store = Store(folder)
    order = {name: place for place, name in enumerate(run.get("cells", []))}
    # what a kernel took is no number a document
    measured = [one for one in records if one.status == "done" and not one.kernel]
    done = sorted(measured, key=lambda one: order.get(one.cell, len(order)))
    unrun = sorted(order.keys() - {one.cell for one in records})
    return Measured(folder, [_cell(store, record) for record in done], run, [*problems], unrun)


def _cell(store: Store, record: Record) -> Cell:
    shown = headline(record.metrics)
    # numbers without a kind stand beside those that are compared, or alone, as speeds do
    wanted = [metric for metric in shown if metric.kind] or shown
    series: dict[str, Series] = {}
    absent: dict[str, str] = {}
    try:
        samples = Samples(store.columns(record.cell))
    except (OSError, ValueError) as error:
        absent = {metric.name: f"its samples cannot be read: {describe(error)}" for metric in wanted}
        wanted = []
    for metric in wanted:
        try:
            series[metric.name] = series_of(metric, samples)
        except NoSeriesError as error:
            absent[metric.name] = str(error)
        # text of a damaged file is decoded when it is first asked for, and columns may have any type
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:
            absent[metric.name] = f"its samples cannot be read: {describe(error)}"
    return Cell(
        record.cell,
        record.model["name"],
        record.dtype,
        record.rotation,
        record.task,
        record.identity,
        platform(record.environment),
        series,
        absent,
        {metric.name: metric.value for metric in shown},
    )


def platform(environment: dict[str, Any]) -> str:
    """Processor and versions, in words."""
    gpus = [gpu["name"] for gpu in environment.get("gpus") or []]
    processor = gpus[0] if gpus and environment.get("device") != "cpu" else environment.get("cpu")
    versions = environment.get("versions") or {}
    software = [
        f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "lm_eval") if versions.get(name)
    ]
    return ", ".join([str(processor), *software])
