"""One result out of the splits' partial results."""

import triton
import triton.language as tl

from kvbench_kernels.hadamard import butterfly

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["SPLITS"])
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
    CHUNK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: one sequence and query head. The result is turned back where values were turned."""
    GROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = tl.program_id(0).to(tl.int64)
    query = row // (HKV * GROUP)
    head = (row % (HKV * GROUP)).to(tl.int32)
    pair = row // GROUP * GROUPS + head % GROUP // HEADS
    g = head % GROUP % HEADS
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
    m = float("-inf")
    l = 0.0
    o = tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(0, SPLITS, CHUNK):
        split = chunk + tl.arange(0, CHUNK)
        part = (pair * SPLITS + split) * HEADS + g
        # all at once: a split without tokens has written its maximum alone, and what lies in its place is not used
        part_m = tl.load(part_m_ptr + part, mask=split < SPLITS, other=float("-inf"))
        part_l = tl.load(part_l_ptr + part, mask=split < SPLITS, other=0.0)
        mask = (split < SPLITS)[:, None] & (d < D)[None, :]
        part_o = tl.load(part_o_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
        has_tokens = part_m > float("-inf")
        part_l = tl.where(has_tokens, part_l, 0.0)
        part_o = tl.where(has_tokens[:, None], part_o, 0.0)
        new_m = tl.maximum(m, tl.max(part_m, axis=0))
        top = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp2(m - top)
        m = new_m
        weight = tl.exp2(part_m - top)
        l = l * decay + tl.sum(part_l * weight, axis=0)
        o = o * decay + tl.sum(part_o * weight[:, None], axis=0)
    if sinks_ptr is not None:
        l += tl.exp2(tl.load(sinks_ptr + head) * _LOG2E - tl.where(m == float("-inf"), 0.0, m))
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr)
    # a sequence of no tokens gets zeros
    o = o / tl.where(l == 0.0, 1.0, l)
    if BLOCK > 1:
        (turned,) = butterfly((tl.reshape(o, [1, BLOCK_D]),), BLOCK)
        o = tl.reshape(turned, [BLOCK_D]) * factor
        if signs_ptr is not None:
            o *= signs
    tl.store(out_ptr + (query * HKV * GROUP + head) * D + d, o.to(out_ptr.dtype.element_ty), mask=d < D)
