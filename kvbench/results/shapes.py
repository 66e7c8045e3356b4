"""Plain JSON read as the types that fields have: a wrong type is one line that names the place. Imports no torch."""

# without `annotations` of __future__, under which a TypedDict does not know its optional keys
import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
LARGEST = int(sys.float_info.max)
NON_FINITE = ("inf", "-inf", "nan")  # what JSON has instead of these numbers


def read_as(hint: Any, value: Any, where: str = "") -> Any:
    """`value` as a type: a dataclass or a TypedDict from a mapping, a tuple from a list, a number from `inf` or `nan`.

    A whole number stays one where a number is asked for. A TypedDict may have more keys; a dataclass may not.

    Raises:
        ValueError: it is something else; `where` names the place.
    """
    if (type(value) is hint and hint is not int) or hint is Any:
        return value
    return _read(_form(hint), value, where)


def _read(form: tuple[Any, Any, tuple[Any, ...], bool, bool], value: Any, where: str) -> Any:
    """`read_as`, of a type that was looked at before."""
    hint, kind, inner, typed, fielded = form
    if kind in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        others = [one for one in inner if one is not types.NoneType]
        return read_as(next((one for one in others if type(value) is one), others[0]), value, where)
    if kind is Literal:
        if value in inner and isinstance(value, str):
            return value
        raise _wrong(where, " or ".join(map(repr, inner)), value)
    if kind in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        types_of = [inner[0]] * len(value) if kind is list or inner[1:] == (...,) else list(inner)
        if len(types_of) != len(value):
            raise _wrong(where, f"a list of {len(types_of)}", value)
        items = [read_as(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(types_of, value, strict=True))]
        return items if kind is list else tuple(items)
    if kind is dict or typed or fielded:
        if not isinstance(value, dict):
            raise _wrong(where, WORDS[dict], value)
        prefix = f"{where}." if where else ""
        if kind is dict and inner[1] is Any:
            return dict(value)
        if kind is dict:
            return {key: read_as(inner[1], item, f"{prefix}{key}") for key, item in value.items()}
        return _read_keys(hint, value, prefix)
    # a whole number that no float reaches can't be divided to be shown
    if hint in (int, float) and isinstance(value, int) and abs(value) > LARGEST:
        raise _wrong(where, WORDS[hint], value)
    if hint is float and (value in NON_FINITE or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        return value if isinstance(value, (int, float)) else float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(where, WORDS[hint], value)


@cache
def _form(hint: Any) -> tuple[Any, Any, tuple[Any, ...], bool, bool]:
    """A type with its origin and arguments, and whether it is a TypedDict or a dataclass."""
    return hint, get_origin(hint), get_args(hint), is_typeddict(hint), is_dataclass(hint)


def _read_keys(hint: Any, value: dict[str, Any], prefix: str) -> Any:
    forms, required, typed = _keys_of(hint)
    if not typed and (unknown := value.keys() - forms.keys()):
        first = next(key for key in value if key in unknown)
        raise ValueError(f"{prefix}{first}: there is no such field")
    if lacking := required - value.keys():
        raise ValueError(f"{prefix}{next(key for key in forms if key in lacking)} is missing")
    read = {}
    for key, item in value.items():
        form = forms.get(key)
        if form is None or (type(item) is form[0] and form[0] is not int) or form[0] is Any:
            read[key] = item
        else:
            read[key] = _read(form, item, f"{prefix}{key}")
    return read if typed else hint(**read)


@cache
def _keys_of(hint: Any) -> tuple[dict[str, Any], set[str], bool]:
    """The types of a dataclass's or a TypedDict's keys, those that must be there, and whether it is a TypedDict.

    Types are as `_form` has them: a Literal takes long to look up.
    """
    if is_dataclass(hint):
        required = {f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING}
    else:
        required = set(hint.__required_keys__)
    return {key: _form(one) for key, one in get_type_hints(hint).items()}, required, is_typeddict(hint)


def _wrong(where: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    place = f"{where}: " if where else ""
    return ValueError(f"{place}expected {expected}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")


# ---- what stands in a record and in run.json, as far as it is read


class MetricOfBefore(TypedDict):
    """A metric of a record of version 1."""

    name: str
    value: float
    stderr: float | None
    n: int
    unit: str
    higher_is_better: bool | None


class Sums(TypedDict):
    """Checksums of a cell's files, of record.json without them."""

    record: str
    samples: NotRequired[str]


class Scheme(TypedDict):
    """A dtype and a rotation, by their names; of keys and values where these differ."""

    dtype: str
    rotation: str


class Model(TypedDict):
    """A model as it was measured."""

    name: str
    revision: NotRequired[str | None]
    compute_dtype: NotRequired[str | None]
    layers: NotRequired[list[tuple[int, int]] | None]
    max_length: NotRequired[int | None]
    extra: NotRequired[dict[str, Any] | None]


class Gpu(TypedDict):
    """A graphics processor."""

    name: str


class Git(TypedDict):
    """The checkout that kvbench ran from."""

    revision: NotRequired[str | None]
    dirty: NotRequired[bool | None]


class Environment(TypedDict):
    """What a cell ran on and with."""

    kvbench: NotRequired[str | None]
    git: NotRequired[Git | None]
    source_sha256: NotRequired[str | None]
    device: NotRequired[str | None]
    cpu: NotRequired[str | None]
    cores: NotRequired[int | None]
    gpus: NotRequired[list[Gpu] | None]
    versions: NotRequired[dict[str, str | None] | None]


class Kernel(TypedDict):
    """What was timed of a kernel."""

    op: str
    batch: int
    context: int | None
    prefix: int
    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int


class KernelRow(Kernel):
    """A row of `kvbench kernel`."""

    dtype: str
    rotation: str
    read_bytes: int
    us: float | None
    us_p10: NotRequired[float | None]
    us_p90: NotRequired[float | None]
    gbps: NotRequired[float | None]
    share_of_copy: NotRequired[float | None]
    speedup: float | None
    best_16bit_us: NotRequired[float | None]
    best_16bit_peer: NotRequired[str | None]
    same_dtype_us: NotRequired[float | None]
    same_dtype_peer: NotRequired[str | None]
    same_dtype_speedup: NotRequired[float | None]
    rel_error: float
    gate: str


class TimedRow(TypedDict):
    """A row of `kvbench kernel` with its samples, as a file of JSON may have it."""

    op: str
    dtype: str
    rotation: str
    batch: int
    context: int | None
    samples_us: list[float]
    us: NotRequired[float | None]
    prefix: NotRequired[int | None]
    query_heads: NotRequired[int | None]
    kv_heads: NotRequired[int | None]
    head_dim: NotRequired[int | None]
    page_size: NotRequired[int | None]


class CellIdentity(TypedDict):
    """All that decides the numbers of a sweep's cell, as far as a report reads it."""

    model: Model
    scheme: Scheme
    task: dict[str, Any]
    scoring: str
    seed: int
    limit: int | None
    again: NotRequired[bool | int]
    generation: NotRequired[dict[str, Any] | None]


class Agreement(TypedDict):
    """How a model under an exact cache agreed with the model."""

    largest: float
    noise: float
    tokens: int
    unreached: list[int]


class Learned(TypedDict):
    """What a scheme learned of its text."""

    means: NotRequired[str]  # of a scheme that centres
    tokens: int
    text_sha256: str
    sha256: str
    seconds: NotRequired[float]


class Facts(TypedDict):
    """What explains a cell's numbers, as far as a report reads it; tasks have more."""

    agreement: NotRequired[Agreement | None]
    learned: NotRequired[Learned | None]
    longest_context_limit: NotRequired[str | None]
    kernel_us: NotRequired[float | None]
    attention: NotRequired[str | None]
    kernels_lack: NotRequired[str | None]


class KernelIdentity(TypedDict):
    """All that decides the time of a kernel."""

    kernel: Kernel
    scheme: Scheme
    device: str | None


class Verdict(TypedDict):
    """What a zeroed cache showed of a task."""

    model: str
    task: str
    limit: int | None
    verdict: Literal["wrecked", "unmoved", "undecided"]
    why: str


class Config(TypedDict):
    """The YAML of a sweep, as far as a report reads it."""

    margin: NotRequired[str | None]
    canary: NotRequired[bool]
    again: NotRequired[bool]


class Run(TypedDict):
    """What run.json says."""

    sweep: NotRequired[str]
    note: NotRequired[str | None]
    baseline: NotRequired[Scheme | None]
    schemes: NotRequired[list[Scheme]]
    cells: NotRequired[list[str]]
    canary: NotRequired[list[Verdict] | None]
    config: NotRequired[Config]
