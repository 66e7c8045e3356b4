"""How near trellis codes come to a Gaussian row, and the search for their constants.

    python benchmarks/trellis.py [FILE]            the table: distortion in dB by bits, states and kind of code
    python benchmarks/trellis.py --search [FILE]   the multipliers and curves, again from nothing

Rows are N(0, 1), quantized by the dtypes' own definition: those of 64 and 128 values with the scale as it is stored,
those of 4096, where scale and first state weigh next to nothing, with the scale that fits best: what the code is worth
at its rate. FILE gets the rows as JSON. On a GPU minutes, on a CPU an hour.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import integrate, special, stats

from kvbench.dtypes import Part, Trellis
from kvbench.dtypes.int2 import CENTROIDS, THRESHOLD
from kvbench.dtypes.trellis import FOUR, ONE, THREE, TWO, TrellisPerTokenHead, tcq2

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS = (1, 2, 3, 4)
OURS = 8  # state bits of the dtypes
STATE_BITS = (8, 5, 6, 7, 10, 12)  # others with two bits alone
LONG = 4096
# where the search of a curve begins: nearly the quantile of a Gaussian, the wider the more bits
CURVES = {
    1: ((0, 38), (6, 30)),
    2: ((0, 46), (6, 36)),
    3: ((0, 47), (2, 17), (16, 35)),
    4: ((0, 48), (2, 17), (16, 37)),
}
TRIED = {10: 256, 12: 64}  # odd multipliers, of more that there are
PERMUTATIONS = 8  # of which the table has the mean
QTIP = 34038481, 76625530  # 1MAD's multiplier and addend


@dataclass(frozen=True)
class Permutation(Part):
    """The quantiles of a Gaussian in random order: QTIP's ideal, which its computed codes come near to."""

    seed: int = 0

    def values(self, state_bits: int) -> tuple[int, ...]:
        states = 1 << state_bits
        found = [round(32 * special.ndtri((i + 0.5) / states)) for i in range(states)]
        random.Random(self.seed).shuffle(found)
        return tuple(found)


@dataclass(frozen=True)
class OneMad(Part):
    """QTIP's 1MAD: the sum of the four bytes of a product and an addend."""

    def values(self, state_bits: int) -> tuple[int, ...]:
        factor, addend = QTIP
        products = [(factor * state + addend) & 0xFFFFFFFF for state in range(1 << state_bits)]
        spread = math.sqrt(4 * (2**16 - 1) / 12)
        return tuple(round(32 * (sum(p >> s & 255 for s in (0, 8, 16, 24)) - 510) / spread) for p in products)


