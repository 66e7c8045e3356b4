"""What `kvbench search` does once its arguments are parsed: probe, solve, verify."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench.files import is_there, write_text
from kvbench.render import Document, render
from kvbench.results import Record, Store
from kvbench.schemes import Layers, Scheme
from kvbench.sweep.agreement import known
from kvbench.sweep.command import (
    INTERRUPTED,
    OK,
    Options,
    Planned,
    fetch_models,
    lay_out,
    load,
    make_executor,
    measure,
    run_folder,
    suited,
)
from kvbench.sweep.config import Sweep
from kvbench.sweep.executors.base import Executor
from kvbench.sweep.parts import REAL, ModelFacts, Parts
from kvbench.sweep.plan import BITS_AT, Cell, check_scheme
from kvbench.sweep.plan_document import plan_document
from kvbench.sweep.search.choices import KINDS, SIDES, Costs, Family, Found, Problem, families, predicted
from kvbench.sweep.search.table import Row, search_document
from kvbench.sweep.stopping import terminable
from kvbench.tasks.divergence import Divergence
from kvbench.yaml_text import ConfigError

TOKENS = 4096  # of calibration text, a layer and side
CONTEXT = 1024  # tokens of a document of it at most
FOLDER = "search"  # in the run folder, of what layers cost


@dataclass(frozen=True)
class Request:
    """What to search for.

    budgets: bits a value, of a sequence of `context` tokens; None for BITS_AT, or as long as the model takes.
    best: schemes by layer that are verified for each budget. tokens: of calibration text, a layer and side.
    """

    budgets: tuple[float, ...]
    context: int | None = None
    best: int = 2
    tokens: int = TOKENS


@dataclass(frozen=True)
class Search:
    """A search laid out: the sweep that names what it chooses from, and the model."""

    sweep: Sweep
    request: Request
    options: Options
    parts: Parts
    executor: Executor
    facts: ModelFacts

    @classmethod
    def of(cls, path: Path, request: Request, options: Options, parts: Parts | None = None) -> Search:
        """The search that a command line means.

        Raises:
            ConfigError: the file or a flag is wrong, or there is nothing to choose from.
        """
        parts = parts or REAL
        sweep = load(path, options, parts)
        if len(sweep.all_models) > 1:
            raise ConfigError(
                f"{path}: a search is of one model, and `models` has {len(sweep.all_models)}: --set model=NAME"
            )
        if not any(isinstance(task, Divergence) for task in sweep.make_tasks(parts)):
            raise ConfigError(f"{path}: a search compares schemes by their divergence: add the task divergence")
        executor = make_executor(options, parts)
        sweep = suited(sweep, options, executor)
        made = cls(sweep, request, options, parts, executor, parts.find_model(sweep.all_models[0]))
        if all(len(family.keys) * len(family.values) < 2 for family in made.families):
            raise ConfigError(f"{path}: there is nothing to choose from: list two schemes at least that share a window")
        for scheme in made.listed:
            check_scheme(made.facts, scheme)
        return made

    @cached_property
    def listed(self) -> list[Scheme]:
        """The schemes of the YAML."""
        return self.sweep.all_schemes()

    @cached_property
    def families(self) -> list[Family]:
        """What may be mixed."""
        try:
            return families(self.listed)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def layers(self) -> Layers:
        """The model's, which are known once it is here."""
        assert self.facts.layers is not None
        return self.facts.layers

    @property
    def model_dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype: torch.dtype = getattr(torch, self.facts.compute_dtype)
        return dtype

    @property
    def context(self) -> int:
        """Tokens of the sequence whose bytes count."""
        return self.request.context or min(BITS_AT, self.facts.max_length or BITS_AT)

    def bits(self, scheme: Scheme) -> float:
        """True bits a value of a sequence of `context` tokens."""
        return 8 * scheme.nbytes(self.layers, self.context, self.model_dtype) / self._values

    @property
    def _values(self) -> int:
        return self.context * sum(2 * heads * head_dim for heads, head_dim in self.layers)

    # ---- what layers cost

    def probes(self) -> Planned:
        """The cells that measure each layer's sides alone, in a run folder of their own."""
        spec = self.sweep.all_models[0]
        schemes = [probe for family in self.families for probe in family.probes()]
        options: dict[str, Any] = {
            "task": "layers",
            "tokens": self.request.tokens,
            "context": min(CONTEXT, self.request.tokens, self.facts.max_length or CONTEXT),
        }
        if texts := [
            family.calibration.path for family in self.families if family.calibration and family.calibration.path
        ]:
            options["text"] = str(texts[0])
        cells = []
        for scheme, sides in schemes:
            task = self.parts.make_task(self.sweep.task_spec({**options, "sides": sides}), self.sweep.data_folder())
            cells.append(Cell(spec, self.facts, scheme, task, self.sweep.scoring, self.sweep.seed, self.sweep.limit))
        told = {
            "name": self.sweep.name,
            "note": "what each layer costs alone",
            "dtypes": None,
            "schemes": [scheme.spec() for scheme, _ in schemes],
            "tasks": [options],
            "canary": False,
            "again": False,
        }
        store = Store(run_folder(self.sweep, self.options).folder / FOLDER)
        return Planned(self.sweep.model_copy(update=told), cells, cells, store, self.executor)

    def costs(self, records: Mapping[str, Record], planned: Planned) -> Costs:
        """Nats of each side in each layer, of the probes' records."""
        found: dict[Any, list[float]] = {}
        for cell in planned.cells:
            values = {metric.name: metric.value for metric in records[cell.name].metrics}
            for name, side in zip(SIDES, cell.scheme.sides, strict=True):
                if f"kld_{name}s" in values:
                    found[cell.scheme.window, name, side] = [
                        values[f"kld_l{i}_{name}"] for i in range(len(self.layers))
                    ]
        return found

    # ---- solving

    def found(self, costs: Costs) -> dict[float, list[Found]]:
        """For each budget what loses least, by what its layers cost: a pair of sides, and some schemes by layer."""
        problems = [Problem.of(family, costs, self.layers, self.context, self.model_dtype) for family in self.families]
        rows: dict[float, list[Found]] = {}
        for budget in self.request.budgets:
            room = int(budget * self._values / 8)
            every = sorted(
                (one for p in problems for one in p.best(room, self.request.best)), key=lambda f: f.predicted
            )
            pairs, by_layer = ([one for one in every if one.kind == kind] for kind in KINDS)
            rows[budget] = [*pairs[:1], *by_layer[: self.request.best]]
        return rows

    def check_budgets(self) -> None:
        """Raises ConfigError for a budget that nothing fits; needs no costs."""
        least = min(
            Problem.of(family, {}, self.layers, self.context, self.model_dtype).smallest for family in self.families
        )
        for budget in self.request.budgets:
            if 8 * least / self._values > budget:
                raise ConfigError(
                    f"--budget {budget:g}: the smallest of these schemes takes {8 * least / self._values:.2f} bits a "
                    f"value at {self.context} tokens: raise the budget, or list a smaller scheme"
                )

    # ---- verifying

    def verified(self, schemes: Sequence[Scheme]) -> Planned:
        """The YAML's sweep with these schemes beside its own."""
        more = [*(self.sweep.schemes or []), *(scheme.spec() for scheme in schemes)]
        sweep = self.sweep.model_copy(update={"schemes": more or None})
        return lay_out(sweep, self.options, self.parts, self.executor)


