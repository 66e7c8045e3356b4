"""How far stored keys move attention at the text's positions, and far behind them, where RoPE turned their channels.

    python benchmarks/positions.py MODEL OUT.json KEYS [KEYS ...] [--tokens 4096] [--at 0,30000]

KEYS: a dtype and its transforms, `tcq4/center+randomized_hadamard`. What they learn is of the calibration text's first
document, the loss of its last one, in the exact model: KL divergence of a query's weights from the exact ones, the mean
over every fourth of the last 512 queries, heads and layers. The first 4 keys and the last 64 to 127 are exact, as
behind a window. At another position both keys and queries are turned further by as much, which leaves the exact scores
as they are. A CPU does it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvbench.calibration import Calibration
from kvbench.dtypes import all_dtypes
from kvbench.runners import catalog
from kvbench.runners.calibrate import _ropes, texts
from kvbench.runners.transformers import TransformersModel, observed
from kvbench.schemes import Scheme, Side
from kvbench.transforms import Sample

QUERIES, EVERY, PAGE, SINKS = 512, 4, 64, 4


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
        facts = ropes[number], loaded.info.max_length, scalings[number]
        sample = Sample(k[first], q[first], positions[first], *facts, window=loaded.windows[number])
        layers.append(Layer(sample, k[last].float(), q[last].float(), positions[last]))
    return layers


def loss(layer: Layer, side: Side, at: int) -> float:
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
    if sample.window is not None:
        hidden |= place <= which[:, None] - sample.window
    group = queries.shape[1] // keys.shape[1]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("qhd,khd->hqk", q, k.to(q.dtype).repeat_interleave(group, 1))

    exact = scores(queries[which], keys) * sample.scaling
    rows = side.apply(keys, params, positions + at).float()
    dtype = side.dtype.bind(params[-1]) if side.dtype.learns else side.dtype
    stored = dtype.dequantize(dtype.quantize(rows))
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
        dtype, transforms = name.split("/")
        side = Side.of(all_dtypes()[dtype], transforms)
        bits = 8 * side.dtype.row_bytes(layers[0].keys.shape[-1]) / layers[0].keys.shape[-1]
        losses = {at: [loss(layer, side, int(at)) for layer in layers] for at in given.at.split(",")}
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
