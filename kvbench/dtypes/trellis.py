"""Trellis-coded quantization: a row is one bit string, and a value a function of the bits that end with its own code.

The bit-shift trellis of QTIP (https://arxiv.org/abs/2406.11235): a state is the last L bits, so every value is decoded
from one window of bits, in parallel with all others, and a row is written by the Viterbi algorithm over 2^L states.
QTIP's values are a random code. Here the values that may follow a state lie evenly over all of them, as the cosets of
a classical trellis do (Ungerboeck 1982; Marcellin and Fischer 1990), which is worth more than four times the states;
docs/two-bits.md has the figures, benchmarks/trellis.py found the constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from kvbench.dtypes import e5m3
from kvbench.dtypes.base import Dtype, Part, Rows, Trellis, elements
from kvbench.dtypes.int2 import sum_of_squares

UNIT_BITS = 5
UNIT = 1 << UNIT_BITS  # of values: a row's root mean square
FINE = 16  # of the row that the path is sought for, in parts of such a unit
REACH = 8 * UNIT * FINE - 1  # a value further out costs what this one does; no code decodes to half as much
# values beyond are taken for it, and rows of a smaller norm for zeros; scales end long before
LARGEST, SMALLEST = 2.0**40, 2.0**-40
EXPONENT_BITS, BIAS = 6, 40  # of a scale, which has no sign
WORD = 16
UNREACHED = 1 << 29  # the cost of a state that no path has come to
CHUNK = {"cpu": 2**9, "cuda": 2**15}  # rows whose paths are sought at once; on a CPU, in its cache


class Kernels(Protocol):
    """What gives the same rows and values as the definition, sooner."""

    def serves(self, dtype: TrellisPerTokenHead, computed: torch.dtype) -> bool: ...
    def quantize(self, dtype: TrellisPerTokenHead, x: Tensor) -> Rows: ...
    def dequantize(self, dtype: TrellisPerTokenHead, rows: Rows, head_dim: int) -> Tensor: ...


_kernels: ContextVar[Kernels | None] = ContextVar("kvbench_trellis_kernels", default=None)


@contextmanager
def computed_by(kernels: Kernels) -> Iterator[None]:
    """Inside the block these kernels write and read rows wherever they serve."""
    token = _kernels.set(kernels)
    try:
        yield
    finally:
        _kernels.reset(token)


@dataclass(frozen=True)
class Steps:
    """A row in the order of its bits.

    channel: [D] int64, of each step. step: [D] int64, of each channel. part: [D] int64, of each step.
    mask: [D] int64, of each step's code. word, shift: [D], its window is the low bits of words word-1 and word, shifted
    right. weight: [D] of its error.
    bits: of the whole string.
    """

    channel: Tensor
    step: Tensor
    part: Tensor
    mask: Tensor
    word: Tensor
    shift: Tensor
    weight: Tensor
    bits: int


@dataclass(frozen=True)
class TrellisPerTokenHead(Dtype):
    """The path that is nearest to the row in units of its root mean square; then the scale that suits the path best.

    All of the search is in integers. z = x / rms in steps of 1/512, rounded to the nearest (halves to even), and a
    state s whose value is v costs 8v² - vz, times its part's weight; of equally cheap predecessors the one with the
    smallest bits is taken, and of equally cheap last states the smallest. The scale, rms/512 · Σvz / Σv² in float32,
    goes to the nearest number with 6 bits of exponent and as many of mantissa as the row's word of 16 bits leaves
    beside the L - k bits that come before its first code; it has no sign, 0 is 0 and all ones are NaN.

    Without `starts` the bits before the first code are zeros, 32 times the scale is an e5m3 of 8 bits, the nearest one,
    and the path is sought a second time in units of that.

    Bits are counted from the top of each word. A part of W words has the codes of its channels w, w + W, w + 2W, ...
    one after another in word w, so the channels at one place of all words are a slice, as in other dtypes.
    """

    starts: bool = True

    @property
    def trellis(self) -> Trellis:
        """How a window of bits decodes."""
        assert isinstance(self.decode, Trellis)
        return self.decode

    @property
    def start_bits(self) -> int:
        """L - k, the bits before a row's first code, where they are stored; else 0."""
        return self.trellis.state_bits - self.trellis.parts[0].bits if self.starts else 0

    @property
    def scale_form(self) -> tuple[int, int]:
        """Bits of a scale's mantissa, and its exponent's bias."""
        return (WORD - self.start_bits - EXPONENT_BITS, BIAS) if self.starts else (3, e5m3.BIAS + UNIT_BITS)

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.int16 if self.starts else torch.uint8

    @property
    def head_dim_multiple(self) -> int:
        parts = self.trellis.parts
        return WORD // math.gcd(WORD, parts[0].bits) if len(parts) == 1 else 16

    def code_bytes(self, head_dim: int) -> int:
        self.check_head_dim(head_dim)
        bits = sum(part.bits * part.eighths for part in self.trellis.parts) * head_dim // 8
        return -(-bits // WORD) * WORD // 8

    # ---- writing

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        self.check_head_dim(x.shape[-1])
        kernels = _kernels.get()
        if kernels is not None and kernels.serves(self, x.dtype):
            return kernels.quantize(self, x)
        steps = steps_of(self.trellis, x.shape[-1], x.device)
        whole = (x.abs() < torch.inf).all(-1)
        x = x.to(torch.float32).clamp(-LARGEST, LARGEST).masked_fill(~whole.unsqueeze(-1), 0)
        # by way of float64, since torch's float32 square root on CPUs is not always the nearest value
        norm = sum_of_squares(x).double().sqrt().float()
        # by a tensor, since torch multiplies by the inverse of a number on GPUs
        step = norm / torch.full_like(norm, UNIT * FINE * math.sqrt(x.shape[-1]))
        z = (x * torch.where(norm >= SMALLEST, 1 / step, 0).unsqueeze(-1)).round()[..., steps.channel]
        states = self._paths(z, steps)
        values = self._values(torch.int32, states, steps)
        weighted = values * steps.weight
        fit = (z.to(torch.int32) * weighted).sum(-1).float() / (values * weighted).sum(-1).float()
        scale = torch.where(whole, self._scale_code(step * fit), self.broken)
        if not self.starts:
            inverse = 1 / (e5m3.decode(scale) / (UNIT * FINE))
            z = (x * inverse.nan_to_num(0).unsqueeze(-1)).round()[..., steps.channel]
            states = self._paths(z, steps)
        codes = (states & steps.mask)[..., steps.step].masked_fill(~whole.unsqueeze(-1), 0)
        if self.starts:
            first = states[..., 0] >> self.trellis.parts[0].bits
            scale = (scale << self.start_bits) | first.masked_fill(~whole, 0)
        return Rows(self.pack(codes), scale.to(self.scale_storage))

    def _paths(self, z: Tensor, steps: Steps) -> Tensor:
        """[..., D] int64 states of the cheapest path of each row z [..., D], in the order of its bits."""
        rows = z.clamp(-REACH, REACH).to(torch.int32).reshape(-1, z.shape[-1])
        return cheapest_paths(rows, self.trellis, self.starts).view(z.shape)

    @property
    def broken(self) -> int:
        """The code of a scale that is NaN."""
        return (1 << (WORD - self.start_bits)) - 1 if self.starts else e5m3.NAN

    def _scale_code(self, scale: Tensor) -> Tensor:
        """[...] int32, the code of the nearest number that a scale can be; the nearest end beyond."""
        mantissa, bias = self.scale_form
        bits = scale.contiguous().view(torch.int32)
        code = ((bits + (1 << (22 - mantissa))) >> (23 - mantissa)) - ((127 - bias) << mantissa)
        return torch.where(scale > 0, code.clamp(0, self.broken - 1), 0)

    # ---- reading

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        head_dim = self._head_dim(rows.codes.shape[-1])
        kernels = _kernels.get()
        if kernels is not None and kernels.serves(self, dtype):
            return kernels.dequantize(self, rows, head_dim).to(dtype)
        steps = steps_of(self.trellis, head_dim, rows.codes.device)
        words = elements(rows.codes, torch.int16).to(torch.int32) & 0xFFFF
        start = rows.scale.to(torch.int32).unsqueeze(-1) & ((1 << self.start_bits) - 1)
        pairs = torch.cat([start, words[..., :-1]], -1) << WORD | words
        windows = (pairs[..., steps.word] >> steps.shift) & ((1 << self.trellis.state_bits) - 1)
        values = self._values(dtype, windows, steps)[..., steps.step]
        return values * self.clean_scale(rows.scale).to(dtype).unsqueeze(-1)

    def clean_scale(self, scale: Tensor) -> Tensor:
        if not self.starts:
            return e5m3.decode(scale) / UNIT
        mantissa, bias = self.scale_form
        code = (scale.to(torch.int32) & 0xFFFF) >> self.start_bits
        bits = (code << (23 - mantissa)) + ((127 - bias) << 23)
        return bits.view(torch.float32).masked_fill(code == 0, 0).masked_fill(code == self.broken, math.nan)

    def _values(self, dtype: torch.dtype, windows: Tensor, steps: Steps) -> Tensor:
        """[..., D] of windows [..., D], both in the order of steps."""
        values = table(self.trellis, dtype, windows.device)
        return values.flatten()[windows + (steps.part << self.trellis.state_bits)]

    def _head_dim(self, code_bytes: int) -> int:
        eighths = sum(part.bits * part.eighths for part in self.trellis.parts)
        return 8 * code_bytes * 8 // eighths // 16 * 16 if len(self.trellis.parts) > 1 else 64 * code_bytes // eighths

    # ---- packing

    def pack(self, codes: Tensor) -> Tensor:
        steps = steps_of(self.trellis, codes.shape[-1], codes.device)
        string = []
        parts = codes[..., steps.channel].to(torch.int32)
        for part, own in zip(self.trellis.parts, self._split(parts), strict=True):
            string.append(((own.unsqueeze(-1) >> _down(part.bits, codes.device)) & 1).flatten(-2))
        bits = torch.cat(string, -1)
        bits = torch.nn.functional.pad(bits, (0, -steps.bits % WORD)).unflatten(-1, (-1, WORD))
        words: Tensor = (bits << _down(WORD, codes.device)).sum(-1)
        return words.to(torch.int16).view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        head_dim = self._head_dim(packed.shape[-1])
        steps = steps_of(self.trellis, head_dim, packed.device)
        words = elements(packed, torch.int16).to(torch.int32)
        bits = ((words.unsqueeze(-1) >> _down(WORD, packed.device)) & 1).flatten(-2)
        codes, first = [], 0
        for part in self.trellis.parts:
            last = first + part.bits * part.eighths * head_dim // 8
            own = bits[..., first:last].unflatten(-1, (-1, part.bits))
            codes.append((own << _down(part.bits, packed.device)).sum(-1))
            first = last
        return torch.cat(codes, -1)[..., steps.step].to(torch.int32)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., D] by part."""
        parts: tuple[Tensor, ...] = x.split([p.eighths * x.shape[-1] // 8 for p in self.trellis.parts], -1)
        return parts


def cheapest_paths(z: Tensor, trellis: Trellis, free: bool = True) -> Tensor:
    """[N, D] int64 states of the cheapest path of each row z [N, D] int32, in the order of steps.

    free: the first state is any, else one of those whose bits before the first code are zeros.
    """
    chunk = CHUNK.get(z.device.type, CHUNK["cuda"])
    found = [_cheapest_path(some.T.contiguous(), trellis, free).T for some in z.split(chunk)]
    return torch.cat(found)


def _cheapest_path(z: Tensor, trellis: Trellis, free: bool) -> Tensor:
    """[D, N] int64 states of the rows z [D, N], by the Viterbi algorithm.

    A cost lies above the bits that say which of the next step's predecessors its state is: the least of both is the
    cheapest and, of equal ones, the first. Costs are taken relative to one of them, so they stay below 2^31.
    """
    steps, rows = z.shape
    parts = [index for index, part in enumerate(trellis.parts) for _ in range(part.eighths * steps // 8)]
    bits = trellis.state_bits
    widths = [trellis.parts[part].bits for part in parts]
    after = [*widths[1:], 0]
    terms = {pair: _terms(trellis, *pair, z.device) for pair in set(zip(parts, after, strict=True))}
    back: list[Tensor] = []
    cost = torch.empty(1 << bits, rows, dtype=torch.int32, device=z.device)
    for t, (part, own, next_own) in enumerate(zip(parts, widths, after, strict=True)):
        best = None
        if t:
            best = torch.amin(cost.view(1 << own, 1 << (bits - own), rows), 0)
            back.append((best & ((1 << own) - 1)).to(torch.uint8))
            best >>= own
            best -= best[0].clone()
            best <<= next_own
        fixed, slope = terms[part, next_own]
        torch.mul(slope, z[t], out=cost)
        torch.sub(fixed, cost, out=cost)
        if t == 0 and not free:
            cost[1 << own :] += UNREACHED
        if best is not None:
            cost.view(1 << (bits - own), 1 << own, rows).add_(best[:, None])
    state = torch.arange(1 << bits, device=z.device)[:, None]
    at = ((cost.to(torch.int64) << bits) | state).amin(0) & ((1 << bits) - 1)
    path = torch.empty(steps, rows, dtype=torch.int64, device=z.device)
    for t in range(steps - 1, 0, -1):
        path[t] = at
        past = at >> widths[t]
        at = back[t - 1].gather(0, past[None])[0].to(torch.int64) << (bits - widths[t]) | past
    path[0] = at
    return path


@lru_cache(maxsize=64)
def _terms(trellis: Trellis, part: int, after: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[2^L, 1] int32 each: a state costs the first less z times the second, above the `after` bits that name it."""
    value = table(trellis, torch.int32, device)[part][:, None]
    state = torch.arange(len(value), dtype=torch.int32, device=device)[:, None]
    slope = (value * trellis.parts[part].weight) << after
    return FINE // 2 * value * slope | (state >> (trellis.state_bits - after)), slope