def run_search(
    path: Path, request: Request, options: Options, parts: Parts | None = None
) -> tuple[int, Document | None]:
    """Measures what is not measured yet, and returns the exit code and what was found; None where it did not end.

    Raises:
        ConfigError: the file or a flag is wrong, a budget that nothing fits, or a model that would be measured wrongly.
        UnusableError: a model or data is missing, or another sweep writes to the folder.
    """
    search = Search.of(path, request, options, parts)
    try:
        with terminable():
            return _run(search, path)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; finished work is kept. The same command continues it.\n")
        return INTERRUPTED, None


def _run(search: Search, path: Path) -> tuple[int, Document | None]:
    planned = search.probes()
    absent = fetch_models(planned.cells, search.parts)
    if search.facts.missing and not absent:
        search = replace(search, facts=search.parts.find_model(search.sweep.all_models[0]))
        planned = search.probes()
    if search.facts.layers is not None:
        search.check_budgets()
    code = measure(planned, search.options, search.parts, absent)
    if code != OK:
        return code, None
    records = planned.store.load().records
    costs = search.costs(records, planned)
    found = search.found(costs)
    schemes = {one.scheme.label: one.scheme for several in found.values() for one in several}
    last = search.verified(list(schemes.values()))
    code = measure(replace(last, known=known(records.values())), search.options, search.parts)
    if code != OK:
        return code, None
    return OK, tabled(search, costs, found, last)


