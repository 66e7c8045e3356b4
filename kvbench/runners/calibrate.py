"""Learning what a scheme's transforms need to know of a model: one pass of it over a calibration text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvbench.calibration import Calibration
from kvbench.results import Tensors
from kvbench.runners.base import begins_with
from kvbench.runners.learned import pack
from kvbench.runners.load import NoTokenizer
from kvbench.runners.rope import MOVING
from kvbench.runners.transformers import TransformersModel, observed
from kvbench.schemes import Scheme
from kvbench.transforms import Params, Rope, Sample

DRAWN = 512  # tokens that a shape learns from


@dataclass
class _Layer:
    """What one attention layer got, piece by piece, on the CPU; scaling: of its scores."""

    scaling: float
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)


def learn(loaded: TransformersModel, scheme: Scheme) -> Tensors:
    """What each layer's transforms and dtypes learned, of the model with its exact cache; sums are float64.

    Raises:
        ValueError: the text is too short.
    """
    calibration = scheme.calibration or Calibration()
    shape = isinstance(loaded.tokenizer, NoTokenizer)
    documents = (_drawn if shape else texts)(loaded, calibration)
    queries = any(side.reads_queries for side in scheme.all_sides)
    # what values learn from; keys are few beside a model
    values = any(side.learns for side in (scheme.value, *(one.value for one in scheme.layers if one.value)))
    layers: dict[int, _Layer] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scaling: float) -> None:
        own = layers.setdefault(layer, _Layer(scaling))
        own.keys.append(k.cpu())
        own.positions.append(positions.cpu())
        if queries:
            own.queries.append(q.cpu())
        if values:
            own.values.append(v.cpu())

    with observed(keep), _ropes(loaded.model) as ropes:
        loaded.runner(Scheme.parse("auto")).hidden_states(documents)
    learned: list[tuple[tuple[Params, ...], tuple[Params, ...]]] = []
    for index, (number, layer) in enumerate(sorted(layers.items())):
        sample = Sample(
            torch.cat(layer.keys),
            torch.cat(layer.queries) if layer.queries else None,
            torch.cat(layer.positions),
            ropes.get(number),
            loaded.info.max_length,
            layer.scaling,
            window=loaded.windows[number],
        )
        key, value = scheme.layer(index, len(layers))
        of_values = value.unlearned
        if value.learns:
            of_values = value.learn(replace(sample, keys=torch.cat(layer.values), queries=None, rope=None))
        for pieces in (layer.keys, layer.queries, layer.values):
            pieces.clear()
        learned.append((key.learn(sample), of_values))
    return pack(learned)


def texts(loaded: TransformersModel, calibration: Calibration) -> list[list[int]]:
    """The text's tokens in documents, each begun as the tokenizer begins a text."""
    bos = list(begins_with(loaded.tokenizer))
    tokens = loaded.tokenizer.encode(calibration.read(), add_special_tokens=False, verbose=False)
    longest = loaded.info.max_length - len(bos)
    return [[*bos, *document] for document in calibration.documents(tokens, longest)]


def _drawn(loaded: TransformersModel, calibration: Calibration) -> list[list[int]]:
    """Random tokens in place of a text, for a shape: its weights are random too, and its speed is all it can say.

    So few are enough: 8192 would cost a model of 36 layers half a minute.
    """
    few = replace(calibration, tokens=min(calibration.tokens, DRAWN))
    draw = random.Random(0)
    return few.documents([draw.randrange(len(loaded.tokenizer)) for _ in range(few.tokens)], loaded.info.max_length)


# ---- rotary embeddings, as the model's own modules compute them


@contextmanager
def _ropes(model: Any) -> Iterator[dict[int, Rope]]:
    """A layer's rotary embedding by the model's number of the layer, filled in by the passes inside the block.

    A layer whose embedding is none in the rotate-half convention, as far as cosines and sines can tell, has no entry.
    """
    found: dict[int, Rope] = {}
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
    rope_type = (getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}).get("rope_type")

    def computed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((module, args, kwargs, out))
        del calls[:-8]  # those of one pass: a kind of layer each

    def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedding = kwargs.get("position_embeddings")
        if module.layer_idx in found or not isinstance(embedding, tuple):
            return
        for rotary, rotary_args, rotary_kwargs, out in calls:
            if isinstance(out, tuple) and _same(out[0], embedding[0]):
                rope = _rope(rotary, rotary_args, rotary_kwargs)
                if rope is not None:
                    found[module.layer_idx] = rope

    hooks = []
    if rope_type not in MOVING:
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                hooks.append(module.register_forward_hook(computed, with_kwargs=True))
            elif hasattr(module, "layer_idx"):
                hooks.append(module.register_forward_pre_hook(called, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether it is the same tensor, or what was made of it on another device."""
    return one.data_ptr() == other.data_ptr() or (one.shape == other.shape and torch.equal(one, other.to(one.device)))


def _rope(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rope | None:
    """Frequencies from the angle at position 1, which is below π, in float32."""

    def at_one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.zeros(1, 1, 1, device=value.device)  # only its dtype and device are read
        return torch.ones(1, 1, dtype=value.dtype, device=value.device)

    # past its hooks, of which one is ours: that is for what the model computes
    out = rotary.forward(*map(at_one, args), **{name: at_one(value) for name, value in kwargs.items()})
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)):
        return None
    cos, sin = (part.to("cpu", torch.float64).flatten() for part in out)
    half = len(cos) // 2
    if len(cos) % 2 or not torch.equal(cos[:half], cos[half:]) or not torch.equal(sin[:half], sin[half:]):
        return None
    return Rope(torch.atan2(sin, cos)[:half])
