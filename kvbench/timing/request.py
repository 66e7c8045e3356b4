"""What is to be timed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from kvbench.files import is_folder
from kvbench.messages import shown, unknown_key, wrong
from kvbench.runners.model_files import read_json
from kvbench.schemes import Scheme
from kvbench.sizes import parse_tokens
from kvbench.yaml_text import ConfigError, Document, read_document, read_file

WORD_BITS = 16
MAX_SIZE = 2**16  # heads, channels of a head, tokens of a page

Operation = Literal["decode", "prefill", "write", "mixed"]


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one attention layer, and of a page."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    def __post_init__(self) -> None:
        sizes = (self.query_heads, self.kv_heads, self.head_dim, self.page_size)
        if min(sizes) < 1 or max(sizes) > MAX_SIZE:
            given = ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))
            bound = "at least 1" if min(sizes) < 1 else f"at most {MAX_SIZE}"
            raise ValueError(f"heads, head_dim and page size are {bound}, not {given}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads are no multiple of {self.kv_heads} KV heads")


@dataclass(frozen=True)
class KernelRequest:
    """A grid of kernel timings.

    dtypes: names, or `key:value` pairs. rotations: names; empty for each dtype's own.
    op: "decode" (one new token a sequence), "prefill" (`context - prefix` new tokens a sequence), "mixed" (the same for
        the first sequence, one token for the others) or "write" (`batch` tokens, quantized and stored).
    contexts: tokens of a sequence, the new ones included; "write" ignores them.
    prefix: tokens that are cached before a prefill.
    peers: also time what others compute, each by name: torch's attention, and FlashInfer's and vLLM's where installed.
    samples: timings kept for each row.
    """

    dtypes: tuple[str, ...]
    rotations: tuple[str, ...] = ()
    op: Operation = "decode"
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (8192, 32768)
    shape: Shape = Shape()
    prefix: int = 0
    peers: bool = True
    samples: int = 30

    def __post_init__(self) -> None:
        if self.op not in get_args(Operation):
            raise ValueError(f"unknown op '{self.op}': one of {', '.join(get_args(Operation))}")
        if self.op in ("prefill", "mixed") and self.prefix >= min(self.contexts):
            raise ValueError(
                f"a prefix of {self.prefix} tokens leaves no new ones in a context of {min(self.contexts)}"
            )

    def schemes(self) -> list[Scheme]:
        """Every dtype × rotation once, as a bf16 model has it.

        Raises:
            ValueError: an unknown name.
        """
        parsed = [Scheme.parse(d, r).resolve(torch.bfloat16) for d in self.dtypes for r in self.rotations or (None,)]
        return list({(one.dtype_name, one.rotation_name): one for one in parsed}.values())

    def check(self, gpu: bool) -> None:
        """Raises ValueError for what would fail only when its turn comes: a name, a head_dim, bf16 without a GPU."""
        for scheme in self.schemes():
            scheme.bits_per_value(self.shape.head_dim)
            for dtype in (scheme.key.dtype, scheme.value.dtype):
                if self.shape.head_dim * dtype.code_bits % WORD_BITS:
                    raise ValueError(
                        f"head_dim {self.shape.head_dim} does not fill the {WORD_BITS}-bit words that kernels read "
                        f"{dtype.name} in: take a multiple of {WORD_BITS // dtype.code_bits}"
                    )
            if not gpu and {"bf16", "auto"} & set(scheme.dtype_name.split(":")):
                raise ValueError(
                    f"{scheme.dtype_name} needs a GPU: Triton's interpreter computes bf16 wrongly; take fp16"
                )


def parse_grid(text: str) -> tuple[int, ...]:
    """Numbers from `1,8,32`, `8k` (8192) and `1k..32k` (each twice the one before).

    Raises:
        ValueError: anything else.
    """
    grid: list[int] = []
    for part in text.split(","):
        ends = [parse_tokens(end) for end in part.split("..")]
        if len(ends) > 2 or ends[-1] < ends[0]:
            raise ValueError(f"'{part}' is no number and no range like 1k..32k")
        value = ends[0]
        while value <= ends[-1]:
            grid.append(value)
            value *= 2
    return tuple(dict.fromkeys(grid))


def shape_of_model(config: Path, page_size: int = 64) -> Shape:
    """The shape that a model's config.json (or the folder it lies in) states.

    Raises:
        ValueError: a config without attention heads, or with heads that are no numbers.
    """
    file = config / "config.json" if is_folder(config) else config
    data = read_json(file)
    data = data.get("text_config", data)
    if not isinstance(data, dict) or "num_attention_heads" not in data:
        raise ValueError(f"{config} states no num_attention_heads")
    heads, kv_heads = data["num_attention_heads"], data.get("num_key_value_heads")
    head_dim, hidden = data.get("head_dim"), data.get("hidden_size")
    for name, value in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads), ("head_dim", head_dim)):
        optional = value is None and name != "num_attention_heads"
        if not optional and (type(value) is not int or not 0 < value <= MAX_SIZE):
            raise ValueError(f"{file}: {name}: expected a whole number from 1 to {MAX_SIZE}, not {shown(value)}")
    if head_dim is None and type(hidden) is not int:
        raise ValueError(f"{file} states neither head_dim nor hidden_size")
    return Shape(heads, kv_heads or heads, head_dim or hidden // heads, page_size)


# ---- a file of grids


def _grid(value: Any) -> Any:
    return parse_grid(str(value)) if isinstance(value, (int, str)) and not isinstance(value, bool) else value


def _one(value: Any) -> Any:
    found = _grid(value)
    if isinstance(found, tuple) and len(found) != 1:
        raise ValueError(f"expected one number, such as 28k, not {shown(value)}")
    return found[0] if isinstance(found, tuple) else found


Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_grid)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ShapeSpec(_Strict):
    """A Shape as a YAML has it."""

    query_heads: Size = 32
    kv_heads: Size = 8
    head_dim: Size = 128
    page_size: Size = 64


class GridSpec(_Strict):
    """A KernelRequest as a YAML has it; what is left out is as there."""

    op: Operation = "decode"
    dtypes: Annotated[list[str], Field(min_length=1)]
    rotations: list[str] = []
    batches: Numbers = ()
    contexts: Numbers = ()
    shape: ShapeSpec = ShapeSpec()
    prefix: Annotated[int, BeforeValidator(_one)] = 0
    peers: bool = True
    samples: Annotated[int, Field(gt=0, le=10_000)] = 30

    def request(self) -> KernelRequest:
        """What it asks for, its names known.

        Raises:
            ValueError: an unknown name, or sizes that do not go together.
        """
        given = self.model_dump(exclude_unset=True)
        given |= {name: tuple(given[name]) for name in ("dtypes", "rotations") if name in given}
        if "shape" in given:
            given["shape"] = Shape(**given["shape"])
        request = KernelRequest(**given)
        request.schemes()
        return request


class GridFile(_Strict):
    """The YAML: a name, a note, and the grids."""

    name: str = ""
    note: str = ""
    grids: Annotated[list[GridSpec], Field(min_length=1)]


def load_requests(path: Path) -> list[KernelRequest]:
    """The grids of a YAML file: `grids:`, each with the fields of a KernelRequest; see configs/kernels.yaml.

    Raises:
        ValueError: an unknown field or a wrong value, with file, line and column.
    """
    document, data = read_document(read_file(path), str(path), "it has 'grids:', a list as in configs/kernels.yaml")
    if isinstance(data, dict) and "tasks" in data and "grids" not in data:
        raise ConfigError(f"{path} is a sweep's: kvbench sweep {path}; kernels have grids, as in configs/kernels.yaml")
    try:
        grids = GridFile.model_validate(data).grids
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(document, item) for item in error.errors())) from None
    requests = []
    for index, grid in enumerate(grids):
        try:
            requests.append(grid.request())
        except ValueError as error:
            raise ConfigError(document.message_near(("grids", index), str(error))) from None
    return requests


def _explain(document: Document, item: ErrorDetails) -> str:
    loc, kind = item["loc"], item["type"]
    if kind == "extra_forbidden":
        kind_of: dict[int, type[BaseModel]] = {1: GridFile, 3: GridSpec, 4: ShapeSpec}
        return document.message(loc, unknown_key(loc[-1], sorted(kind_of[len(loc)].model_fields)), key=True)
    if kind == "missing":
        return document.message(loc[:-1], f"missing key '{loc[-1]}'")
    return document.message(loc, wrong(item))
