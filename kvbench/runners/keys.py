"""What a model's keys and values look like to a cache, layer by layer: what their scales must span, and why.

A row's scale spans the row's mean too. Where a channel's mean is many times what the channel varies by, as where a
model's keys have a bias, low-bit codes are spent on a constant that softmax cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.calibration import DOCUMENT, Calibration
from kvbench.runners.base import begins_with
from kvbench.runners.calibrate import texts
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

PAGE_SIZE = 16
TINY = 1e-300
# of the worst layer; set on three models, see docs/method.md
LOSES, WRECKED = 0.12, 0.4


@dataclass(frozen=True)
class Spread:
    """Of one layer's keys or values [T, HKV, D], every head's channel for itself.

    mean: the largest |mean over the tokens| of a channel. std: root mean square of the channels' standard deviations.
    kurtosis: of what is left when each channel's mean is taken away; 3 for a Gaussian.
    int4_noise: of a 4-bit code between a row's least and greatest value, root mean square, in units of std.
    int4_noise_rotated, int4_noise_centred: the same of a row under a Hadamard rotation; without its channels' means.
    """

    mean: float
    std: float
    kurtosis: float
    int4_noise: float
    int4_noise_rotated: float
    int4_noise_centred: float


@dataclass(frozen=True)
class LayerSpread:
    """layer: of those with a cache, from 0."""

    layer: int
    keys: Spread
    values: Spread


def spread(x: Tensor) -> Spread:
    """How x [T, HKV, D] is spread, in float64 and two passes: a mean may be hundreds of times the spread."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    rotate = all_rotations()["hadamard"].rotate
    std = _rms(centred)
    return Spread(
        mean=mean.abs().max().item(),
        std=std.item(),
        kurtosis=(centred.pow(4).mean() / std.pow(4).clamp_min(TINY)).item(),
        int4_noise=_int4_noise(x, centred),
        int4_noise_rotated=_int4_noise(rotate(x), rotate(centred)),
        int4_noise_centred=_int4_noise(centred, centred),
    )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _int4_noise(rows: Tensor, centred: Tensor) -> float:
    step = (rows.amax(-1) - rows.amin(-1)) / 15
    return (_rms(step) / 12**0.5 / _rms(centred).clamp_min(TINY)).item()


def sample(loaded: TransformersModel) -> tuple[Calibration, list[int]]:
    """The beginning of the calibration text, and its tokens: a document, or as much as the model has positions for."""
    calibration = Calibration(tokens=min(DOCUMENT, loaded.info.max_length - len(begins_with(loaded.tokenizer))))
    (tokens,) = texts(loaded, calibration)
    return calibration, tokens


def key_spreads(loaded: TransformersModel, tokens: Sequence[int]) -> list[LayerSpread]:
    """Each layer's keys, after their positions' rotation, and values, as its cache receives them for this text."""
    runner = loaded.runner(Scheme.parse("auto"), page_size=PAGE_SIZE)
    runner.hidden_states([list(tokens)])
    pages = torch.arange(-(-len(tokens) // PAGE_SIZE), device=loaded.model.device)
    found = []
    for layer in range(len(loaded.info.layers)):
        k, v = (
            x.transpose(1, 2).flatten(0, 1)[: len(tokens)] for x in runner.stored.read(layer, pages, loaded.model.dtype)
        )
        found.append(LayerSpread(layer, spread(k), spread(v)))
    return found


def table(layers: Sequence[LayerSpread]) -> tuple[list[str], list[list[str]]]:
    """Headers and a row a layer, in 80 columns: what the values' codes would add is left to JSON."""
    spreads = "|mean|", "std", "kurt."
    heads = ["layer", *(f"keys\n{spreads[0]}", *spreads[1:]), "int4\nnoise", "noise\nrot.", "noise\ncent."]
    heads += [f"values\n{spreads[0]}", *spreads[1:]]
    rows = []
    for one in layers:
        k, v = ([f"{x.mean:.2f}", f"{x.std:.2f}", f"{x.kurtosis:.1f}"] for x in (one.keys, one.values))
        noise = one.keys.int4_noise, one.keys.int4_noise_rotated, one.keys.int4_noise_centred
        rows.append([str(one.layer), *k, *(f"{value:.2f}" for value in noise), *v])
    return heads, rows


def prediction(layers: Sequence[LayerSpread]) -> str:
    """What the spreads say of an int4 cache, in two sentences."""
    worst = max(layers, key=lambda one: one.keys.int4_noise)
    biased = max(layers, key=lambda one: one.keys.mean / max(one.keys.std, TINY))
    ways = {"as they are": "int4_noise", "rotated": "int4_noise_rotated", "centred": "int4_noise_centred"}
    noise = {way: max(getattr(one.keys, field) for one in layers) for way, field in ways.items()}
    said = ", ".join(f"{way} {value:.2f} ({_verdict(value)})" for way, value in noise.items())
    if noise["as they are"] <= WRECKED:
        why = "No layer's keys are out of a low-bit cache's reach"
    elif noise["rotated"] > WRECKED >= noise["centred"]:
        why = "Keys have a bias: low-bit caches fail unless they are centred, and a rotation is not enough"
    elif noise["rotated"] <= WRECKED:
        why = "A few channels of the keys stand far out: low-bit caches need a rotation"
    else:
        why = "Keys are too wide for low-bit caches, rotated or centred"
    ratio = biased.keys.mean / max(biased.keys.std, TINY)
    return (
        f"{why}. A channel's mean is up to {ratio:.1f} times the spread (layer {biased.layer}); int4's noise is up to, "
        f"in spreads, {said}; the worst is layer {worst.layer}."
    )


def _verdict(noise: float) -> str:
    return "fails" if noise > WRECKED else "loses accuracy" if noise > LOSES else "may hold"
