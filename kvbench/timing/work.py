"""What is timed: a filled cache, and what reads it or is written to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.attention import Batch, triton
from kvbench.cache import PagedCache
from kvbench.schemes import Scheme
from kvbench.timing.request import KernelRequest

APPEND_CHUNK = 65536  # tokens written at once when a cache is filled


@dataclass
class Work:
    """A filled cache, a batch over it, and its queries, or its new keys and values."""

    cache: PagedCache
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    nbytes: int


def make_work(request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool) -> Work:
    """Caches of normal numbers, pages in random order, bf16 (fp16 where the kernels are interpreted)."""
    shape, op = request.shape, request.op
    device = torch.device("cuda" if timed else "cpu")
    dtype = torch.bfloat16 if timed else torch.float16
    prefix = min(request.prefix, context // 2) if not timed else request.prefix
    if op == "write":
        news, lengths = [batch], [batch]
    else:
        chunk = context - prefix
        news = {"decode": [1] * batch, "prefill": [chunk] * batch, "mixed": [chunk] + [1] * (batch - 1)}[op]
        lengths = [context] * batch
    width = -(-max(lengths) // shape.page_size)
    pages = width * len(lengths)
    cache = PagedCache(
        [(shape.kv_heads, shape.head_dim)],
        scheme,
        pages=pages,
        page_size=shape.page_size,
        model_dtype=dtype,
        device=device,
    )
    table = torch.randperm(pages, device=device).to(torch.int32).view(len(lengths), width)
    slots = (table[:, :, None] * shape.page_size + torch.arange(shape.page_size, device=device)).flatten(1)
    slots = slots[:, : max(lengths)].to(torch.int64)

    def rows(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device).to(dtype)

    if op != "write":
        for part in slots.flatten().split(APPEND_CHUNK):
            triton.append(cache, 0, rows(len(part), shape.kv_heads), rows(len(part), shape.kv_heads), part)
    total = sum(news)
    k, v = (rows(total if op == "write" else 0, shape.kv_heads) for _ in range(2))
    made = Batch(
        torch.tensor([0, *news], device=device).cumsum(0).to(torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        torch.cat([own[length - new : length] for own, length, new in zip(slots, lengths, news, strict=True)]),
        shape.page_size,
    )
    stored = scheme.row_bytes(shape.head_dim) * shape.kv_heads
    if op == "write":  # new keys and values in, codes and scales out
        nbytes = total * (stored + 2 * shape.kv_heads * shape.head_dim * dtype.itemsize)
    else:  # codes, scales and page table, each once
        nbytes = sum(lengths) * stored + table.nbytes
    return Work(cache, made, rows(total if op != "write" else 0, shape.query_heads), k, v, nbytes)
