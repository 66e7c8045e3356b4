"""A sweep as YAML: read, validated, and where it is wrong the line and column that are."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kvbench.calibration import Calibration
from kvbench.files import is_folder, named_path, portable
from kvbench.messages import shown, unknown_key, wrong
from kvbench.registry import find_name
from kvbench.schemes import Scheme, find_preset, split_pair
from kvbench.stats import parse_margin
from kvbench.sweep.parts import REAL, Parts
from kvbench.sweep.paths import anchor
from kvbench.sweep.spec import ComputeDtype, ModelSpec, Strict
from kvbench.tasks import OURS, OptionError
from kvbench.tasks.base import Count, Task
from kvbench.transforms import all_transforms
from kvbench.yaml_text import ConfigError, Document, Loc, apply_setting, read_document, read_file

Scoring = Literal["fused", "replay", "prefill_exact"]
Attention = Literal["auto", "reference", "triton"]
MINIMUM = "a sweep has at least name, model, dtypes (or schemes) and tasks"
# torch takes seeds below 2^64; the A/A cell's is the next one, and each answer that is drawn counts on from there
MAX_SEED = 2**63 - 1


# ---- the shape of the YAML


def _pair(value: Any) -> Any:
    """A mapping or a text, checked to have two names at most."""
    if not isinstance(value, (str, dict)):
        raise ValueError(f"expected a name, KEY:VALUE or {{key: …, value: …}}, not {shown(value)}")
    for name in split_pair(value):
        if not isinstance(name, str):
            raise ValueError(f"expected a name, not {shown(name)}")
    return value


def _dtype(value: Any) -> Any:
    Scheme.parse(_pair(value))
    return value


def _rotation(value: Any) -> Any:
    if value == "default":
        return value
    names = [name for side in split_pair(value) for name in ([side] if isinstance(side, str) else side)]
    if "default" in names:
        raise ValueError("'default' stands alone: it is each dtype's own rotation")
    for name in names:
        for one in name.split("+"):
            find_name(one, [*all_transforms(), "default"], "rotation")
    Scheme.parse("auto", value)
    return value


def _scheme(value: Any) -> Any:
    Scheme.of(value)
    return value


def _calibration(value: Any) -> Any:
    Calibration.of(value)
    return value


DtypePair = Annotated[Any, BeforeValidator(_dtype)]
RotationPair = Annotated[Any, BeforeValidator(_rotation)]
SchemeSpec = Annotated[Any, BeforeValidator(_scheme)]


class DtypeSpec(Strict):
    """A dtype (or one for keys and one for values), and the rotations to run it with where they are not the sweep's."""

    dtype: DtypePair
    """Its name, `KEY:VALUE`, or a mapping with key and value."""
    rotations: Annotated[list[RotationPair], Field(min_length=1)] | None = None
    """In place of the sweep's; `rotation` for one."""

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {"dtype": value}
        value = dict(value)
        if "dtype" not in value and {"key", "value"} & set(value):
            value["dtype"] = {name: value.pop(name) for name in ("key", "value") if name in value}
        if "rotation" in value:
            if "rotations" in value:
                raise ValueError("'rotation' and 'rotations' say the same: keep one")
            value["rotations"] = [value.pop("rotation")]
        return value

    @model_validator(mode="after")
    def _no_rotation_of_a_preset(self) -> Self:
        for rotation in self.rotations or ():
            Scheme.parse(self.dtype, None if rotation == "default" else rotation)
        return self

    @property
    def is_preset(self) -> bool:
        """Whether it names a scheme that has transforms of its own, which the sweep's rotations leave alone."""
        return isinstance(self.dtype, str) and find_preset(self.dtype.split("+")[0]) is not None


