"""How the YAML of a sweep names a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvbench.registry import find_name
from kvbench.runners.backends import DEFAULT, all_backends
from kvbench.tasks.base import Line

ComputeDtype = Literal["float32", "bfloat16", "float16"]


def _backend(value: Any) -> Any:
    return find_name(value, all_backends(), "backend") if isinstance(value, str) else value


Backend = Annotated[str, BeforeValidator(_backend)]


class Strict(BaseModel):
    """A part of the YAML: no unknown key, no value of another kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelSpec(Strict):
    """A model by name, folder, hub id or GGUF file."""

    name: Line
    """As under `model`."""
    revision: Line | None = None
    """A branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Python code that comes with it may run; it decides the numbers too, and the report names it."""
    compute_dtype: ComputeDtype | None = None
    """In place of the sweep's."""
    backend: Backend = DEFAULT
    """What runs it: kvbench's own cache under `transformers`, or another engine's own under its name."""
    gpus: Annotated[float, Field(gt=0, le=1, strict=False)] = 1.0
    """The share of a GPU that a worker with it takes in a cluster; no number hangs on it."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
