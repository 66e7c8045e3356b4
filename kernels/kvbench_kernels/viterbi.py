"""The cheapest path of each row through a bit-shift trellis of 2^8 states: what a trellis-coded row is written with.

The costs of a row's states lie in the registers of one warp, a bit of the state an axis of two; lanes are the last
five axes. A step of k bits takes the least over k axes, those of the bits that leave the state, and the bits that enter
it take these axes: so no cost ever moves, only which bit an axis is turns, by k places a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.tuning import INTERPRETED, multiprocessors

STATE_BITS = 8
# what a state costs that no path begins in
_UNREACHED = tl.constexpr(1 << 29)


@dataclass(frozen=True)
class Part:
    """Steps that follow each other, with codes of so many bits; an error counts `weight` times."""

    steps: int
    bits: int
    weight: int


# ---- which bit of the state an axis is: a place is a bit of an index in registers, and when `turned` bits have
# entered, bit b of the state is at the place (b - turned) mod 8


@triton.constexpr_function
def _period(bits):
    """Steps after which all bits of the state are where they were."""
    return 8 // math.gcd(8, bits)


@triton.constexpr_function
def _leaves(place, bits, turned):
    """Whether that place has one of the `bits` upper bits of the state."""
    return (place + turned) % 8 >= 8 - bits


@triton.constexpr_function
def _rank(place, bits, turned):
    """Of a place whose bit stays, its number among those that stay and are registers too, or lanes too."""
    first = 5 if place >= 5 else 0
    return sum(not _leaves(other, bits, turned) for other in range(first, place))


@triton.jit
def _state(index, TURNED: tl.constexpr):
    """The state at an index in registers."""
    TURN: tl.constexpr = TURNED % 8
    return ((index << TURN) | (index >> (8 - TURN))) & ((1 << 8) - 1)


@triton.jit
def _spread(x):
    """[256] as [1, 2, 2, 2, 2, 2, 2, 2, 2]."""
    return tl.reshape(x, [1, 2, 2, 2, 2, 2, 2, 2, 2])


@triton.jit
def _least(x, BITS: tl.constexpr, TURNED: tl.constexpr):
    """The least of x over the bits that leave the state, whose axes become 1."""
    for upside_down in tl.static_range(8):
        if _leaves(7 - upside_down, BITS, TURNED):
            x = tl.min(x, axis=1 + upside_down, keep_dims=True)
    return x


@triton.jit
def _of_lanes(x, BITS: tl.constexpr, TURNED: tl.constexpr):
    """Sums of x over the registers whose bits stay: one number a lane."""
    for upside_down in tl.static_range(3):
        if not _leaves(7 - upside_down, BITS, TURNED):
            x = tl.sum(x, axis=1 + upside_down, keep_dims=True)
    return x


@triton.jit
def _places(flat, BITS: tl.constexpr, TURNED: tl.constexpr):
    """Where a choice is kept: by how much it is shifted in its word, and which word of the step that is.

    flat: [256], indices in registers. The first has an axis a bit that stays, the second a lane's.
    """
    shift = flat * 0
    word = flat * 0
    for place in tl.static_range(8):
        if not _leaves(place, BITS, TURNED):
            bit = (flat >> place) & 1
            if place >= 5:
                shift += bit * (BITS << _rank(place, BITS, TURNED))
            else:
                word += bit << _rank(place, BITS, TURNED)
    shift = _least(_spread(shift), BITS, TURNED)
    word = _least(_spread(word), BITS, TURNED)
    for upside_down in tl.static_range(3):
        word = tl.min(word, axis=1 + upside_down, keep_dims=True)
    return shift, word


@triton.jit
def _find(past, BITS: tl.constexpr, TURNED: tl.constexpr):
    """`_places` of the bits that stay, `past` [R]."""
    shift = past * 0
    word = past * 0
    for place in tl.static_range(8):
        if not _leaves(place, BITS, TURNED):
            bit = (past >> ((place + TURNED) % 8)) & 1
            if place >= 5:
                shift += bit * (BITS << _rank(place, BITS, TURNED))
            else:
                word += bit << _rank(place, BITS, TURNED)
    return shift, word


# ---- the search


@triton.jit
def _step(cost, z, fixed, slope, shift, BITS: tl.constexpr, TURNED: tl.constexpr):
    """The costs of all states a step on, and each lane's word of choices.

    A cost lies above the bits that say which of the next step's predecessors its state is: the least of both is the
    cheapest and, of equal ones, the first.
    """
    ONES: tl.constexpr = (1 << BITS) - 1
    best = _least(cost, BITS, TURNED)
    chosen = _of_lanes((best & ONES) << shift, BITS, TURNED)
    return (best & ~ONES) + (fixed - slope * z), chosen


@triton.jit
def _row_least(x):
    """The least of each row of x, with axes of 1."""
    for axis in tl.static_range(8):
        x = tl.min(x, axis=1 + axis, keep_dims=True)
    return x


@triton.jit
def _forward(
    cost,
    flat,
    at_z,
    inside,
    value,
    at_word,
    R: tl.constexpr,
    K: tl.constexpr,
    TURNED: tl.constexpr,
    BEGIN: tl.constexpr,
    STEPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    HALF: tl.constexpr,
    LOWERED: tl.constexpr,
):
    """The costs after the steps of one part, whose choices are kept."""
    PERIOD: tl.constexpr = _period(K)
    FULL: tl.constexpr = STEPS // PERIOD * PERIOD
    cost = (cost << K) | _spread(_state(flat, TURNED) >> (8 - K))
    fixed = ()
    slope = ()
    shift = ()
    word = ()
    for p in tl.static_range(PERIOD):
        state = _state(flat, TURNED + (p + 1) * K)
        own = tl.load(value + state)
        rise = (own * WEIGHT) << K
        slope = slope + (_spread(rise),)
        fixed = fixed + (_spread((HALF * own * rise) | (state >> (8 - K))),)
        by, which = _places(flat, K, TURNED + p * K)
        shift = shift + (by,)
        word = word + (which,)
    for first in range(BEGIN, BEGIN + FULL, PERIOD):
        for p in tl.static_range(PERIOD):
            z = tl.load(at_z + (first + p), mask=inside, other=0).to(tl.int32)
            cost, chosen = _step(cost, z, fixed[p], slope[p], shift[p], K, TURNED + p * K)
            tl.store(at_word + (first + p) * (R * 32) + word[p], chosen.to(at_word.dtype.element_ty))
        if LOWERED:
            cost -= _row_least(cost) & ~((1 << K) - 1)
    for p in tl.static_range(STEPS - FULL):
        t = BEGIN + FULL + p
        z = tl.load(at_z + t, mask=inside, other=0).to(tl.int32)
        cost, chosen = _step(cost, z, fixed[p], slope[p], shift[p], K, TURNED + p * K)
        tl.store(at_word + t * (R * 32) + word[p], chosen.to(at_word.dtype.element_ty))
    return cost >> K


@triton.jit
def _backward(
    at,
    to,
    kept,
    words,
    R: tl.constexpr,
    K: tl.constexpr,
    TURNED: tl.constexpr,
    BEGIN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The states [R] before one part, whose own are stored; at: its last."""
    PERIOD: tl.constexpr = _period(K)
    FULL: tl.constexpr = STEPS // PERIOD * PERIOD
    REST: tl.constexpr = STEPS - FULL
    for q in tl.static_range(REST):
        t = BEGIN + FULL + REST - 1 - q
        tl.store(to + t, at.to(tl.uint8), mask=kept)
        at = _before(at, words + t * (R * 32), K, TURNED + (REST - 1 - q) * K)
    for done in range(0, FULL, PERIOD):
        for q in tl.static_range(PERIOD):
            t = BEGIN + FULL - 1 - done - q
            tl.store(to + t, at.to(tl.uint8), mask=kept)
            at = _before(at, words + t * (R * 32), K, TURNED + (PERIOD - 1 - q) * K)
    return at


