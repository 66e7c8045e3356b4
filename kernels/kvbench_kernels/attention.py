"""Attention of a batch over the packed, paged cache: the one call that an engine or kvbench needs."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench_kernels.center import Center
from kvbench_kernels.decode import decode
from kvbench_kernels.exact import Exact
from kvbench_kernels.hadamard import Turn
from kvbench_kernels.layout import Side
from kvbench_kernels.prefill import prefill
from kvbench_kernels.tiers import Rank
from kvbench_kernels.tuning import SHORT, multiprocessors

MANY = 8  # pairs of a sequence and a KV head, for each multiprocessor, that keep a GPU busy without splits


def attend(
    q: Tensor,
    k: Side,
    v: Side,
    page_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    max_seq_len: int | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    qq_bias: Tensor | None = None,
    k_turn: Turn | None = None,
    v_turn: Turn | None = None,
    exact: Exact | None = None,
    center: Center | None = None,
    rank: Rank | None = None,
) -> Tensor:
    """Attention outputs [T, HQ, D], in q's dtype, of a batch of prompts, chunks and single tokens.

    q: [T, HQ, D] as the model made them: not turned; any strides.
    page_table: [B, max_pages] int32.  seq_lens: [B] int32, new tokens included.
    query_starts: [B + 1] int32; every sequence has at least one query.
    qq_bias: [N, N] float32, N at least the most new tokens of a sequence: added to the scaled score of a sequence's new
        token i (row) and its new token j <= i, the same for all sequences; for tree attention.
    max_seq_len: at least the longest of seq_lens; the page table's width when not given. It chooses the splits.
    k_turn, v_turn: how keys and values were turned when they were written.
    The other arguments are as in `decode`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    k_turn, v_turn = k_turn or Turn(), v_turn or Turn()
    if max_seq_len is None:
        max_seq_len = page_table.shape[1] * k.codes.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    options = {"scale": scale, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    options |= {"k_turn": k_turn, "v_turn": v_turn, "exact": exact, "center": center, "rank": rank, "out": out}
    if qq_bias is not None:
        prefill(q, k, v, page_table, seq_lens, query_starts, qq_bias=qq_bias, **options)
        return out
    if q.shape[0] == seq_lens.shape[0]:
        return decode(q, k, v, page_table, seq_lens, max_seq_len=max_seq_len, **options)
    # sequences of one new token are split over their context, the others are not; many short ones need no splits
    if max_seq_len <= SHORT and seq_lens.shape[0] * k.codes.shape[1] >= MANY * multiprocessors():
        prefill(q, k, v, page_table, seq_lens, query_starts, single=True, **options)
        return out
    prefill(q, k, v, page_table, seq_lens, query_starts, **options)
    return decode(q, k, v, page_table, seq_lens, max_seq_len=max_seq_len, query_starts=query_starts, **options)
