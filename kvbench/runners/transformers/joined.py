"""Linear layers of one input as one product: a launch for several, which fills a GPU better than each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Joined:
    """The outputs of linear layers of one input, by one product. Their weights become parts of one tensor."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self._parts = parts
        self._sizes = [part.out_features for part in parts]
        self._weight = _one([part.weight for part in parts])
        self._bias = _one([part.bias for part in parts]) if parts[0].bias is not None else None
        self._given: Tensor | None = None
        self._made: list[Tensor | None] = []

    @classmethod
    def of(cls, module: nn.Module, names: Sequence[str], dtype: torch.dtype) -> Self | None:
        """Of the layers of a module with these names; None where it lacks one, or they are not alike."""
        parts = [getattr(module, name, None) for name in names]
        plain = [part for part in parts if _is_plain(part, dtype)]
        kinds = {(part.in_features, part.weight.device, part.bias is None) for part in plain}
        return cls(plain) if len(plain) == len(parts) and len(kinds) == 1 else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Their outputs, which lie in rows of one tensor."""
        made: tuple[Tensor, ...] = linear(x, self._weight, self._bias).split(self._sizes, -1)
        return made

    def forwards(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """A forward for each layer: the first one's makes all outputs, of which the others take theirs.

        One that is given another tensor than the first computes by itself.
        """
        return {part: self._taking(i, part) for i, part in enumerate(self._parts)}

    def _taking(self, i: int, part: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if i == 0:
                self._given, self._made = x, list(self(x))
            made = self._made[i] if x is self._given else None
            if made is None:
                return linear(x, part.weight, part.bias)
            self._made[i] = None
            if not any(one is not None for one in self._made):
                self._given = None
            return made

        return forward


def _is_plain(part: nn.Module | None, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether it is no more than a product: libraries of quantized weights change a layer's weight or its forward."""
    weight = getattr(part, "weight", None)
    return (
        type(part) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.dtype == dtype
        and "forward" not in vars(part)
    )


def _one(tensors: Sequence[Tensor]) -> Tensor:
    """These, one after another, in one tensor, which they become parts of."""
    # a weight made in inference mode could take no part in what is made outside of it
    with torch.inference_mode(False), torch.no_grad():
        made = torch.cat([one.detach() for one in tensors])
        for one, part in zip(tensors, made.split([len(one) for one in tensors]), strict=True):
            one.data = part
    return made
