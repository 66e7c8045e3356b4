"""How far stored keys move attention at the text's positions, and far behind them, where RoPE turned their channels.

    python benchmarks/positions.py MODEL OUT.json KEYS [KEYS ...] [--tokens 4096] [--at 0,30000]

KEYS: a dtype and its transforms, `tcq4/center+randomized_hadamard`; a third part `feedback` takes up each channel's
error in those behind it. What transforms learn is of the calibration text's first document, the loss of its last one,
in the exact model: KL divergence of a query's weights from the exact ones, the mean over every fourth of the last 512
queries, heads and layers. The first 4 keys and the last 64 to 127 are exact, as behind a window. At another position
both keys and queries are turned further by as much, which leaves the exact scores as they are. A CPU does it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvbench.calibration import Calibration
from kvbench.dtypes import all_dtypes, e5m3
from kvbench.dtypes.base import STEPS, Tiers
from kvbench.runners import catalog
from kvbench.runners.calibrate import _ropes, texts
from kvbench.runners.transformers import TransformersModel, observed
from kvbench.schemes import Scheme, Side
from kvbench.transforms import Params, Sample

QUERIES, EVERY, PAGE, SINKS = 512, 4, 64, 4
DAMPING, TURNS = 0.02, 4  # of feedback: share of the mean square, and how often queries are turned to any position


@dataclass
class Layer:
    """One layer's keys and queries [T, H, D] of a document each, the one that is learned and the one that is read."""

    learned: Sample
    keys: Tensor
    queries: Tensor
    positions: Tensor


def layers_of(model: str, tokens: int) -> list[Layer]:
    """Each attention layer's, of the model in float32 with its exact cache."""
    loaded = TransformersModel.load(catalog.resolve(model), "float32" if "1.5b" not in model else "bfloat16", "cpu")
    found: dict[int, list[list[Tensor]]] = {}
    scalings = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scaling: float) -> None:
        pieces = found.setdefault(layer, [[], [], []])
        for piece, tensor in zip(pieces, (k, q, positions), strict=True):
            piece.append(tensor.cpu())
        scalings[layer] = scaling

    runner = loaded.runner(Scheme.parse("auto"))
    with observed(keep), _ropes(loaded.model) as ropes:
        runner.hidden_states(texts(loaded, Calibration(tokens=tokens)))
    layers = []
    for number, pieces in sorted(found.items()):
        k, q, positions = map(torch.cat, pieces)
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        first, last = slice(starts[0], starts[1]), slice(starts[-2], starts[-1])
        sample = Sample(k[first], q[first], positions[first], ropes[number], loaded.info.max_length, scalings[number])
        layers.append(Layer(sample, k[last].float(), q[last].float(), positions[last]))
    return layers


def loss(layer: Layer, side: Side, feedback: bool, at: int) -> float:
    """The divergence with this layer's keys stored so, turned to `at` and behind."""
    sample, rope = layer.learned, layer.learned.rope
    assert rope is not None
    assert sample.scaling is not None
    params = side.learn(sample)
    keys, queries, positions = layer.keys, layer.queries, layer.positions
    if at:
        keys, queries = (rope.turn(rope.turn(x, positions, back=True), positions + at).float() for x in (keys, queries))
    which = torch.arange(len(keys) - QUERIES, len(keys), EVERY)
    place = torch.arange(len(keys))
    near = (place >= (which[:, None] // PAGE - 1) * PAGE) | (place < SINKS)
    hidden = place > which[:, None]
    group = queries.shape[1] // keys.shape[1]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("qhd,khd->hqk", q, k.to(q.dtype).repeat_interleave(group, 1))

    exact = scores(queries[which], keys) * sample.scaling
    rows = side.apply(keys, params, positions + at).float()
    stored = fed_back(side, params, rows, sample) if feedback else side.dtype.dequantize(side.dtype.quantize(rows))
    turned = side.query(queries[which], params)
    own = scores(turned, stored)
    lacks = side.score(queries[which], params)
    if lacks is not None:
        own = own + lacks.transpose(0, 1)[..., ((positions + at) // PAGE).clamp_max(lacks.shape[-1] - 1)]
    lift = side.lift(turned, params)
    if lift is not None:
        own = own + lift.T[..., None] * stored.square().sum(-1).T.repeat_interleave(group, 0)[:, None]
    own = torch.where(near, exact, own * sample.scaling)
    p, q = (x.masked_fill(hidden, -torch.inf).log_softmax(-1) for x in (exact, own))
    return float((p.exp() * (p - q)).masked_fill(hidden, 0).sum(-1).mean())


def fed_back(side: Side, params: tuple[Params, ...], rows: Tensor, sample: Sample) -> Tensor:
    """[T, HKV, D] stored rows of tiers, each channel's error taken up by those behind it (GPTQ, arXiv 2210.17323).

    By the queries' second moments, turned to any of the model's positions; gains are as without.
    """
    dtype, rope, (_, heads, width) = side.dtype, sample.rope, rows.shape
    assert isinstance(dtype.decode, Tiers)
    assert rope is not None
    assert sample.queries is not None
    scale = dtype.quantize(rows).scale
    assert scale is not None
    bare = rope.turn(sample.queries, sample.positions, back=True)
    generator, moments = torch.Generator().manual_seed(1), torch.zeros(heads, width, width, dtype=torch.float64)
    for _ in range(TURNS):
        positions = torch.randint(0, sample.max_length, (len(bare),), generator=generator)
        q = side.query(rope.turn(bare, positions).float(), params).double()
        q = q.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        moments += q.mT @ q / q.shape[1] / TURNS
    ridge = DAMPING * moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    moments += ridge[:, None, None] * torch.eye(width, dtype=torch.float64)
    up = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float()
    left, stored, gain = rows.clone(), torch.empty_like(rows), e5m3.decode(scale).float()
    for c, bits in enumerate(dtype.decode.by_channel(width)):
        step, half = STEPS[bits] * gain, 2 ** (bits - 1)
        stored[..., c] = ((left[..., c] / step - 0.5).clamp(-half, half - 1).round() + 0.5) * step
        error = (left[..., c] - stored[..., c]) / up[:, c, c]
        left[..., c + 1 :] -= error[..., None] * up[:, c, c + 1 :]
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("keys", nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--at", default="0,30000")
    given = parser.parse_args()
    layers = layers_of(given.model, given.tokens)
    rows = []
    for name in given.keys:
        dtype, transforms, *more = name.split("/")
        side = Side.of(all_dtypes()[dtype], transforms)
        bits = 8 * side.dtype.row_bytes(layers[0].keys.shape[-1]) / layers[0].keys.shape[-1]
        losses = {at: [loss(layer, side, bool(more), int(at)) for layer in layers] for at in given.at.split(",")}
        rows.append(
            {"keys": name, "bits": bits, "kld": {at: sum(x) / len(x) for at, x in losses.items()}, "layers": losses}
        )
        print(
            f"{name:60} {bits:.3f} bits  " + "  ".join(f"{at}: {x:.4f}" for at, x in rows[-1]["kld"].items()),
            flush=True,
        )
    facts = {"model": given.model, "tokens": given.tokens, "layers": len(layers), "torch": torch.__version__}
    given.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
