"""One result out of the splits' partial results."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.hadamard import butterfly

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge(
    part_o_ptr,  # [pairs, SPLITS, HEADS, D] float32
    part_m_ptr,  # [pairs, SPLITS, HEADS] float32, -inf where a split had no tokens
    part_l_ptr,  # [pairs, SPLITS, HEADS] float32
    sinks_ptr,  # [HQ] float32, or None
    v_scale_ptr,  # one float32, or None
    signs_ptr,  # [D] float32, or None
    out_ptr,  # [HQ, D], contiguous
    pair,
    g,  # [G]: of the pair's HEADS query heads
    first_head,  # of the pair
    heads,  # that the pair has
    used,  # splits to read
    SPLITS,
    factor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores the outputs of query heads `g`, turned back where values were turned."""
    G: tl.constexpr = g.shape[0]
    d = tl.arange(0, BLOCK_D)
    is_head = g < heads
    m = tl.full([G], float("-inf"), tl.float32)
    l = tl.zeros([G], tl.float32)
    o = tl.zeros([G, BLOCK_D], tl.float32)
    for chunk in range(0, used, CHUNK):
        at = chunk + tl.arange(0, CHUNK)
        inside = (at < used)[:, None] & is_head[None, :]
        part = ((pair * SPLITS + at) * HEADS)[:, None] + g[None, :]  # [CHUNK, G]
        # past the first-level cache, which does not see what other programs wrote
        part_m = tl.load(part_m_ptr + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        part_l = tl.load(part_l_ptr + part, mask=inside, other=0.0, cache_modifier=".cg")
        mask = inside[:, :, None] & (d < D)[None, None, :]
        part_o = tl.load(part_o_ptr + part[:, :, None] * D + d, mask=mask, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(m, tl.max(part_m, axis=0))
        top = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp2(m - top)
        m = new_m
        weight = tl.exp2(part_m - top[None, :])
        # a split without tokens has written its maximum alone
        has_tokens = part_m > float("-inf")
        l = l * decay + tl.sum(tl.where(has_tokens, part_l * weight, 0.0), axis=0)
        part_o = tl.where(has_tokens[:, :, None], part_o * weight[:, :, None], 0.0)
        o = o * decay[:, None] + tl.sum(part_o, axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + first_head + g, mask=is_head, other=0.0) * _LOG2E
        l += tl.exp2(sink - tl.where(m == float("-inf"), 0.0, m))
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr)
    # a sequence of no tokens gets zeros
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    if BLOCK > 1:
        (o,) = butterfly((o,), BLOCK)
        o *= factor
        if signs_ptr is not None:
            o *= tl.load(signs_ptr + d, mask=d < D, other=0.0)[None, :]
    out_at = out_ptr + (first_head + g)[:, None] * D + d[None, :]
    tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=is_head[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["SPLITS"])
def merge_kernel(
    part_o_ptr,  # as in `merge`
    part_m_ptr,
    part_l_ptr,
    sinks_ptr,
    v_scale_ptr,
    query_starts_ptr,  # [B + 1] int32, or None, as in decode
    signs_ptr,
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
    """One program: one sequence and query head."""
    GROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = tl.program_id(0).to(tl.int64)
    query = row // (HKV * GROUP)
    head = (row % (HKV * GROUP)).to(tl.int32)
    pair = row // GROUP * GROUPS + head % GROUP // HEADS
    g = head % GROUP % HEADS

    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
    if query_starts_ptr is not None:
        b = query
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        if tl.load(query_starts_ptr + b + 1) - query != 1:
            return
    merge(
        part_o_ptr, part_m_ptr, part_l_ptr, sinks_ptr, v_scale_ptr, signs_ptr, out_ptr + query * HKV * GROUP * D,
        pair, g + tl.arange(0, 1), head - g, HEADS, SPLITS, SPLITS, factor, HEADS, D, BLOCK, BLOCK_D, CHUNK,
    )  # fmt: skip


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros that no other running call has; whoever counts in them leaves zeros again."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if not torch.cuda.is_current_stream_capturing():
        if device not in _reserved:
            _reserved[device] = torch.zeros(RESERVED, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        return _of_stream(device, stream, max(1024, triton.next_power_of_2(count)))
    # each call of a graph has its own, zeroed before; where none are left, by the graph
    count = -(-count // 4) * 4  # 16 bytes
    free = _reserved.get(device)
    if free is None or len(free) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _reserved[device] = free[count:]
    return free[:count]


RESERVED = 1 << 20  # counters for the calls of graphs
_reserved: dict[torch.device, Tensor] = {}


@lru_cache(maxsize=64)
def _of_stream(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
