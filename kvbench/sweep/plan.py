"""Which cells a sweep has, what decides their numbers, and what their caches take."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Any, Literal, get_args

import torch

from kvbench.attention import kernels_lack
from kvbench.environment import host_memory
from kvbench.results import Record, dtype_label, name_of
from kvbench.runners.backends import DEFAULT, Asked, Gift
from kvbench.runners.model_files import NO_TOKENIZER
from kvbench.runners.settings import refusal
from kvbench.schemes import Layers, Scheme
from kvbench.sweep.config import Sweep
from kvbench.sweep.parts import REAL, ModelFacts, Parts
from kvbench.sweep.spec import ModelSpec
from kvbench.tasks.base import INSTEAD, Task, beyond, no_template
from kvbench.yaml_text import ConfigError

NUDGES = 2  # times that a low-bit scheme is repeated
IDENTITY_VERSION = 1  # raised when the same configuration comes to mean another number


@dataclass(frozen=True)
class Place:
    """What decides a speed besides model, scheme and task. device: the GPUs' name, or "cpu"."""

    device: str
    attention: str
    page_size: int


# the baseline is what the others are compared with; the canary's cache is destroyed; repeat is the baseline once more,
# in other batches and with the next seed, or where it is timed just as it was, or a low-bit scheme with noise
Role = Literal["cell", "baseline", "canary", "repeat"]

BITS_AT = 8192  # tokens of the sequence whose bits a value are stated, where they depend on that


