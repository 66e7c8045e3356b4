"""What a search chooses from: the sides of a YAML's schemes, and the schemes that they make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Self

import torch

from kvbench.calibration import Calibration
from kvbench.dtypes import Cast
from kvbench.schemes import Layers, Override, Scheme, Side, Window
from kvbench.sweep.search.solve import Picks, Slot, cheapest
from kvbench.tasks.base import SideName

KINDS = PAIR, BY_LAYER = "keys and values", "by layer"
SIDES: tuple[SideName, SideName] = ("key", "value")
Costs = Mapping[tuple[Window | None, SideName, Side], Sequence[float]]  # of each layer, in nats


@dataclass(frozen=True)
class Family:
    """Schemes whose sides may be mixed, for they share a window and a calibration text."""

    window: Window | None
    calibration: Calibration | None
    keys: tuple[Side, ...]
    values: tuple[Side, ...]

    def scheme(self, key: Side, value: Side) -> Scheme:
        """One key side and one value side in all layers."""
        made = Scheme(key, value, self.window)
        return made.calibrated(self.calibration) if self.calibration else made

    def mixed(self, picks: Picks) -> Scheme:
        """The scheme of these choices, layer by layer the keys' and then the values'; the most frequent are its own."""
        keys = [self.keys[pick] for pick in picks[::2]]
        values = [self.values[pick] for pick in picks[1::2]]
        key, value = (Counter(sides).most_common(1)[0][0] for sides in (keys, values))
        layers = tuple(
            Override(i, None if k == key else k, None if v == value else v)
            for i, (k, v) in enumerate(zip(keys, values, strict=True))
            if (k, v) != (key, value)
        )
        made = replace(Scheme(key, value, self.window), layers=layers)
        return made.calibrated(self.calibration) if self.calibration and made.learns else made

    def probes(self) -> list[tuple[Scheme, tuple[SideName, ...]]]:
        """Schemes that have each side once, and which of their sides are to be measured."""
        keys, values = ([side for side in sides if not exact(side)] for sides in (self.keys, self.values))
        found = []
        for key, value in zip_longest(keys, values):
            sides = tuple(name for name, side in zip(SIDES, (key, value), strict=True) if side)
            found.append((self.scheme(key or keys[0], value or values[0]), sides))
        return found

    def slots(self, costs: Costs, layers: Layers, tokens: int, model_dtype: torch.dtype) -> tuple[list[Slot], int]:
        """A slot a layer and side, whose sizes are bytes beyond the first choice's; and the bytes of all first ones."""
        base = self.mixed((0,) * 2 * len(layers))
        whole = base.nbytes(layers, tokens, model_dtype)
        found = []
        for index in range(len(layers)):
            for name, sides in zip(SIDES, (self.keys, self.values), strict=True):
                sizes = []
                for side in sides:
                    only = Override(index, *((side, None) if name == "key" else (None, side)))
                    sizes.append(replace(base, layers=(only,)).nbytes(layers, tokens, model_dtype) - whole)
                # of a layer that loses nothing the divergence may come out a little below 0
                known = [costs.get((self.window, name, side)) for side in sides]
                losses = tuple(max(0.0, own[index]) if own else 0.0 for own in known)
                found.append(Slot(losses, tuple(sizes)))
        return found, whole


@dataclass(frozen=True)
class Found:
    """A scheme that a budget allows, and what the costs of its layers sum to."""

    scheme: Scheme
    kind: str  # of KINDS
    predicted: float


def predicted(scheme: Scheme, costs: Costs, layers: int) -> float:
    """What a scheme's layers cost alone, summed; of sides that were not measured, since they are exact, 0."""
    total = 0.0
    for index in range(layers):
        for name, side in zip(SIDES, scheme.layer(index, layers), strict=True):
            if own := costs.get((scheme.window, name, side)):
                total += max(0.0, own[index])
    return total


def exact(side: Side) -> bool:
    """Whether a side loses nothing: 16 bits or more, not transformed."""
    return isinstance(side.dtype.decode, Cast) and side.dtype.granularity == "none" and not side.transforms


def families(schemes: Sequence[Scheme]) -> list[Family]:
    """The schemes' sides by window, in the order of the schemes.

    Raises:
        ValueError: they learn from several texts.
    """
    texts = list(dict.fromkeys(scheme.calibration for scheme in schemes if scheme.calibration))
    if len(texts) > 1:
        raise ValueError("its schemes learn from several texts, and a layer's can't: give one `calibration` for all")
    found = []
    for window in dict.fromkeys(scheme.window for scheme in schemes):
        own = [scheme for scheme in schemes if scheme.window == window]
        keys, values = (tuple(dict.fromkeys(sides)) for sides in zip(*(scheme.sides for scheme in own), strict=True))
        found.append(Family(window, texts[0] if texts else None, keys, values))
    return found


@dataclass(frozen=True)
class Problem:
    """A family's slots for a model, and the bytes of a sequence of so many tokens."""

    family: Family
    layers: Layers
    tokens: int
    model_dtype: torch.dtype
    slots: list[Slot]
    whole: int

    @classmethod
    def of(cls, family: Family, costs: Costs, layers: Layers, tokens: int, model_dtype: torch.dtype) -> Self:
        """With the costs of each layer's sides; of those that are not there 0."""
        return cls(family, layers, tokens, model_dtype, *family.slots(costs, layers, tokens, model_dtype))

    @property
    def smallest(self) -> int:
        """Bytes of the smallest scheme."""
        return self.whole + sum(min(slot.sizes) for slot in self.slots)

    def loss(self, picks: Picks) -> float:
        """What these choices cost in all."""
        return sum(slot.costs[pick] for slot, pick in zip(self.slots, picks, strict=True))

    def best(self, room: int, count: int) -> list[Found]:
        """The schemes of at most `room` bytes that lose least, by what their layers cost.

        First one key and one value side for all layers, then `count` schemes with sides by layer, each of which differs
        from the others in a tenth of its choices.
        """
        pairs = product(range(len(self.family.keys)), range(len(self.family.values)))
        fitting = [picks for picks in (pair * len(self.layers) for pair in pairs) if self._bytes(picks) <= room]
        found = [self._found(picks, PAIR) for picks in sorted(fitting, key=self.loss)[:1]]
        several: list[Picks] = []
        left = room - self.whole
        while len(several) < count:
            picks = cheapest(self.slots, left, several, max(1, len(self.slots) // 10))
            if picks is None:
                break
            if (beyond := self._bytes(picks) - room) > 0:  # what a page's dtypes take together is not in the slots
                left -= beyond
                continue
            several.append(picks)
            found.append(self._found(picks, BY_LAYER))
        return found

    def _bytes(self, picks: Picks) -> int:
        return self.family.mixed(picks).nbytes(self.layers, self.tokens, self.model_dtype)

    def _found(self, picks: Picks, kind: str) -> Found:
        return Found(self.family.mixed(picks), kind, self.loss(picks))
