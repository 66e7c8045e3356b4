"""How the YAML of a sweep names a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvbench.registry import find_name
from kvbench.runners.backends import DEFAULT, all_backends
from kvbench.tasks.base import Line

ComputeDtype = Literal["float32", "bfloat16", "float16"]


def _backend(value: Any) -> Any:
    return find_name(value, all_backends(), "backend") if isinstance(value, str) else value


Backend = Annotated[str, BeforeValidator(_backend)]

# what lm-eval's --model_args calls a key of ours, and what to do about those that are none
MODEL_ARGS = {
    "revision": "revision",
    "dtype": "compute_dtype",
    "trust_remote_code": "trust_remote_code",
    "device_map": "device_map",
}
ELSEWHERE = {
    "pretrained": "it is the model's `name`",
    "attn_implementation": "a model's attention is kvbench's own, over its cache: see `attention`",
    "device": "see --devices",
    "batch_size": "kvbench fills its passes by memory",
}


def _model_args(given: Any) -> dict[str, Any]:
    """Keys of ours from lm-eval's, a mapping or its text `revision=main,dtype=bfloat16`."""
    if isinstance(given, str):
        pairs = [pair.partition("=") for pair in given.split(",") if pair]
        if wrong := next((key for key, equals, _ in pairs if not equals), None):
            raise ValueError(f"model_args: expected KEY=VALUE,KEY=VALUE, not '{wrong}'")
        truth = {"true": True, "false": False}
        given = {key.strip(): truth.get(value.strip().lower(), value.strip()) for key, _, value in pairs}
    if not isinstance(given, dict):
        raise ValueError(f"model_args: expected KEY=VALUE,KEY=VALUE or a mapping, not {given!r}")
    if given.get("parallelize") is True:  # lm-eval's word for it
        given = {key: value for key, value in given.items() if key != "parallelize"} | {"device_map": "auto"}
    for key in given:
        if key not in MODEL_ARGS:
            taken = f"only {', '.join(MODEL_ARGS)} are taken"
            raise ValueError(f"model_args: {key}: {ELSEWHERE.get(key, taken)}")
    if given.get("dtype") == "auto":
        raise ValueError("model_args: dtype: name one of float32, bfloat16, float16; auto is another for each model")
    if isinstance(given.get("dtype"), str):
        given = {**given, "dtype": given["dtype"].removeprefix("torch.")}
    return {MODEL_ARGS[key]: value for key, value in given.items()}


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
    model_args: str | dict[str, Any] | None = None
    """`revision`, `compute_dtype` (its `dtype`), `trust_remote_code` and `device_map` (or `parallelize=True`) as
    lm-eval writes them: a mapping, or `revision=main,dtype=bfloat16`."""
    device_map: Literal["auto"] | None = None
    """`auto`: of a model that one GPU does not hold, the layers and their pages go over all GPUs of its process."""
    gpus: Annotated[float, Field(gt=0, strict=False)] = 1.0
    """The GPUs that a worker with it takes in a cluster: a share of one, or with `device_map` several; no score hangs
    on it."""

    @model_validator(mode="after")
    def _gpus_that_it_can_use(self) -> Self:
        if self.gpus > 1 and (self.device_map is None or self.gpus != int(self.gpus)):
            raise ValueError(
                f"gpus: {self.gpus:g}: a share of one GPU, or with device_map: auto a whole number of them"
            )
        if self.device_map and self.backend != DEFAULT:
            raise ValueError(f"device_map: backend {self.backend} spreads models itself; only {DEFAULT} takes it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "model_args" not in value:
            return {"name": value} if isinstance(value, str) else value
        own = {key: one for key, one in value.items() if key != "model_args"}
        if twice := sorted(own.keys() & (args := _model_args(value["model_args"])).keys()):
            raise ValueError(f"model_args and {twice[0]} say the same: keep one")
        return own | args