@triton.jit(do_not_specialize=["N"])  # it takes half a minute to compile
def _path_kernel(
    z_ptr,  # [N, D] int32 or int16, rows in the order of steps
    value_ptr,  # [parts, 256] int32, of each state
    back_ptr,  # [programs, D, R, 32] int16 or int32, scratch: of each step and lane, choices of predecessors
    out_ptr,  # [N, D] uint8: states
    N,
    D: tl.constexpr,
    BITS: tl.constexpr,  # of each part: see Part; and bits and steps before it
    STEPS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TURNED: tl.constexpr,
    BEGIN: tl.constexpr,
    HALF: tl.constexpr,  # half the steps of z in a unit of values
    FREE: tl.constexpr,  # the first state is any, else one that follows 0
    LOWERED: tl.constexpr,  # whether costs would overflow if none was ever taken off them
    R: tl.constexpr,
):
    """One program, a warp, per R rows at a time: costs of all states forward, then one walk back."""
    program = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, R)
    each = tl.reshape(own, [R, 1, 1, 1, 1, 1, 1, 1, 1])
    flat = tl.arange(0, 256)
    back = back_ptr + program * D * R * 32
    for first in range(tl.program_id(0) * R, N, tl.num_programs(0) * R):
        at_z = z_ptr + (first + each).to(tl.int64) * D
        cost = tl.zeros([R, 2, 2, 2, 2, 2, 2, 2, 2], tl.int32)
        if not FREE:
            cost += tl.where(_spread(flat) == 0, 0, _UNREACHED >> BITS[0])
        for part in tl.static_range(len(BITS)):
            cost = _forward(
                cost,
                flat,
                at_z,
                first + each < N,
                value_ptr + part * 256,
                back + each * 32,
                R,
                BITS[part],
                TURNED[part],
                BEGIN[part],
                STEPS[part],
                WEIGHTS[part],
                HALF,
                LOWERED,
            )
        state = _spread(_state(flat, TURNED[len(BITS)]))
        at = tl.reshape(_row_least(tl.where(cost == _row_least(cost), state, 256)), [R])
        # the walk reads what other lanes wrote
        tl.debug_barrier()
        to = out_ptr + (first + own).to(tl.int64) * D
        for done in tl.static_range(len(BITS)):
            at = _backward(
                at,
                to,
                first + own < N,
                back + own * 32,
                R,
                BITS[len(BITS) - 1 - done],
                TURNED[len(BITS) - 1 - done],
                BEGIN[len(BITS) - 1 - done],
                STEPS[len(BITS) - 1 - done],
            )
        tl.debug_barrier()