@lru_cache(maxsize=64)
def steps_of(trellis: Trellis, head_dim: int, device: torch.device) -> Steps:
    """Of rows of so many channels."""
    channels: list[int] = []
    part_of: list[int] = []
    ends: list[int] = []
    bits = 0
    for index, part in enumerate(trellis.parts):
        first, count = len(channels), part.eighths * head_dim // 8
        places = math.gcd(count, WORD // math.gcd(WORD, part.bits))
        words = count // places
        channels += [first + place * words + word for word in range(words) for place in range(places)]
        part_of += [index] * count
        ends += [bits + part.bits * (i + 1) for i in range(count)]
        bits += part.bits * count
    channel, end = torch.tensor(channels), torch.tensor(ends)
    word = (end - 1) // WORD
    weight = torch.tensor([part.weight for part in trellis.parts])[part_of]
    return Steps(
        channel.to(device),
        channel.argsort().to(device),
        torch.tensor(part_of, device=device),
        ((1 << torch.tensor([part.bits for part in trellis.parts])) - 1)[part_of].to(device),
        word.to(device),
        (WORD * (word + 1) - end).to(device),
        weight.to(device),
        bits,
    )


@lru_cache(maxsize=64)
def table(trellis: Trellis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[parts, 2^L]: what each window decodes to."""
    return torch.tensor([part.values(trellis.state_bits) for part in trellis.parts], dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _down(bits: int, device: torch.device) -> Tensor:
    """bits - 1, ..., 0: the places of a code's bits in the string."""
    return torch.arange(bits - 1, -1, -1, dtype=torch.int32, device=device)


_SOURCE = (
    "QTIP's bit-shift trellis, https://arxiv.org/abs/2406.11235, with cosets as in "
    "Marcellin and Fischer 1990, Trellis Coded Quantization"
)

ONE = Part(1, 323, ((0, 41), (6, 24)))
TWO = Part(2, 275, ((0, 46), (6, 34)))
THREE = Part(3, 263, ((0, 46), (2, 17), (16, 36)))
FOUR = Part(4, 1295, ((0, 48), (2, 16), (16, 41)))


def _tcq(part: Part) -> TrellisPerTokenHead:
    return TrellisPerTokenHead(
        f"tcq{part.bits}",
        part.bits,
        Trellis(8, (part,)),
        "per_token_head",
        _SOURCE,
        default_rotation="randomized_hadamard",
        word_bits=math.lcm(WORD, part.bits),
    )


tcq2, tcq3, tcq4 = _tcq(TWO), _tcq(THREE), _tcq(FOUR)


def _tiers(*shares: tuple[Part, int, int]) -> TrellisPerTokenHead:
    """Parts with their eighths of the channels and their weights."""
    parts = tuple(replace(part, eighths=eighths, weight=weight) for part, eighths, weight in shares)
    name = "".join(str(part.bits) for part in parts)
    mean = sum(part.bits * part.eighths for part in parts) // 8
    return TrellisPerTokenHead(f"tcq{name}", mean, Trellis(8, parts), "per_token_head", _SOURCE, starts=False)


tcq421 = _tiers((FOUR, 2, 32), (TWO, 4, 4), (ONE, 2, 1))
tcq4321 = _tiers((FOUR, 1, 32), (THREE, 1, 16), (TWO, 3, 4), (ONE, 3, 1))
