"""Which device has which part of a model, and how what it computes goes from one to the next.

Layers stay in their order, a run of them on each device. What comes before them is with the first, what follows them
with the last, logits too: so a pass goes through the devices once, and the next can begin behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.runners.catalog import ModelSource
from kvbench.runners.model_files import ModelError, RefusedError, one_error, read_json, transformers_config
from kvbench.runners.probe import decoder_of


@dataclass(frozen=True)
class Places:
    """Where a model is. layers: the device of each decoder layer, by the model's number."""

    layers: tuple[torch.device, ...]

    @property
    def first(self) -> torch.device:
        """Where token ids go in."""
        return self.layers[0]

    @property
    def last(self) -> torch.device:
        """Where hidden states and logits come out."""
        return self.layers[-1]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each once, in order."""
        return tuple(dict.fromkeys(self.layers))


@dataclass(frozen=True)
class _Unit:
    """A module that is on one device as a whole. place: the number of a layer, -1 before and -2 behind them all."""

    module: nn.Module
    place: int

    @property
    def nbytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def devices_of(device: str) -> tuple[list[torch.device], list[float]]:
    """What a model is spread over, and the bytes that are free there: every GPU of this process, or the CPU."""
    if device == "cpu":
        return [torch.device("cpu")], [1.0]
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return gpus, [float(torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus]


def in_one_place(model: Any) -> Places:
    """Of a model that is on one device."""
    return Places((model.device,) * model.config.get_text_config(decoder=True).num_hidden_layers)


def divide(model: Any, devices: Sequence[torch.device], room: Sequence[float]) -> Places:
    """Where each layer goes so that no device is fuller than it must be. room: of each device, in bytes or shares.

    The model may be on the meta device. A device without a layer has no part in it.

    Raises:
        RefusedError: its layers are in no one list.
    """
    units = _units(model)
    sizes = [unit.nbytes for unit in units if unit.place >= 0]
    before, behind = (sum(unit.nbytes for unit in units if unit.place == place) for place in (-1, -2))
    most = min(len(devices), len(sizes))
    low, high = 0.0, (before + behind + sum(sizes)) / min(room[:most])
    for _ in range(50):
        middle = (low + high) / 2
        if _filled(sizes, before, behind, [middle * one for one in room[:most]]) is None:
            low = middle
        else:
            high = middle
    counts = _filled(sizes, before, behind, [high * one * (1 + 1e-9) for one in room[:most]])
    assert counts is not None
    return Places(tuple(device for device, count in zip(devices, counts, strict=False) for _ in range(count)))


def weight_bytes(model: Any, places: Places) -> dict[torch.device, int]:
    """Bytes of a model's weights by device, were it spread like this."""
    found = dict.fromkeys(places.devices, 0)
    for unit in _units(model):
        found[_device(unit, places)] += unit.nbytes
    return found