@dataclass(frozen=True)
class Cell:
    """One number-giving unit: a model under a scheme, measured by a task.

    role: what it is for. nudge: of a low-bit scheme once more, the seed of its noise of one ulp; else 0.
    limit: documents that `--limit` leaves of every task. place: of a timed task, else None.
    """

    spec: ModelSpec
    model: ModelFacts
    scheme: Scheme
    task: Task
    scoring: str
    seed: int
    limit: int | None = None
    role: Role = "cell"
    place: Place | None = None
    nudge: int = 0

    @property
    def baseline(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.role == "baseline"

    @property
    def canary(self) -> bool:
        """Whether its cache is destroyed."""
        return self.role == "canary"

    @property
    def again(self) -> bool:
        """Whether it is the baseline, or a low-bit scheme, once more."""
        return self.role == "repeat"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides its numbers.

        Not among it: the page size, the device and the versions of torch and transformers. The first changes no score
        (a test holds that), the others change the last digits, and an upgrade should not throw a night's work away;
        they stand in the record's environment, and the report says where cells of several environments meet. A timed
        task's numbers are those of a device, a page size and an attention, so these are part of its options.
        """
        return {
            "version": IDENTITY_VERSION,
            "model": {
                "name": self.model.name,
                "revision": self.model.revision,
                "compute_dtype": self.model.compute_dtype,
                **({"trust_remote_code": True} if self.spec.trust_remote_code else {}),
                **({"backend": self.model.backend} if self.model.backend != DEFAULT else {}),
            },
            "scheme": {**self.scheme.identity(), "destroyed": self.canary},
            "task": {**self.task.identity(), **(asdict(self.place) if self.place else {})},
            "scoring": self.scoring,
            "seed": self.seed,
            "limit": self.limit,
            # what is not there is left out: no name of an earlier cell changes
            **({"generation": self.generation} if self.generation else {}),
            **({"again": self.nudge or True} if self.again else {}),
        }

    @cached_property
    def name(self) -> str:
        """Its folder: a readable slug and the hash of its identity."""
        model = self.model.name.rsplit("/", 1)[-1]
        return name_of(f"{model}-{self.dtype}-{self.rotation}-{self.task.name}", self.identity)

    @property
    def generation(self) -> dict[str, Any]:
        """What the model's generation_config.json does to its answers, where it gives any."""
        if "generation" not in self.task.needs():
            return {}
        settings: dict[str, Any] = json.loads(self.model.generation)
        return settings

    @property
    def judged(self) -> bool:
        """Whether it says, with others of its model, that quantization is in effect."""
        return self.role in ("baseline", "canary")

    @property
    def dtype(self) -> str:
        """What tables call its dtype."""
        return "canary" if self.canary else dtype_label(self.scheme.dtype_name, self.nudge or self.again)

    @property
    def rotation(self) -> str:
        """What tables call its rotation."""
        return self.scheme.rotation_name

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"{self.dtype} · {self.rotation} · {self.task.name}"

    @property
    def resolved(self) -> Scheme:
        """Its scheme with `auto` replaced by the compute dtype."""
        return self.scheme.resolve(self.compute_dtype)

    @cached_property
    def kv_bytes_per_token(self) -> float | None:
        """Bytes of one token's keys and values over all layers; None where the model's shape is unknown."""
        if self.model.layers is None:
            return None
        return token_bytes(self.scheme, self.model.layers, self.compute_dtype)

    @property
    def bits_per_value(self) -> float | None:
        """True bits a value over all layers; at head_dim 128 where the model's shape is unknown.

        With a window, those of a sequence of BITS_AT tokens, or as long as the model takes.
        """
        return self.bits_at(min(BITS_AT, self.model.max_length or BITS_AT))

    def bits_at(self, tokens: int) -> float:
        """True bits a value of a sequence of so many tokens."""
        return bits_at(self.scheme, self.model.layers or ((1, 128),), tokens, self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype: torch.dtype = getattr(torch, self.model.compute_dtype)
        return dtype


@cache
def token_bytes(scheme: Scheme, layers: Layers, dtype: torch.dtype) -> float:
    """Bytes of one token's keys and values over all layers, the same for all tasks of a scheme."""
    return scheme.resolve(dtype).token_bytes(layers)


@cache
def bits_at(scheme: Scheme, layers: Layers, tokens: int, dtype: torch.dtype) -> float:
    """True bits a value of a sequence of so many tokens, the same for all tasks of a scheme."""
    values = tokens * sum(2 * heads * head_dim for heads, head_dim in layers)
    return 8 * scheme.nbytes(layers, tokens, dtype) / values


def plan(
    sweep: Sweep,
    done: Collection[str] = (),
    parts: Parts = REAL,
    device: Callable[[], str] = lambda: "cpu",
    gpus: Callable[[ModelSpec], int] = lambda _: 1,
) -> list[Cell]:
    """The cells of a sweep that are not `done`, in the order they run. device: names what they run on, if one is timed.

    gpus: how many of them a model is on.

    The cells of a model follow each other, so that it is loaded once: first the baseline's, then the canary's (a sweep
    whose quantization is not in effect stops there), the baseline's once more, then the others, task by task within a
    scheme, and at last a low-bit scheme's once more with noise of one ulp. Controls that a model's backend does not
    give are left out.

    Raises:
        ConfigError: a model or task that cannot be, a head_dim that a dtype can't take, or what a backend can't do.
    """
    cells: dict[str, Cell] = {}
    tasks = [parts.make_task(sweep.task_spec(spec), sweep.data_folder()) for spec in sweep.tasks]
    baseline = sweep.baseline_scheme
    place = Place(device(), sweep.attention, sweep.page_size) if any(task.timed for task in tasks) else None
    for spec in sweep.all_models:
        facts = parts.find_model(spec)
        gives = facts.runs_on.gives
        schemes: list[tuple[Scheme, Role]] = [(baseline, "baseline")]
        if sweep.canary and "zeroed cache" in gives:
            schemes.append((baseline, "canary"))
        if sweep.again:
            schemes.append((baseline, "repeat"))
        schemes += [(scheme, "cell") for scheme in sweep.all_schemes()]
        of_model: list[Cell] = []
        for scheme, role in schemes:
            check_scheme(facts, scheme)
            for task in tasks:
                own = on_several(place, spec, gpus) if place and task.timed else None
                of_model.append(Cell(spec, facts, scheme, task, sweep.scoring, sweep.seed, sweep.limit, role, own))
        if facts.backend != DEFAULT:
            check_backend(of_model, sweep.attention, device())
        for cell in [*of_model, *(quantized_repeats(of_model) if sweep.again and "noise" in gives else [])]:
            cells.setdefault(cell.name, cell)
    return [cell for name, cell in cells.items() if name not in done]


def on_several(place: Place, spec: ModelSpec, gpus: Callable[[ModelSpec], int]) -> Place:
    """The place of a model that may be on several GPUs."""
    count = gpus(spec) if spec.device_map else 1
    return replace(place, device=f"{count} × {place.device}") if count > 1 else place


def quantized_repeats(cells: Sequence[Cell]) -> list[Cell]:
    """The first scheme of fewer than 8 bits a value, else of fewer than 16, NUDGES times more, but for timed tasks."""
    own = [cell for cell in cells if cell.role == "cell"]
    low = next((cell.scheme for limit in (8, 16) for cell in own if (cell.bits_per_value or 16) < limit), None)
    once = [cell for cell in own if low is not None and cell.scheme == low and not cell.task.timed]
    return [replace(cell, role="repeat", nudge=seed) for seed in range(1, NUDGES + 1) for cell in once]


def check_scheme(model: ModelFacts, scheme: Scheme) -> None:
    """Raises ConfigError where a model whose shape is known can't have the scheme."""
    if model.layers is None:
        return
    try:
        scheme.check(model.layers, model.max_length)
    except ValueError as error:
        raise ConfigError(f"model {model.name}, scheme {scheme.label}: {error}") from None


def check_backend(cells: Sequence[Cell], attention: str, device: str) -> None:
    """Raises ConfigError where a model's backend can't do what a cell of it asks. device: its name, or "cpu"."""
    for cell in cells:
        model, backend = cell.model, cell.model.runs_on
        if lacking := sorted(cell.task.needs() & {*get_args(Gift)} - backend.gives):
            instead = f"; {INSTEAD[lacking[0]]}" if lacking[0] in INSTEAD else ""
            raise ConfigError(
                f"model {model.name}, task {cell.task.name}: it needs {lacking[0]}, which backend {backend.name} does "
                f"not give{instead}"
            )
        asked = Asked(cell.scheme, model.compute_dtype, device, cell.scoring, attention, cell.generation)
        if refused := backend.refuses(asked):
            raise ConfigError(f"model {model.name}, scheme {cell.scheme.label}: {refused}")


# ---- --only and --skip

FILTER_KEYS = ("model", "dtype", "rotation", "scheme", "task")


@dataclass(frozen=True)
class Filter:
    """`dtype=int4*`: cells of which a part matches a pattern; a name without wildcards may be short."""

    key: str
    pattern: str

    @classmethod
    def parse(cls, text: str, flag: str) -> Filter:
        """The filter of `KEY=PATTERN`.

        Raises:
            ConfigError: another form, or another key.
        """
        key, equals, pattern = text.partition("=")
        if not equals or key not in FILTER_KEYS or not pattern:
            raise ConfigError(f"{flag} {text}: expected KEY=PATTERN with KEY one of {', '.join(FILTER_KEYS)}")
        if key == "scheme":
            try:
                return cls(key, Scheme.of(pattern).label)
            except ValueError as error:
                raise ConfigError(f"{flag} {text}: {error}") from None
        if key in ("dtype", "rotation") and pattern not in ("canary", "again") and not re.search(r"[*?\[]", pattern):
            try:
                scheme = Scheme.parse(pattern) if key == "dtype" else Scheme.parse("auto", pattern)
            except ValueError as error:
                raise ConfigError(f"{flag} {text}: {error}") from None
            pattern = scheme.columns()[key]
        elif pattern == "again":
            pattern = "again*"  # of a low-bit scheme too
        return cls(key, pattern)

    def matches(self, cell: Cell) -> bool:
        """Whether the cell is meant."""
        name = part(cell, self.key)
        # a hub id by its last part too
        return fnmatchcase(name, self.pattern) or fnmatchcase(name.rsplit("/", 1)[-1], self.pattern)


def part(cell: Cell, key: str) -> str:
    """What a cell is called under one of FILTER_KEYS."""
    return {
        "model": cell.model.name,
        "dtype": cell.dtype,
        "rotation": cell.rotation,
        "scheme": f"{cell.dtype} · {cell.rotation}",
        "task": cell.task.name,
    }[key]


def choose(cells: Sequence[Cell], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Cell]:
    """The cells that match one `only` filter of each key given, and no `skip` filter.

    A low-bit scheme's repeat goes with the cell that it repeats.

    Raises:
        ConfigError: a malformed filter, or one that matches nothing.
    """
    wanted = [Filter.parse(text, "--only") for text in only]
    unwanted = [Filter.parse(text, "--skip") for text in skip]
    for chosen, flag in ((wanted, "--only"), (unwanted, "--skip")):
        for one in chosen:
            if not any(one.matches(cell) for cell in cells):
                there = ", ".join(sorted({part(cell, one.key) for cell in cells}))
                raise ConfigError(f"{flag} {one.key}={one.pattern} matches no cell; there are {there}")
    keys = {one.key for one in wanted}
    found = [
        cell
        for cell in cells
        if all(any(one.matches(cell) for one in wanted if one.key == key) for key in keys)
        and not any(one.matches(cell) for one in unwanted)
    ]
    left_out = {cell.name for cell in cells} - {cell.name for cell in found}
    return [cell for cell in found if not cell.nudge or replace(cell, role="cell", nudge=0).name not in left_out]


def done_otherwise(cells: Sequence[Cell], records: Iterable[Record]) -> list[str]:
    """A line for each task that has done cells of the same name which do not count, for data or options are others."""
    planned = {(cell.model.name, cell.dtype, cell.rotation, cell.task.name): cell for cell in cells}
    names, found = {cell.name for cell in cells}, Counter[tuple[str, tuple[str, ...]]]()
    for record in records:
        cell = planned.get((str(record.model.get("name")), record.dtype, record.rotation, record.task))
        if record.status == "done" and record.cell not in names and cell is not None:
            here, there = _flat(cell.identity), _flat(record.identity)
            others = tuple(name for name in {**there, **here} if here.get(name) != there.get(name))
            found[record.task, others] += 1
    lines = []
    for (task, differing), count in found.items():
        cells_are = f"{count} {'cell is' if count == 1 else 'cells are'} done"
        why = (
            "over data files that are not here"
            if differing == ("task.data",)
            else f"with another {', '.join(differing)}"
        )
        lines.append(f"{task}: {cells_are} {why}, and {'does' if count == 1 else 'do'} not count")
    return lines


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the options of its task beside the rest."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat |= {f"task.{key}": one for key, one in value.items()} if name == "task" else {name: value}
    return flat


def missing_data(cells: Sequence[Cell]) -> list[str]:
    """What this machine lacks to run the cells' tasks, one line each with what to do."""
    tasks = {cell.task.name: cell.task for cell in cells}
    return list(dict.fromkeys(line for task in tasks.values() for line in task.missing()))


def doubts(cells: Sequence[Cell]) -> list[str]:
    """A line for each thing that may go wrong in the cells' tasks."""
    tasks = {cell.task.name: cell.task for cell in cells}
    return list(dict.fromkeys(f"WARNING: {name}: {line}" for name, task in tasks.items() for line in task.doubts()))


def too_long(cells: Sequence[Cell]) -> list[str]:
    """A line for each task that would fail: its sequences are longer than a model's positions, where both are known."""
    lines = []
    for model, task in {(cell.model.name, cell.task.name): (cell.model, cell.task) for cell in cells}.values():
        tokens, positions = task.longest(), model.max_length
        if tokens is not None and positions is not None and tokens > positions:
            lines.append(f"model {model.name}, task {task.name}: {beyond(tokens, positions)}")
    return lines


def too_large(cells: Sequence[Cell], device: str) -> list[str]:
    """A line for each model whose weights are more than a CPU's memory: the system would end this process, or others.

    A GPU's memory that is too small is an error of the cell.
    """
    here = host_memory() if device == "cpu" else None
    lines = []
    for model in dict.fromkeys(cell.model for cell in cells):
        size = (model.parameters or 0) * getattr(torch, model.compute_dtype).itemsize
        if here is not None and size > here and model.quantized is None:
            lines.append(
                f"model {model.name}: its weights take {size / 2**30:.1f} GiB in {model.compute_dtype}, and this "
                f"machine has {here / 2**30:.1f}: take a smaller model, or a machine with a GPU"
            )
    return lines


def unserved(cells: Sequence[Cell], attention: str, device: str) -> list[str]:
    """A line for each reason that the kernels can't serve a model's schemes where `attention` asks for nothing else."""
    if attention != "triton":
        return []
    found = defaultdict[tuple[str, str], dict[str, None]](dict)
    for cell in cells:
        head_dims = {head_dim for _, head_dim in cell.model.layers or ()}
        if lack := kernels_lack(cell.scheme, cell.compute_dtype, torch.device(device), head_dims, copies=True):
            found[cell.model.name, lack][cell.scheme.label] = None
    return [
        f"model {model}, scheme {next(iter(schemes))}: attention: triton can't serve it"
        f"{f', nor {len(schemes) - 1} more' if len(schemes) > 1 else ''}: {lack}"
        for (model, lack), schemes in found.items()
    ]


def unsuited(cells: Sequence[Cell]) -> list[str]:
    """A line for each task that would fail: a model lacks what it needs, where that is known."""
    lines = []
    for cell in {(cell.model.name, cell.task.name): cell for cell in cells}.values():
        model, task = cell.model, cell.task
        if refused := refusal(cell.generation):
            lines.append(f"model {model.name}, task {task.name}: {refused}")
        if "tokenizer" in task.needs() and not model.tokenizer:
            lines.append(f"model {model.name}, task {task.name}: {NO_TOKENIZER}")
        elif "chat template" in task.needs() and model.chat_template is False:
            lines.append(f"task {task.name}: {no_template(model.name)}")
    return lines