def gaussian(rows: int, width: int, seed: int) -> torch.Tensor:
    """[rows, width] on the device, the same on every machine."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def distortion(dtype: TrellisPerTokenHead, x: torch.Tensor, stored: bool = False) -> float:
    """The error's square over the rows' own; with the scale as it is stored, or with the one that fits best."""
    values = dtype.dequantize(dtype.quantize(x), torch.float64)
    if not stored:
        # a code of few values may have none that fits: its scale is 0
        values *= ((values * x).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True)).nan_to_num(0)
    return float((values - x).square().sum() / x.double().square().sum())


def db(share: float) -> float:
    """Decibels below the rows."""
    return -10 * math.log10(share)


def of(part: Part, state_bits: int) -> TrellisPerTokenHead:
    """Rows that are all of this part."""
    word_bits = math.lcm(16, part.bits)
    return replace(tcq2, code_bits=part.bits, word_bits=word_bits, decode=Trellis(state_bits, (part,)))


def best(options: list[Part], state_bits: int, x: torch.Tensor, keep: int) -> list[tuple[float, Part]]:
    """The `keep` options of least distortion on x, the best first."""
    return sorted(((distortion(of(one, state_bits), x), one) for one in options), key=lambda pair: pair[0])[:keep]


# ---- the search


def search(bits: int, state_bits: int, say: Callable[[str], None]) -> Part:
    """The best multiplier of those tried, with a curve that is climbed to by steps of its coefficients."""
    few, many = gaussian(256, 128, 1), gaussian(8192, 128, 2)
    all_odd = range(1, 1 << (state_bits + bits), 2)
    tried = TRIED.get(state_bits)
    multipliers = list(all_odd) if tried is None else random.Random(0).sample(all_odd, tried)
    options = [Part(bits, multiplier, CURVES[bits]) for multiplier in multipliers]
    finalists = [one for _, one in best(options, state_bits, few, 16)]
    ((least, found),) = best(finalists, state_bits, many, 1)
    say(f"{bits} bits, 2^{state_bits} states: {len(options)} tried, best {found.multiplier}, {db(least):.3f} dB")
    while state_bits == OURS:
        near = [
            replace(found, curve=tuple((e, c + by * (i == at)) for i, (e, c) in enumerate(found.curve)))
            for at in range(len(found.curve))
            for by in (-4, -1, 1, 4)
        ]
        near = [one for one in near if max(map(abs, one.values(state_bits))) <= 127]
        ((share, better),) = best(near, state_bits, many, 1)
        if share >= least:
            break
        least, found = share, better
        say(f"  curve {found.curve}: {db(least):.3f} dB")
    return found


# ---- the table


def table(codes: dict[tuple[int, int], Part]) -> Iterator[dict[str, Any]]:
    """A row a code and width of rows; codes by bits and state bits."""
    rows = {LONG: gaussian(256, LONG, 3), 64: gaussian(16384, 64, 4), 128: gaussian(8192, 128, 5)}

    def row(kind: str, bits: int, state_bits: int | None, width: int, share: float, true: float) -> dict[str, Any]:
        place = {"code": kind, "bits": bits, "state_bits": state_bits, "width": width}
        return place | {"bits_per_value": true, "distortion": share, "db": db(share)}

    for bits in BITS:
        yield row("limit", bits, None, LONG, 2.0 ** (-2 * bits), bits)
    yield row("Lloyd-Max", 2, None, LONG, lloyd_max(), 2)
    for (bits, state_bits), part in codes.items():
        dtype = of(part, state_bits)
        yield row("cosets", bits, state_bits, LONG, distortion(dtype, rows[LONG]), bits)
        if state_bits == OURS:
            for width in (64, 128):
                share = distortion(dtype, rows[width], stored=True)
                yield row("stored", bits, state_bits, width, share, dtype.bits_per_value(width))
        count = PERMUTATIONS if state_bits < max(STATE_BITS) else 2
        of_each = [distortion(of(Permutation(bits, 1, (), seed=i), state_bits), rows[LONG]) for i in range(count)]
        yield row("permutation", bits, state_bits, LONG, sum(of_each) / count, bits)
        yield row("1MAD", bits, state_bits, LONG, distortion(of(OneMad(bits, 1, ()), state_bits), rows[LONG]), bits)


def lloyd_max() -> float:
    """The mean square error of the best four values for a unit Gaussian."""

    def square(z: float) -> float:
        centroid = CENTROIDS[2] if z < THRESHOLD else CENTROIDS[3]
        return (z - centroid) ** 2 * stats.norm.pdf(z)

    return 2 * sum(integrate.quad(square, a, b)[0] for a, b in ((0, THRESHOLD), (THRESHOLD, math.inf)))


def main() -> None:
    """Searches if asked to, measures, and prints the table."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--search"]
    begun = time.time()

    def say(text: str) -> None:
        print(f"{time.time() - begun:6.0f} s  {text}", flush=True)

    codes = {(part.bits, OURS): part for part in (ONE, TWO, THREE, FOUR)}
    if "--search" in sys.argv:
        codes = {(bits, s): search(bits, s, say) for s in STATE_BITS for bits in BITS if s == OURS or bits == 2}
    found = []
    for row in table(codes):
        found.append(row)
        name = f"{row['code']} 2^{row['state_bits']}" if row["state_bits"] else row["code"]
        say(f"{name:18} {row['bits']} bits, rows of {row['width']:4} ({row['bits_per_value']:.3f}): {row['db']:.2f} dB")
        if arguments:  # after each row, so that a stop loses little
            constants = [{"state_bits": s} | asdict(part) for (_, s), part in codes.items()]
            Path(arguments[0]).write_text(json.dumps({"constants": constants, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