def skeleton(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model without memory for its weights, on the meta device.

    Raises:
        ModelError: transformers can't make it of its configuration.
    """
    from transformers import AutoModelForCausalLM

    from kvbench.runners.gguf import read_gguf

    assert source.path is not None
    if source.kind == "gguf":
        config = transformers_config(read_gguf(source.path).config)
    elif source.kind == "shape":
        config = transformers_config(read_json(source.path))
    else:
        config = transformers_config(source.path, trust_remote_code=source.trusted)
    with one_error(f"model '{source.name}' cannot be laid out"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trusted)


def spread(model: Any, places: Places) -> None:
    """Moves a model's parts to their devices; from then on what they are given comes after them."""
    copies: dict[tuple[int, torch.device], nn.Parameter] = {}
    for unit in _units(model):
        device = _device(unit, places)
        for module, name, parameter in _parameters(unit.module):
            # a head may share its weights with the embedding, which is elsewhere
            shared = [place for key, place in copies if key == id(parameter)]
            if shared and device not in shared:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            copies[id(parameter), device] = parameter
        unit.module.to(device)
    _own_tensors_to(model, places.first)
    follow(model, places)


def draw(model: Any, places: Places) -> None:
    """Makes a model that is on the meta device there, its weights drawn: the same ones wherever they are.

    Raises:
        ModelError: some of them are of a kind that nothing draws.
    """
    made: dict[int, Tensor] = {}
    for number, unit in enumerate(_units(model)):
        device = _device(unit, places)
        was = [(module, name, id(parameter)) for module, name, parameter in _parameters(unit.module)]
        unit.module.to_empty(device=device)
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.no_grad():
            for tensor in (*unit.module.parameters(), *unit.module.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
            torch.manual_seed(number)
            for module in unit.module.modules():
                model._init_weights(module)
        for module, name, key in was:
            if key in made:
                module._parameters[name] = nn.Parameter(made[key].to(device), requires_grad=False)
            else:
                parameter = module._parameters[name]
                assert parameter is not None
                made[key] = parameter
        for name, tensor in (*unit.module.named_parameters(), *unit.module.named_buffers()):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ModelError(f"device_map: nothing draws {name} of a model of type '{model.config.model_type}'")
    _own_tensors_to(model, places.first)
    follow(model, places)


def follow(model: Any, places: Places) -> None:
    """What each part of a model is given goes to its device first: once a pass what they all share."""
    if len(places.devices) == 1:
        return
    shared: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # what was moved, kept so that no other is taken

    def forget(*_: Any) -> None:
        shared.clear()

    for unit in _units(model):
        unit.module.register_forward_pre_hook(_Bring(_device(unit, places), shared), with_kwargs=True)
    decoder: nn.Module = decoder_of(model)
    decoder.register_forward_pre_hook(forget)
    decoder.register_forward_hook(forget)


@dataclass
class _Bring:
    """Moves what a module is given to its device."""

    device: torch.device
    shared: dict[tuple[int, torch.device], tuple[Tensor, Tensor]]

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # hidden states, which no other layer is given, and what all are: masks, rotary embeddings
        return self._moved(args, kept=False), self._moved(kwargs, kept=True)

    def _moved(self, value: Any, kept: bool) -> Any:
        if isinstance(value, Tensor):
            if value.device == self.device:
                return value
            if not kept:
                return value.to(self.device, non_blocking=True)
            key = id(value), self.device
            if key not in self.shared:
                self.shared[key] = value, value.to(self.device, non_blocking=True)
            return self.shared[key][1]
        if type(value) in (tuple, list):
            return type(value)(self._moved(one, kept) for one in value)
        if type(value) is dict:
            return {name: self._moved(one, kept) for name, one in value.items()}
        return value


def _device(unit: _Unit, places: Places) -> torch.device:
    return {-1: places.first, -2: places.last}[unit.place] if unit.place < 0 else places.layers[unit.place]


def _units(model: Any) -> list[_Unit]:
    """Every layer, and the largest modules that hold none, in the model's order.

    What has weights and stands behind the layers in it is reckoned to run behind them; where that is wrong, what it is
    given only goes a longer way.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [one for one in decoder_of(model).modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    if not lists:
        raise RefusedError(
            f"device_map: models of type '{model.config.model_type}' have their layers in no one list, so they are not "
            "spread: leave it out"
        )
    layers = lists[0]
    above = {id(layers)}
    while True:  # all that hold it
        more = {id(one) for one in model.modules() if any(id(child) in above for child in one.children())} | above
        if more == above:
            break
        above = more

    def walk(module: nn.Module) -> Iterator[_Unit]:
        behind = False
        for child in module.children():
            if child is layers:
                yield from (_Unit(layer, number) for number, layer in enumerate(layers))
            elif id(child) in above:
                yield from walk(child)
            else:
                weights = any(True for _ in child.parameters())
                yield _Unit(child, -2 if behind and weights else -1)
            behind = behind or id(child) in above

    return list(walk(model))


def _filled(sizes: Sequence[int], before: int, behind: int, room: Sequence[float]) -> list[int] | None:
    """How many of these layers go to each device, filled one after another; None where they don't fit."""
    counts, left = [0] * len(room), list(room)
    left[0] -= before
    left[-1] -= behind
    device = 0
    for index, size in enumerate(sizes):
        # one layer at least for each device that follows
        while left[device] < size or (counts[device] and len(sizes) - index <= len(room) - 1 - device):
            device += 1
            if device == len(room):
                return None
        left[device] -= size
        counts[device] += 1
    return counts if min(left) >= 0 and all(counts) else None


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter with the module that has it, and its name there."""
    return [(sub, name, one) for sub in module.modules() for name, one in sub._parameters.items() if one is not None]


def _own_tensors_to(model: Any, device: torch.device) -> None:
    """Moves what the modules above the layers hold themselves."""
    for module in (model, decoder_of(model)):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
