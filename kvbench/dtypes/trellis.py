"""Trellis-coded quantization: a row is one bit string, and a value a function of the bits that end with its own code.

The bit-shift trellis of QTIP (https://arxiv.org/abs/2406.11235): a state is the last L bits, so every value is decoded
from one window of bits, in parallel with all others, and a row is written by the Viterbi algorithm over 2^L states.
QTIP's values are a random code. Here the values that may follow a state lie evenly over all of them, as the cosets of
a classical trellis do (Ungerboeck 1982; Marcellin and Fischer 1990), which is worth more than four times the states;
docs/two-bits.md has the figures, benchmarks/trellis.py found the constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvbench.dtypes.base import Dtype, Rows, Trellis
from kvbench.dtypes.int2 import sum_of_squares

UNIT = 32  # of values: a row's root mean square
FINE = 16  # of the row that the path is sought for, in parts of such a unit
# values beyond are taken for it, and rows of a smaller norm for zeros; scales end long before
LARGEST, SMALLEST = 2.0**40, 2.0**-40
EXPONENT_BITS, BIAS = 6, 40  # of a scale, which has no sign
CHUNK = {"cpu": 2**9, "cuda": 2**15}  # rows whose paths are sought at once; on a CPU, in its cache


@dataclass(frozen=True)
class TrellisPerTokenHead(Dtype):
    """The path that is nearest to the row in units of its root mean square; then the scale that suits the path best.

    All of the search is in integers. z = x / rms in steps of 1/512, rounded to the nearest (halves to even), and a
    state s whose value is v costs 8v² - vz; of equally cheap predecessors the one with the smallest bits is taken, and
    of equally cheap last states the smallest. The scale, rms/512 · Σvz / Σv² in float32, goes to the nearest number
    with 6 bits of exponent and as many of mantissa as the row's word of 16 bits leaves beside the L - k bits that come
    before its first code; it has no sign, 0 is 0 and all ones are NaN.

    Bits are counted from the top of each word. Word w holds the codes of channels w, w + W, w + 2W, ... one after
    another, where W is the words' number, so the channels at one place of all words are a slice, as in other dtypes.
    """

    @property
    def trellis(self) -> Trellis:
        """How a window of bits decodes."""
        assert isinstance(self.decode, Trellis)
        return self.decode

    @property
    def start_bits(self) -> int:
        """L - k, the bits before a row's first code."""
        return self.trellis.state_bits - self.code_bits

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.int16

    # ---- writing

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        self.check_head_dim(x.shape[-1])
        whole = (x.abs() < torch.inf).all(-1)
        x = x.to(torch.float32).clamp(-LARGEST, LARGEST).masked_fill(~whole.unsqueeze(-1), 0)
        # by way of float64, since torch's float32 square root on CPUs is not always the nearest value
        norm = sum_of_squares(x).double().sqrt().float()
        step = norm / (UNIT * FINE * math.sqrt(x.shape[-1]))
        inverse = torch.where(norm >= SMALLEST, 1 / step, 0)
        z = (x * inverse.unsqueeze(-1)).round().to(torch.int32)
        states = self._paths(self._steps(z).reshape(-1, z.shape[-1])).view(z.shape)
        values = self._values(torch.int32, x.device)[states]
        fit = (self._steps(z) * values).sum(-1).float() / (values * values).sum(-1).float()
        scale = torch.where(whole, self._scale_code(step * fit), self._broken)
        word = (scale << self.start_bits) | (states[..., 0] >> self.code_bits)
        codes = self._channels(states & ((1 << self.code_bits) - 1))
        return Rows(
            self.pack(codes.masked_fill(~whole.unsqueeze(-1), 0)),
            torch.where(whole, word, scale << self.start_bits).to(torch.int16),
        )

    def _paths(self, z: Tensor) -> Tensor:
        """[N, D] int64 states of the cheapest path of each row z [N, D] int32, in the order of its bits."""
        chunk = CHUNK.get(z.device.type, CHUNK["cuda"])
        found = [self._path(part.T.contiguous()).T for part in z.split(chunk)]
        return torch.cat(found) if found else z.to(torch.int64)

    def _path(self, z: Tensor) -> Tensor:
        """[D, N] int64 states of z [D, N], by the Viterbi algorithm.

        A cost lies above k bits that hold which predecessor its state is: the least of both is the cheapest and, of
        equal ones, the first. Costs are taken relative to one of them, so they stay far below 2^31.
        """
        steps, rows = z.shape
        k, rest = self.code_bits, self.start_bits
        codes, pasts = 1 << k, 1 << rest
        value = self._values(torch.int32, z.device)[:, None]
        state = torch.arange(codes * pasts, dtype=torch.int32, device=z.device)[:, None]
        fixed = ((FINE // 2 * value * value) << k) | (state >> rest)
        slope = value << k
        back = torch.empty(steps, pasts, rows, dtype=torch.uint8, device=z.device)
        cost = fixed - slope * z[0]
        best = torch.empty(pasts, rows, dtype=torch.int32, device=z.device)
        for t in range(1, steps):
            torch.amin(cost.view(codes, pasts, rows), 0, out=best)
            back[t] = best & (codes - 1)
            best &= ~(codes - 1)
            best -= best[0].clone()
            torch.mul(slope, z[t], out=cost)
            torch.sub(fixed, cost, out=cost)
            cost.view(pasts, codes, rows).add_(best[:, None])
        last = ((cost.to(torch.int64) >> k) << self.trellis.state_bits) | state
        at = last.amin(0) & (codes * pasts - 1)
        path = torch.empty(steps, rows, dtype=torch.int64, device=z.device)
        for t in range(steps - 1, 0, -1):
            path[t] = at
            past = at >> k
            at = back[t].gather(0, past[None])[0].to(torch.int64) << rest | past
        path[0] = at
        return path

    @property
    def _broken(self) -> int:
        """The code of a scale that is NaN."""
        return (1 << (16 - self.start_bits)) - 1

    def _scale_code(self, scale: Tensor) -> Tensor:
        """[...] int32, the code of the nearest number that a scale can be; the nearest end beyond."""
        mantissa = 16 - self.start_bits - EXPONENT_BITS
        bits = scale.contiguous().view(torch.int32)
        code = ((bits + (1 << (22 - mantissa))) >> (23 - mantissa)) - ((127 - BIAS) << mantissa)
        return torch.where(scale > 0, code.clamp(0, self._broken - 1), 0)

    # ---- reading

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        values = self._values(dtype, rows.codes.device)[self.windows(rows)]
        return values * self.clean_scale(rows.scale).to(dtype).unsqueeze(-1)

    def windows(self, rows: Rows) -> Tensor:
        """[..., D] int64: of each channel, the L bits that end with its code."""
        assert rows.scale is not None
        k, bits = self.code_bits, self.trellis.state_bits
        codes = self._steps(self.unpack(rows.codes))
        before = -(-self.start_bits // k)  # codes that the bits before the first make, the first of them not whole
        start = (rows.scale.to(torch.int32) & ((1 << self.start_bits) - 1)).unsqueeze(-1)
        early = (start >> torch.arange(k * (before - 1), -1, -k, device=start.device)) & ((1 << k) - 1)
        string = torch.cat([early, codes], -1)
        steps = codes.shape[-1]
        window = codes.to(torch.int64)
        for back in range(1, before + 1):
            window = window | string[..., before - back : before - back + steps].to(torch.int64) << (k * back)
        return self._channels(window & ((1 << bits) - 1))

    def clean_scale(self, scale: Tensor) -> Tensor:
        mantissa = 16 - self.start_bits - EXPONENT_BITS
        code = (scale.to(torch.int32) & 0xFFFF) >> self.start_bits
        bits = (code << (23 - mantissa)) + ((127 - BIAS) << 23)
        return bits.view(torch.float32).masked_fill(code == 0, 0).masked_fill(code == self._broken, math.nan)

    def _values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[2^L], of each state."""
        return _table(self.trellis, self.code_bits, dtype, device)

    # ---- packing

    def pack(self, codes: Tensor) -> Tensor:
        string = self._steps(codes).to(torch.int32)
        count = math.lcm(8, self.code_bits) // self.code_bits  # codes that fill whole bytes
        shifts = torch.arange(self.code_bits * (count - 1), -1, -self.code_bits, device=codes.device)
        whole = (string.unflatten(-1, (-1, count)) << shifts).sum(-1)
        size = count * self.code_bits // 8
        octets = (whole.unsqueeze(-1) >> torch.arange(8 * (size - 1), -1, -8, device=codes.device)) & 0xFF
        packed: Tensor = octets.flatten(-2).unflatten(-1, (-1, 2)).flip(-1).flatten(-2).to(torch.uint8)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        count = math.lcm(8, self.code_bits) // self.code_bits
        size = count * self.code_bits // 8
        octets = packed.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).unflatten(-1, (-1, size)).to(torch.int32)
        whole = (octets << torch.arange(8 * (size - 1), -1, -8, device=packed.device)).sum(-1)
        shifts = torch.arange(self.code_bits * (count - 1), -1, -self.code_bits, device=packed.device)
        codes = (whole.unsqueeze(-1) >> shifts) & ((1 << self.code_bits) - 1)
        return self._channels(codes.flatten(-2).to(torch.int32))

    def _steps(self, x: Tensor) -> Tensor:
        """[..., D] by channel, in the order of the row's bits."""
        by_place: Tensor = x.unflatten(-1, (self.word_bits // self.code_bits, -1))
        return by_place.transpose(-1, -2).flatten(-2)

    def _channels(self, x: Tensor) -> Tensor:
        """The inverse of `_steps`."""
        by_word: Tensor = x.unflatten(-1, (-1, self.word_bits // self.code_bits))
        return by_word.transpose(-1, -2).flatten(-2)


@lru_cache(maxsize=64)
def _table(trellis: Trellis, code_bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(trellis.values(code_bits), dtype=dtype, device=device)


_SOURCE = (
    "QTIP's bit-shift trellis, https://arxiv.org/abs/2406.11235, with cosets as in "
    "Marcellin and Fischer 1990, Trellis Coded Quantization"
)


def _tcq(code_bits: int, trellis: Trellis, word_bits: int = 16) -> TrellisPerTokenHead:
    return TrellisPerTokenHead(
        f"tcq{code_bits}",
        code_bits,
        trellis,
        "per_token_head",
        _SOURCE,
        default_rotation="randomized_hadamard",
        word_bits=word_bits,
    )


tcq2 = _tcq(2, Trellis(8, 275, ((0, 46), (6, 36))))
tcq3 = _tcq(3, Trellis(8, 1801, ((0, 47), (2, 17), (16, 35))), word_bits=48)
tcq4 = _tcq(4, Trellis(8, 3163, ((0, 48), (2, 17), (16, 37))))
