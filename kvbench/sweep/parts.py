"""What a sweep needs of the rest of kvbench, as four functions, so that tests can lend it a toy model and toy tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.runners.backends import DEFAULT, Backend, all_backends
from kvbench.runners.base import LoadedModel
from kvbench.sweep.spec import ComputeDtype, ModelSpec
from kvbench.tasks.base import Task

if TYPE_CHECKING:
    from kvbench.runners.catalog import ModelSource


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading it.

    revision, layers, max_length, chat_template (whether it has one), key_bias (whether its keys get one): None where
    only the model itself could say.
    missing: what to do to have it here. parameters: None where only loading it would count them.
    quantized: (how its weights are, bytes of their files), where they are not plain numbers.
    generation: as JSON, what its generation_config.json sets that changes answers. backend: what runs it, by its name.
    tokenizer: whether it has one, which random weights have not.
    """

    name: str
    compute_dtype: ComputeDtype
    revision: str | None = None
    layers: tuple[tuple[int, int], ...] | None = None
    max_length: int | None = None
    missing: str = ""
    chat_template: bool | None = None
    generation: str = "{}"
    parameters: int | None = None
    backend: str = DEFAULT
    key_bias: bool | None = None
    quantized: tuple[str, int] | None = None
    tokenizer: bool = True

    @property
    def runs_on(self) -> Backend:
        """The backend itself."""
        return all_backends()[self.backend]


@dataclass(frozen=True)
class Share:
    """What of a model that is spread one GPU gets. layers: those with a cache, in order. free: bytes, before it."""

    gpu: int
    layers: range
    weights: int
    free: int


@dataclass(frozen=True)
class Parts:
    """The functions; all raise ValueError with a message for a person.

    find_model: facts, offline. fetch_model: brings a missing model here. open_model: loads it, computing in a dtype on
    a device. make_task: the task of a spec, with the folder of a mirror. compare: how a loaded model under an exact
    cache, with a page size and an attention, agrees with itself outside kvbench; None where there is no such thing.
    divide: what each GPU of this machine gets of a model that is spread; nothing on a CPU.
    """

    find_model: Callable[[ModelSpec], ModelFacts]
    fetch_model: Callable[[ModelSpec], None]
    open_model: Callable[[ModelSpec, ComputeDtype, str], LoadedModel]
    make_task: Callable[[Any, Path | None], Task]
    compare: Callable[[LoadedModel, int, Any], dict[str, Any]] | None = None
    divide: Callable[[ModelSpec, ComputeDtype], list[Share]] | None = None


def default_device() -> str:
    """The first GPU, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_compute_dtype() -> ComputeDtype:
    """float32 on a CPU, where 16 bits are no faster; bfloat16 on a GPU."""
    return "float32" if default_device() == "cpu" else "bfloat16"


def _source(spec: ModelSpec) -> ModelSource:
    from kvbench.runners import catalog

    source = catalog.resolve(spec.name, spec.revision)
    return replace(source, trusted=spec.trust_remote_code, spread=spec.device_map is not None)


def find_model(spec: ModelSpec) -> ModelFacts:
    """What this machine knows of a model.

    Raises:
        ValueError: a name that can be no model.
    """
    from kvbench.runners import model_files

    try:
        return _find_model(spec)
    except OSError as error:  # closed to us; a library's own may name no file
        why = f"{error.filename}: {error.strerror}" if error.filename else model_files.one_line(error)
        raise model_files.ModelError(f"model '{spec.name}': {why}") from error


def _find_model(spec: ModelSpec) -> ModelFacts:
    from kvbench.runners import catalog, facts, model_files

    source, backend = _source(spec), all_backends()[spec.backend]
    compute_dtype = spec.compute_dtype or default_compute_dtype()
    name, missing = backend.called(source.name), source.missing or backend.missing()
    try:
        layers, max_length = facts.shape(source)
    except model_files.ModelError:
        if source.available:
            raise
        return ModelFacts(name, compute_dtype, missing=missing, backend=backend.name)
    revision = facts.revision(source) if source.available else None
    return ModelFacts(
        name,
        compute_dtype,
        revision,
        layers,
        max_length - backend.kept,
        missing,
        facts.has_chat_template(source),
        json.dumps(facts.generation_settings(source)),
        facts.parameters(source),
        backend.name,
        facts.key_bias(source),
        (method, catalog.weights_size(source)) if source.available and (method := facts.quantization(source)) else None,
        source.kind != "shape",
    )


def fetch_model(spec: ModelSpec) -> None:
    """Brings a model here that isn't, where a network allows it.

    Raises:
        ValueError: it can't be had, or what runs it.
    """
    from kvbench.runners import load, model_files

    if missing := all_backends()[spec.backend].missing():
        raise model_files.ModelError(f"model '{spec.name}': {missing}")
    load.prepare(_source(spec))


def open_model(spec: ModelSpec, compute_dtype: ComputeDtype, device: str) -> LoadedModel:
    """The model, loaded.

    Raises:
        ValueError: it can't be.
    """
    return all_backends()[spec.backend].open(_source(spec), compute_dtype, device)


def make_task(spec: Any, data: Path | None) -> Task:
    """A task of kvbench's own, or one of lm-eval's by its name.

    Raises:
        ValueError: no such task, or no such option.
    """
    from kvbench.tasks import make_task as make

    return make(spec, data)


def compare(model: LoadedModel, page_size: int, attention: Any) -> dict[str, Any]:
    """How the model under an exact cache agrees with transformers, as a record keeps it.

    Raises:
        RefusedError: it doesn't.
    """
    from kvbench.runners import agreement
    from kvbench.runners.transformers import TransformersModel

    assert isinstance(model, TransformersModel)
    return asdict(agreement.check(model, page_size=page_size, attention=attention))


def divide(spec: ModelSpec, compute_dtype: ComputeDtype) -> list[Share]:
    """What each GPU of this machine gets of a model that is spread; nothing where that can't matter.

    Raises:
        ValueError: its layers can't be spread.
    """
    import torch

    from kvbench.runners import catalog, facts, placement

    source = _source(spec)
    if default_device() == "cpu" or source.kind == "embedded":  # one of packages, which any GPU holds
        return []
    model = placement.skeleton(source, getattr(torch, compute_dtype))
    devices, room = placement.devices_of("cuda")
    places = placement.divide(model, devices, room)
    sizes, free = placement.weight_bytes(model, places), dict(zip(devices, room, strict=True))
    if facts.quantization(source):  # as stored, each layer about alike
        stored = catalog.weights_size(source) / sum(sizes.values())
        sizes = {device: int(size * stored) for device, size in sizes.items()}
    at = [places.layers[i] for i in facts.cache_layer_indices(model.config)]
    return [
        Share(number, range(at.index(device), at.index(device) + at.count(device)), sizes[device], int(free[device]))
        for number, device in enumerate(places.devices)
        if device in at
    ]


REAL = Parts(find_model, fetch_model, open_model, make_task, compare, divide)
