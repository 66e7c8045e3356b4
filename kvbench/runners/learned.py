"""What a scheme learned of a model, as named tensors that a run folder keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from kvbench.cache.paged import Learned
from kvbench.results import Tensors
from kvbench.schemes import Scheme
from kvbench.transforms import Params


def pack(learned: Learned) -> Tensors:
    """The tensors by layer, side, place among the side's transforms, and name."""
    return {
        f"{layer}.{which}.{place}.{name}": tensor
        for layer, sides in enumerate(learned)
        for which, side in enumerate(sides)
        for place, params in enumerate(side)
        for name, tensor in params.items()
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, layers: int) -> Learned:
    """What `pack` packed, for a scheme that learns the same; of a layer's side that learns nothing, nothing."""
    found: list[list[list[dict[str, Tensor]]]] = [
        [[{} for _ in side.unlearned] for side in scheme.layer(i, layers)] for i in range(layers)
    ]
    for key, tensor in tensors.items():
        layer, which, place, name = key.split(".")
        if side := found[int(layer)][int(which)]:
            side[int(place)][name] = tensor

    def params(side: list[dict[str, Tensor]]) -> tuple[Params, ...]:
        return tuple(side)

    return [(params(keys), params(values)) for keys, values in found]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all tensors' bytes, in hex."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()


def forms(tensors: Mapping[str, Tensor]) -> str:
    """Which form of mean the layers have: those of a page of positions, or one for all positions; empty for none."""
    offsets = [tensor for name, tensor in tensors.items() if name.endswith(".offset")]
    if not offsets:
        return ""
    by_page = sum(len(tensor) > 1 for tensor in offsets)
    return f"by page of positions in {by_page} of {len(offsets)} layers"
