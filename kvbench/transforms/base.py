"""What prepares a row before it is quantized, and what that asks of queries and outputs.

Whatever a transform does to keys, its queries and scores undo: query(q)·apply(k) + c(q) = q·k, where c(q) (`score`) is
the same for all keys of a page of positions. Softmax does not see what is the same for all keys, so a constant c is
added only where a softcap or a sink logit would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

POSITIONS = 64  # of a page of positions, which share what is learned by page
ANYWHERE, GOLDEN = 4, (5**0.5 - 1) / 2  # positions of each query, and how far they lie from each other
FIRST = 4  # tokens of a document: the keys that all attend to, which lie far from all others

Params = Mapping[str, Tensor]  # what a transform learned of one layer's keys, by name; float32 or float64
NOTHING: Params = {}


@dataclass(frozen=True)
class Rope:
    """A layer's rotary embedding in the rotate-half convention: channels c and c + R/2 are turned together.

    frequencies: [R/2] float64, radians a position; channels from R on are not turned.
    """

    frequencies: Tensor

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """[T, HKV, D] float64 of x at its positions [T], or with `back` as it was before."""
        angle = positions.to(torch.float64)[:, None, None] * self.frequencies  # [T, 1, R/2]
        return self._turned(x, angle.cos(), -angle.sin() if back else angle.sin())

    def page_means(self, x: Tensor, pages: int) -> Tensor:
        """[pages, HKV, D] float64: the mean of x [HKV, D] turned to each position of a page."""
        positions = torch.arange(pages * POSITIONS, dtype=torch.float64)
        angle = positions[:, None] * self.frequencies
        cos, sin = (part.view(pages, POSITIONS, 1, -1).mean(1) for part in (angle.cos(), angle.sin()))
        return self._turned(x.expand(pages, *x.shape), cos, sin)

    def mean_square(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """[H, D] float64: the mean square of x [T, H, D], of tokens at `positions` [T], over all below `length`.

        It is that of each pair's second moments before it was turned, turned to each position.
        """
        turned = self.turn(x, positions, back=True)
        half = self.frequencies.shape[0]
        a, b, rest = turned[..., :half], turned[..., half : 2 * half], turned[..., 2 * half :]
        aa, bb, ab, rest = (part.mean(0) for part in (a * a, b * b, a * b, rest * rest))
        twice = 2 * torch.arange(length, dtype=torch.float64)[:, None] * self.frequencies
        cos, sin = twice.cos().mean(0), twice.sin().mean(0)  # cos² is (1 + cos 2x) / 2, and sin·cos is sin 2x / 2
        middle, apart = (aa + bb) / 2, (aa - bb) / 2 * cos - ab * sin
        return torch.cat([middle + apart, middle - apart, rest], dim=-1)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.frequencies.shape[0]
        x = x.to(torch.float64)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@dataclass(frozen=True)
class Sample:
    """One layer's keys of the calibration text, as attention gets them, and the queries that read them.

    keys: [T, HKV, D], any floating dtype; values, where it is these that are stored.
    queries: [T, HQ, D], where a transform or a dtype reads them.
    positions: [T] int64. rope: None where it is not known.
    max_length: the model's positions. scaling: factor of the scores, or None for D^-1/2.
    stored: what rows are read as once they are stored. window: the last tokens that the layer reads; None for all.
    """

    keys: Tensor
    queries: Tensor | None
    positions: Tensor
    rope: Rope | None
    max_length: int
    scaling: float | None = None
    stored: Callable[[Tensor], Tensor] = lambda rows: rows
    window: int | None = None

    @property
    def later(self) -> Tensor:
        """[T] bool, of tokens behind a document's first; all where there are none."""
        behind = self.positions >= FIRST
        return behind if bool(behind.any()) else torch.ones_like(behind)

    def anywhere(self, x: Tensor) -> Tensor:
        """[T', H, D] float64, some 2048 of x's rows [T, H, D], turned to positions spread over all of the model's."""
        assert self.rope is not None
        step = max(1, len(x) // 2048)
        bare = self.rope.turn(x[::step], self.positions[::step], back=True)
        # multiples of the golden section lie evenly wherever they are cut off
        share = (torch.arange(ANYWHERE * len(bare), dtype=torch.float64) * GOLDEN) % 1
        return self.rope.turn(bare.repeat(ANYWHERE, 1, 1), (share * self.max_length).long())


@dataclass(frozen=True)
class Lowered:
    """A transform as kernels take it: y = 2^-exponent H (signs ∘ shift ∘ (x - offset)), H of blocks of `block` values.

    shift: [HKV, D] float32 powers of two, or None. order, spread: [HKV, D]; or, without a matrix and a shift,
    y = (x - offset)[order] / spread.
    signs: [D] float32 of ±1, or None. offset: [HKV, D] float32, or [pages of 64 positions, HKV, D], or None; an offset
    by page also adds q·offset[page] to the scores of a page's keys.
    """

    block: int = 1
    exponent: int = 0
    signs: Tensor | None = None
    offset: Tensor | None = None
    order: Tensor | None = None
    spread: Tensor | None = None
    shift: Tensor | None = None

    def then(self, other: Lowered) -> Lowered | None:
        """Both, one after the other; None where that has another form."""
        if other == Lowered():
            return self
        if self == Lowered():
            return other
        if self.block > 1 or self.order is not None or other.offset is not None:
            return None
        if self.shift is not None and (other.shift is not None or other.order is not None):
            return None
        shift = other.shift if self.shift is None else self.shift
        return replace(other, offset=self.offset, shift=shift)


@dataclass(frozen=True)
class Transform:
    """A map of the D values of a row before they are quantized. A subclass says what it does; the base does nothing.

    keys_only: values can't have it, for an output could not undo it. learns: it needs a calibration text.
    reads_queries: it learns from the queries too. reads_stored: and from what rows are read as.
    turns: what it leaves is turned by the position as what it got is.
    """

    name: str
    source: str
    keys_only: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    reads_queries: ClassVar[bool] = False
    reads_stored: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def learn(self, sample: Sample) -> Params:
        """What it needs to know of a layer, from the keys as the transforms before it left them."""
        return {}

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        """[T, HKV, D] rows as they are quantized, from x [T, HKV, D] at these positions [T]."""
        return x

    def query(self, q: Tensor, params: Params) -> Tensor:
        """[T, HQ, D] queries for such keys, in q's dtype."""
        return q

    def score(self, q: Tensor, params: Params) -> Tensor | None:
        """c(q), before scaling: [T, HQ, P] for keys by their page of positions, P = 1 for all alike, or None for 0."""
        return None

    def lift(self, q: Tensor, params: Params) -> Tensor | None:
        """[T, HQ], times the square of a stored key's length: what is added to its score; or None for 0."""
        return None

    @property
    def keeps_scores(self) -> bool:
        """Whether query(q)·apply(k) is q·k: there is no `score` and no `lift`."""
        return type(self).score is Transform.score and type(self).lift is Transform.lift

    def undo(self, o: Tensor, params: Params) -> Tensor:
        """[T, HQ, D] outputs, of weights that sum to one, as untransformed values would give them; o's dtype."""
        return o

    def lower(self, head_dim: int, params: Params = NOTHING) -> Lowered | None:
        """As kernels take it; None where they can't. Asked with no params, it says whether they could."""
        return None


def grouped(x: Tensor, heads: int) -> Tensor:
    """[..., heads, D] of x [..., HKV, D]: each KV head repeated for the query heads that read it."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)