def tabled(search: Search, costs: Costs, found: Mapping[float, Sequence[Found]], planned: Planned) -> Document:
    """The table of what was verified, which is written too, and each budget's winner, as a YAML that `sweep` takes."""
    rows = {
        scheme.label: Row(scheme, search.bits(scheme), "listed", predicted(scheme, costs, len(search.layers)))
        for scheme in search.listed
    }
    for one in [one for several in found.values() for one in several]:
        rows.setdefault(one.scheme.label, Row(one.scheme, search.bits(one.scheme), one.kind, one.predicted))
    document, winners = search_document(search.sweep, search.context, list(rows.values()), list(found), planned)
    lines = []
    for budget, scheme in winners.items():
        file = planned.store.folder / f"best-{budget:g}.yaml"
        write_text(file, winner_yaml(search.sweep, scheme, budget, search.context, file.parent))
        lines.append(f"kvbench sweep {file}")
    files = [planned.store.folder / f"search.{ending}" for ending in ("md", "json")]
    lines.append(f"{files[0]} · {files[1].name}")
    document = replace(document, notes=[*document.notes, *lines])
    for file in files:
        write_text(file, render(document, file.suffix[1:]))
    return document


def winner_yaml(sweep: Sweep, scheme: Scheme, budget: float, context: int, folder: Path) -> str:
    """A sweep of one scheme; paths begin at `folder`."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [placed(item) for item in value]
        if isinstance(value, str) and value.startswith("/") and is_there(Path(value)):
            return os.path.relpath(value, folder)
        return value

    row = {
        "name": f"{sweep.name}-best-{budget:g}"[:100],
        "note": f"Found by kvbench search --budget {budget:g}, at {context} tokens.",
        **sweep.model_dump(
            mode="json",
            exclude_unset=True,
            exclude={"name", "note", "dtypes", "rotations", "schemes", "calibration"},
        ),
        "schemes": [scheme.spec()],
    }
    text: str = yaml.safe_dump(placed(row), sort_keys=False, allow_unicode=True, width=120)
    return text


def search_plan(search: Search) -> Document:
    """What would be measured: each layer alone, then the sweep that verifies, to which comes what is found.

    Raises:
        ConfigError: a budget that nothing fits.
    """
    if search.facts.layers is not None:
        search.check_budgets()
    alone, sweep = (plan_document(planned, search.context) for planned in (search.probes(), search.verified([])))
    more = len(search.request.budgets) * (1 + search.request.best)
    heads = ("each layer alone:", f"the sweep of CONFIG, to which come {more} schemes that are found, or fewer:")
    tables = [
        replace(table, title=f"{head} {table.title}")
        for head, document in zip(("each layer alone:", "the sweep:"), (alone, sweep), strict=True)
        for table in document.tables
    ]
    notes = [line for head, one in zip(heads, (alone, sweep), strict=True) for line in (head, *one.notes, "")]
    rows = [*alone.rows, *sweep.rows]
    title = f"{search.sweep.name}: what a search would run"
    return Document(title, tables, notes=notes[:-1], rows=rows, fields=sweep.fields)
