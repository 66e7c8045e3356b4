"""What is to be timed."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml

from kvbench.schemes import Scheme

Operation = Literal["decode", "prefill", "write", "mixed"]


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one attention layer, and of a page."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.head_dim, self.page_size) < 1:
            given = ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))
            raise ValueError(f"heads, head_dim and page size are at least 1, not {given}")
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
        ends = [_number(end) for end in part.split("..")]
        if len(ends) > 2 or ends[-1] < ends[0]:
            raise ValueError(f"'{part}' is no number and no range like 1k..32k")
        value = ends[0]
        while value <= ends[-1]:
            grid.append(value)
            value *= 2
    return tuple(dict.fromkeys(grid))


def _number(text: str) -> int:
    text = text.strip().lower()
    factor = 1024 if text.endswith("k") else 1
    digits = text.removesuffix("k")
    if not digits.isdigit() or int(digits) == 0:
        raise ValueError(f"'{text}' is no number from 1 on: write 32768 or 32k")
    return int(digits) * factor


def shape_of_model(config: Path, page_size: int = 64) -> Shape:
    """The shape that a model's config.json (or the folder it lies in) states.

    Raises:
        ValueError: a config without attention heads.
    """
    file = config / "config.json" if config.is_dir() else config
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    data = data.get("text_config", data)
    if "num_attention_heads" not in data:
        raise ValueError(f"{config} states no num_attention_heads")
    heads = int(data["num_attention_heads"])
    head_dim = int(data.get("head_dim") or data["hidden_size"] // heads)
    return Shape(heads, int(data.get("num_key_value_heads") or heads), head_dim, page_size)


def load_requests(path: Path) -> list[KernelRequest]:
    """The grids of a YAML file: `grids:`, each with the fields of a KernelRequest; see configs/kernels.yaml.

    Raises:
        ValueError: an unknown field or a wrong value, with the file and the grid.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    grids = data.get("grids") if isinstance(data, dict) else None
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ValueError(f"{path}: expected 'grids:', a list of grids as in configs/kernels.yaml")
    known = {field.name for field in fields(KernelRequest)}
    requests = []
    for index, grid in enumerate(grids):
        where = f"{path}: grids[{index}]"
        if unknown := set(grid) - known:
            raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; fields are {', '.join(sorted(known))}")
        values = dict(grid)
        try:
            for name in ("batches", "contexts"):
                if name in values:
                    values[name] = parse_grid(str(values[name]))
            for name in ("dtypes", "rotations"):
                if name in values:
                    values[name] = tuple(values[name])
            if "prefix" in values:
                (values["prefix"],) = parse_grid(str(values["prefix"]))
            if "shape" in values:
                values["shape"] = Shape(**values["shape"])
            requests.append(KernelRequest(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    return requests
