"""One result out of the splits' partial results."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.hadamard import Turn, butterfly
from kvbench_kernels.tuning import INTERPRETED

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["SPLITS"], do_not_specialize_on_alignment=["part_m_ptr", "part_l_ptr", "query_starts_ptr"]
)
def merge_kernel(
    part_o_ptr,  # [pairs, SPLITS, HEADS, D] float32
    part_m_ptr,  # [pairs, SPLITS, HEADS] float32, -inf where a split had no tokens
    part_l_ptr,  # [pairs, SPLITS, HEADS] float32
    sinks_ptr,  # [HQ] float32, or None
    v_scale_ptr,  # one float32, or None
    query_starts_ptr,  # [B + 1] int32, or None, as in decode
    signs_ptr,  # [D] float32, or None
    out_ptr,  # [T, HQ, D], contiguous
    SPLITS,
    factor,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,  # heads a program
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: TOGETHER query heads of a sequence. The result is turned back where values were turned.

    A row of the tile is one warp's: a head, or every eighth split of the one head. The warp adds up and turns its row
    by itself; only the eight rows of one head meet, at the end.
    """
    GROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    PARTS: tl.constexpr = 8 if TOGETHER == 1 else 1
    ROWS: tl.constexpr = TOGETHER * PARTS
    AXIS: tl.constexpr = 1 if PARTS == 1 else 0
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    query = first // (HKV * GROUP)
    head = (first % (HKV * GROUP)).to(tl.int32)
    if TOGETHER > 1:
        head = (head + tl.arange(0, TOGETHER))[:, None]
    part_0 = query * (HKV * GROUPS) + head // GROUP * GROUPS + head % GROUP // HEADS
    part_0 = part_0 * SPLITS * HEADS + head % GROUP % HEADS  # a head's first split
    d = tl.arange(0, BLOCK_D)

    # what no launch before this one wrote is there early
    if signs_ptr is not None:
        signs = tl.load(signs_ptr + d, mask=d < D, other=0.0)
    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
    if query_starts_ptr is not None:
        b = query
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        if tl.load(query_starts_ptr + b + 1) - query != 1:
            return
    # all at once: a split without tokens has written its maximum alone, and what lies in its place is not used
    parts = ()  # [ROWS, CHUNK // PARTS]
    there = ()
    parts_o = ()  # [ROWS, CHUNK // PARTS, BLOCK_D]
    for i in tl.static_range(CHUNKS):
        split = i * CHUNK + tl.arange(0, CHUNK // PARTS)[None, :] * PARTS + (tl.arange(0, ROWS) % PARTS)[:, None]
        parts = parts + (part_0 + split * HEADS,)
        there = there + (split < SPLITS,)
        at = part_o_ptr + parts[i][:, :, None] * D + d[None, None, :]
        parts_o = parts_o + (tl.load(at, mask=there[i][:, :, None] & (d < D)[None, None, :], other=0.0),)
    if ASSEMBLY:
        # or the assembler puts these loads off until the maxima are there, or registers free
        tl.debug_barrier()
    parts_m = ()  # [ROWS, CHUNK // PARTS]
    all_m = ()  # of each row's head, or of the one: every warp looks at all its splits, so that none waits for another
    all_l = ()
    for i in tl.static_range(CHUNKS):
        part, inside = parts[i], there[i]
        part_m = tl.load(part_m_ptr + part, mask=inside, other=float("-inf"))
        parts_m = parts_m + (part_m,)
        if PARTS > 1:
            split = i * CHUNK + tl.arange(0, CHUNK)
            part, inside = part_0 + split * HEADS, split < SPLITS
            part_m = tl.load(part_m_ptr + part, mask=inside, other=float("-inf"))
        all_m = all_m + (part_m,)
        all_l = all_l + (tl.load(part_l_ptr + part, mask=inside, other=0.0),)
    m = tl.max(all_m[0], axis=AXIS, keep_dims=PARTS == 1)
    for i in tl.static_range(1, CHUNKS):
        m = tl.maximum(m, tl.max(all_m[i], axis=AXIS, keep_dims=PARTS == 1))
    m = tl.where(m == float("-inf"), 0.0, m)
    l = 0.0
    o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(CHUNKS):
        has_tokens = all_m[i] > float("-inf")
        l += tl.sum(tl.where(has_tokens, all_l[i], 0.0) * tl.exp2(all_m[i] - m), axis=AXIS, keep_dims=PARTS == 1)
        part_o = tl.where((parts_m[i] > float("-inf"))[:, :, None], parts_o[i], 0.0)
        o += tl.sum(part_o * tl.exp2(parts_m[i] - m)[:, :, None], axis=1)
    if sinks_ptr is not None:
        l += tl.exp2(tl.load(sinks_ptr + head) * _LOG2E - m)
    # a sequence of no tokens gets zeros
    o = o / tl.where(l == 0.0, 1.0, l)
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr)
    if BLOCK > 1:
        (o,) = butterfly((o,), BLOCK)
    if PARTS > 1:
        o = tl.sum(o, axis=0, keep_dims=True)
    if BLOCK > 1:
        o *= factor
        if signs_ptr is not None:
            o *= signs[None, :]
    at = out_ptr + (query * HKV * GROUP + head) * D + d[None, :]
    tl.store(at, o.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])


def merge(
    part_o: Tensor,
    part_m: Tensor,
    part_l: Tensor,
    out: Tensor,
    v_turn: Turn,
    *,
    kv_heads: int,
    group: int,
    sinks: Tensor | None,
    v_scale: Tensor | None,
    query_starts: Tensor | None,
) -> None:
    """Writes out [T, HQ, D]: the splits' results as one, turned back where values were turned.

    part_o, part_m, part_l: [pairs, splits, heads, ...], as decode leaves them. v_scale: of all values, or None.
    """
    pairs, splits, heads, head_dim = part_o.shape
    query_heads = kv_heads * group
    batch = pairs // (kv_heads * -(-group // heads))
    block_d = triton.next_power_of_2(head_dim)
    # heads that one program merges, a warp each, or one: a warp then takes every eighth split
    together = 4 if splits <= 16 and query_heads % 4 == 0 else 1
    assembly = out.is_cuda and not INTERPRETED
    merge_kernel[(batch * query_heads // together,)](
        part_o,
        part_m,
        part_l,
        sinks,
        v_scale,
        query_starts,
        v_turn.signs,
        out,
        splits,
        v_turn.read_factor,
        kv_heads,
        group,
        heads,
        head_dim,
        v_turn.block,
        BLOCK_D=block_d,
        TOGETHER=together,
        CHUNK=min(32, max(8 // together, triton.next_power_of_2(splits))),
        CHUNKS=triton.cdiv(splits, 32),
        ASSEMBLY=assembly,
        num_warps=max(1, (8 if together == 1 else together) * min(block_d, 128) // 128),
        launch_pdl=assembly,
    )