@triton.jit
def _before(at, words, BITS: tl.constexpr, TURNED: tl.constexpr):
    """The states [R] that the paths through `at` come from; words: where a step's choices begin."""
    past = at >> BITS
    shift, word = _find(past, BITS, TURNED)
    chosen = (tl.load(words + word).to(tl.int32) >> shift) & ((1 << BITS) - 1)
    return (chosen << (8 - BITS)) | past


def cheapest_paths(z: Tensor, values: Tensor, parts: tuple[Part, ...], half: int, free: bool) -> Tensor:
    """[N, D] uint8 states of the cheapest path of each row of z [N, D] int32 or int16, in the order of steps.

    A state of value v costs weight · (half · v² - v z) at a step; of equally cheap predecessors the one with the
    smallest bits is taken, and of equally cheap last states the smallest. values: [parts, 256] int32.
    free: the first state is any, else one whose bits before the first code are zeros.

    Raises:
        ValueError: parts that are not of such rows and values.
    """
    rows, steps = z.shape
    if sum(part.steps for part in parts) != steps or values.shape != (len(parts), 1 << STATE_BITS):
        raise ValueError(f"{steps} steps and values {list(values.shape)} do not fit {parts}")
    out = torch.empty(rows, steps, dtype=torch.uint8, device=z.device)
    if rows:
        _launch(z.contiguous(), values, out, parts, half, free)
    return out


def _launch(
    z: Tensor,
    values: Tensor,
    out: Tensor,
    parts: tuple[Part, ...],
    half: int,
    free: bool,
    each: int = 2,
    most: int = 32,
) -> None:
    """each: rows of a program at a time. most: programs a multiprocessor."""
    rows, steps = z.shape
    each, most = (4, 1) if INTERPRETED else (each, most)
    programs = min(triton.cdiv(rows, each), most * multiprocessors())
    word = torch.int16 if all(part.bits <= 2 for part in parts) else torch.int32
    back = torch.empty(programs, steps, each, 32, dtype=word, device=z.device)
    # values are below 2^7, z below 2^12: no state costs more at a step
    dearest = sum(part.steps * part.weight * (half * 2**14 + 2**19) for part in parts) << max(
        part.bits for part in parts
    )
    bits = [part.bits for part in parts]
    ends = [0, *accumulate(part.steps * part.bits for part in parts)]
    _path_kernel[(programs,)](
        z,
        values,
        back,
        out,
        rows,
        steps,
        tuple(bits),
        tuple(part.steps for part in parts),
        tuple(part.weight for part in parts),
        tuple(end % STATE_BITS for end in ends),
        tuple(accumulate((part.steps for part in parts), initial=0)),
        half,
        free,
        dearest >= 2**31 - 2**29,
        each,
        num_warps=1,
    )