def _task(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise ValueError(f"expected a task's name or a mapping, not {shown(value)}")
    return value


TaskSpec = Annotated[Any, AfterValidator(_task)]


def _margin(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit: write {value}pp, in percentage points")
    if isinstance(value, str):
        parse_margin(value)
    return value


def _path(value: str) -> str:
    named_path(value)
    return value


class Sweep(Strict):
    """What `kvbench sweep` runs: every model × dtype × rotation × task, and every model × scheme × task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """What the run folder is called, `out/<name>`."""
    note: str = ""
    """A sentence for the report."""
    model: ModelSpec | None = None
    """A name of `kvbench ls models`, a hub id, a folder, a .gguf file, or a .json configuration for random weights."""
    models: Annotated[list[ModelSpec], Field(min_length=1)] | None = None
    """Several, in place of `model`."""
    dtypes: Annotated[list[DtypeSpec], Field(min_length=1)] | None = None
    """How keys and values are stored: names, `KEY:VALUE` pairs, or mappings with rotations of their own."""
    rotations: Annotated[list[RotationPair], Field(default=["default"], min_length=1)]
    """What prepares rows first, of every dtype that names none of its own; `default` is each dtype's own."""
    schemes: Annotated[list[SchemeSpec], Field(min_length=1)] | None = None
    """Presets by name, names such as "int4+w64s4", or mappings with a window, layers and a calibration."""
    calibration: Annotated[Any, BeforeValidator(_calibration)] = None
    """The text that schemes learn from which name none of their own: `{text: FILE, tokens: N}`."""
    tasks: Annotated[list[TaskSpec], Field(min_length=1)]
    """What is measured: names, or mappings with options."""
    baseline: DtypePair = "fp16"
    """The dtype that all others are compared with."""
    agreement: bool = True
    """Compare a model under an exact cache with transformers before its first cell; refuse it where they differ."""
    canary: bool = True
    """Also run a zeroed cache, which must break the scores."""
    again: bool = True
    """Also run the baseline once more, whose flips are the noise floor, and the first low-bit scheme twice more under
    noise of one ulp."""
    margin: Annotated[str, BeforeValidator(_margin)] = "1pp"
    """The difference that does not matter: points of a share, percent of a perplexity, hundredths of a nat."""
    data: Annotated[str, AfterValidator(_path)] | None = None
    """A folder with the data sets' rows, in place of the hub: <data set>/<configuration>/<split>.jsonl."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Of answers that are drawn, and of the A/A cell."""
    page_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Tokens of a page of the cache; no score depends on it."""
    scoring: Scoring = "fused"
    """`fused` reads the prompt's own tokens from the cache too; `replay` reads it token by token; `prefill_exact` reads
    exact keys and values for the prompt, as other evaluations do."""
    attention: Attention = "auto"
    """What reads and writes the cache: the Triton kernels, or torch operations. "auto" takes the kernels on a GPU
    wherever they can serve; an explicit choice never falls back."""
    compute_dtype: ComputeDtype | None = None
    """What models compute in; without it float32 on a CPU and bfloat16 on a GPU."""
    limit: Count | None = None
    """The first documents of every task alone: a quick look, marked as such in every table."""
    apply_chat_template: bool | None = None
    """Of every task of lm-eval that does not say it itself: ask as a chat."""
    fewshot_as_multiturn: bool | None = None
    """Of every chat that does not say it itself: few-shot examples are turns of it."""
    system_instruction: str | None = None
    """Of every task of lm-eval that does not say it itself: what stands before its prompts."""
    _written: dict[str, str] = PrivateAttr(default_factory=dict)  # of paths in the YAML, by what they mean here

    @model_validator(mode="after")
    def _one_or_many_models(self) -> Self:
        if (self.model is None) == (self.models is None):
            raise ValueError("give either 'model' or 'models'")
        return self

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if self.dtypes is None and self.schemes is None:
            raise ValueError("give 'dtypes', 'schemes' or both: one at least")
        return self

    def config(self) -> dict[str, Any]:
        """The YAML with all defaults, as a run folder keeps it: paths as they were written, and no data folder.

        A run folder may be committed, and names no path of this machine: of a whole path its last part is left, and
        what a text holds a cell's identity has as a hash.
        """

        def as_written(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: as_written(item) for name, item in value.items()}
            if isinstance(value, list):
                return [as_written(item) for item in value]
            return self._written.get(value, value) if isinstance(value, str) else value

        config: dict[str, Any] = portable(as_written(self.model_dump(mode="json", exclude_none=True, exclude={"data"})))
        return config

    @property
    def all_models(self) -> list[ModelSpec]:
        """The models, each with the sweep's compute dtype where it names none of its own."""
        specs = [self.model] if self.model else list(self.models or [])
        return [
            spec if spec.compute_dtype else spec.model_copy(update={"compute_dtype": self.compute_dtype})
            for spec in specs
        ]

    @property
    def baseline_scheme(self) -> Scheme:
        """What the others are compared with, never rotated unless its dtype is by default."""
        return Scheme.parse(self.baseline)

    def all_schemes(self) -> list[Scheme]:
        """Every dtype × rotation, then the schemes, in the order written, each once."""
        found: dict[str, Scheme] = {}
        calibration = None if self.calibration is None else Calibration.of(self.calibration)

        def add(scheme: Scheme, own: bool) -> None:
            scheme = scheme if own or calibration is None else scheme.calibrated(calibration)
            found.setdefault(scheme.label, scheme)

        for spec in self.dtypes or ():
            for rotation in spec.rotations or (["default"] if spec.is_preset else self.rotations):
                add(Scheme.parse(spec.dtype, None if rotation == "default" else rotation), own=False)
        for named in self.schemes or ():
            add(Scheme.of(named), own=isinstance(named, Mapping) and "calibration" in named)
        return list(found.values())

    def data_folder(self) -> Path | None:
        """The mirror of datasets that the YAML names, else KVBENCH_DATA."""
        folder = self.data or os.environ.get("KVBENCH_DATA")
        return named_path(folder) if folder else None

    def make_tasks(self, parts: Parts = REAL) -> list[Task]:
        """The tasks, with what the sweep says for all of them.

        Raises:
            ValueError: an unknown task or option.
        """
        return [parts.make_task(self.task_spec(spec), self.data_folder()) for spec in self.tasks]

    def task_spec(self, spec: Any) -> Any:
        """A task's spec with what the sweep says for all: a smaller limit, and for lm-eval's the form of prompts."""
        spec = dict(spec) if isinstance(spec, Mapping) else {"task": spec}
        if self.limit is not None:
            own = spec.get("limit")
            # what is no number stays, for the task to refuse
            smaller = min(own, self.limit) if isinstance(own, int) and not isinstance(own, bool) else own
            spec["limit"] = self.limit if own is None else smaller
        if spec.get("task") in [*OURS]:
            return spec
        form = {"apply_chat_template": self.apply_chat_template, "system_instruction": self.system_instruction}
        spec = {name: value for name, value in form.items() if value is not None} | spec
        if self.fewshot_as_multiturn is not None and spec.get("apply_chat_template"):
            spec = {"fewshot_as_multiturn": self.fewshot_as_multiturn, **spec}
        return spec


# ---- reading


def load_sweep(path: Path, settings: Sequence[str] = (), *, parts: Parts = REAL) -> Sweep:
    """The sweep of a YAML file, with `key=value` settings laid over it.

    Raises:
        ConfigError: with one message for each thing that is wrong.
    """
    return parse_sweep(read_file(path), str(path), settings, parts=parts, folder=path.parent)


def parse_sweep(
    text: str, name: str, settings: Sequence[str] = (), *, parts: Parts = REAL, folder: Path | None = None
) -> Sweep:
    """The sweep of a YAML text; `name` stands for it in messages. folder: what its relative paths begin at.

    Paths in settings are the command's, and begin where that is given.

    Raises:
        ConfigError: with one message for each thing that is wrong.
    """
    document, data = read_document(text, name, MINIMUM)
    written = anchor(data, folder or Path())
    for setting in settings:
        document.overridden[apply_setting(data, setting)] = setting
    try:
        sweep = Sweep.model_validate(data)
        sweep._written = written
    except ValidationError as error:
        items = sorted(error.errors(), key=lambda item: document.line(item["loc"]))
        raise ConfigError("\n".join(explain(document, item) for item in items)) from None
    wrong = list(problems_beyond_shape(document, sweep, parts))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return sweep


def problems_beyond_shape(document: Document, sweep: Sweep, parts: Parts) -> Iterator[str]:
    """A message for each folder, model and task that cannot be, though it is written well."""
    try:
        data = sweep.data_folder()
    except ValueError as error:
        yield f"KVBENCH_DATA: {error}"
        return
    if data is not None and not is_folder(data):
        text = f"there is no folder {data}"
        yield document.message(("data",), text) if sweep.data else f"KVBENCH_DATA: {text}"
        return
    for index, model in enumerate(sweep.all_models):
        try:
            parts.find_model(model)
        except ValueError as error:
            yield document.message_near(("model",) if sweep.model else ("models", index), str(error))
    for index, spec in enumerate(sweep.tasks):
        try:
            # its identity reads what the task is made of, such as a mirror's file
            parts.make_task(sweep.task_spec(spec), data).identity()
        except ValueError as error:
            if isinstance(error, OptionError):
                yield document.message(("tasks", index, *error.loc), str(error), key=error.unknown)
            else:
                yield document.message_near(("tasks", index), str(error))


# ---- pydantic's errors in our words


def explain(document: Document, item: ErrorDetails) -> str:
    """One message for one of pydantic's errors."""
    kind, value = item["type"], item["input"]
    loc = tuple(step for step in item["loc"])
    if kind == "extra_forbidden":
        return document.message(loc, unknown_key(loc[-1], fields_at(loc[:-1])), key=True)
    if kind == "missing":
        return document.message(loc[:-1], f"missing key '{loc[-1]}'")
    if kind == "value_error":
        return document.message_near(loc, str(item["ctx"]["error"]))
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
        return document.message(loc, f"unknown value {shown(value)}: {hint}")
    if kind == "string_pattern_mismatch":
        return document.message(loc, f"expected up to 100 letters, digits, '.', '_' and '-', not {shown(value)}")
    if kind == "model_type":
        return document.message(loc, f"expected a name or a mapping, not {shown(value)}")
    return document.message(loc, wrong(item))


def fields_at(loc: Loc) -> list[str]:
    """The keys that a mapping at `loc` may have."""
    if not loc:
        return list(Sweep.model_fields)
    if loc[0] in ("model", "models"):
        return list(ModelSpec.model_fields)
    if loc[0] == "dtypes":
        return ["dtype", "key", "value", "rotation", "rotations"]
    return []
