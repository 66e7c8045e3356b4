"""One result out of the splits' partial results."""

import triton
import triton.language as tl

from kvbench_kernels.hadamard import butterfly

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["SPLITS"])
def merge_kernel(
    part_o_ptr,  # [B, HQ, SPLITS, D] float32
    part_m_ptr,  # [B, HQ, SPLITS] float32, -inf where a split had no tokens
    part_l_ptr,  # [B, HQ, SPLITS] float32
    sinks_ptr,  # [HQ] float32, or None
    v_scale_ptr,  # one float32, or None
    query_starts_ptr,  # [B + 1] int32, or None, as in decode
    signs_ptr,  # [D] float32, or None
    out_ptr,  # [T, HQ, D], contiguous
    SPLITS,
    factor,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: one sequence and query head. The result is turned back where values were turned."""
    pair = tl.program_id(0).to(tl.int64)
    head = pair % HQ
    d = tl.arange(0, BLOCK_D)
    split = tl.arange(0, BLOCK_SPLITS)

    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
    query = pair // HQ
    if query_starts_ptr is not None:
        b = query
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        if tl.load(query_starts_ptr + b + 1) - query != 1:
            return
    m = tl.load(part_m_ptr + pair * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(m, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    l = tl.load(part_l_ptr + pair * SPLITS + split, mask=m > float("-inf"), other=0.0)
    total = tl.sum(l * tl.exp2(m - top), axis=0)
    if sinks_ptr is not None:
        total += tl.exp2(tl.load(sinks_ptr + head) * _LOG2E - top)

    o = tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(0, SPLITS, CHUNK):
        at = chunk + tl.arange(0, CHUNK)
        part_m = tl.load(part_m_ptr + pair * SPLITS + at, mask=at < SPLITS, other=float("-inf"))
        part = tl.load(
            part_o_ptr + ((pair * SPLITS + at) * D)[:, None] + d[None, :],
            mask=(part_m > float("-inf"))[:, None] & (d < D)[None, :],
            other=0.0,
        )
        o += tl.sum(part * tl.exp2(part_m - top)[:, None], axis=0)
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr)
    # a sequence of no tokens gets zeros
    o = o / tl.where(total == 0.0, 1.0, total)
    if BLOCK > 1:
        (turned,) = butterfly((tl.reshape(o, [1, BLOCK_D]),), BLOCK)
        o = tl.reshape(turned, [BLOCK_D]) * factor
        if signs_ptr is not None:
            o *= tl.load(signs_ptr + d, mask=d < D, other=0.0)
    tl.store(out_ptr + (query * HQ + head) * D + d, o.to(out_ptr.dtype.element_ty), mask=d < D)
