"""What is timed: a filled cache, and what reads it or is written to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.attention import Batch, triton
from kvbench.cache import PagedCache
from kvbench.cache.paged import Learned
from kvbench.schemes import Scheme
from kvbench.timing.request import KernelRequest
from kvbench.transforms import Rope, Sample

APPEND_CHUNK = 65536  # tokens written at once when a cache is filled
BIAS = 5.0  # how many times wider than the keys
LEARNED = 1024  # tokens that a scheme learns from


@dataclass
class Work:
    """A filled cache, a batch over it, and its queries, or its new keys and values.

    exact: where the scheme has a window, the same rows in 16 bits.
    """

    cache: PagedCache
    exact: PagedCache | None
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    nbytes: int


def make_work(request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool) -> Work:
    """Caches of normal numbers, pages in random order, bf16 (fp16 where the kernels are interpreted).

    Where a scheme learns, keys have a bias that is turned by their positions, as a model's are.
    """
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
    bias = BIAS * torch.randn(shape.kv_heads, shape.head_dim, dtype=torch.float64)
    learned = _learned(scheme, bias, max(lengths)) if scheme.learns else None

    def make_cache(stored: Scheme) -> PagedCache:
        return PagedCache(
            [(shape.kv_heads, shape.head_dim)],
            stored,
            pages=pages,
            page_size=shape.page_size,
            learned=learned,
            model_dtype=dtype,
            device=device,
        )

    cache = make_cache(scheme)
    exact = make_cache(scheme.exact(dtype)) if scheme.window else None
    table = torch.randperm(pages, device=device).to(torch.int32).view(len(lengths), width)
    slots = (table[:, :, None] * shape.page_size + torch.arange(shape.page_size, device=device)).flatten(1)
    slots = slots[:, : max(lengths)].to(torch.int64)

    def rows(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device).to(dtype)

    def keys(positions: Tensor) -> Tensor:
        x = rows(len(positions), shape.kv_heads)
        if not scheme.learns or not len(x):
            return x
        turned = _rope(shape.head_dim, device).turn(bias.to(device).expand(len(positions), *bias.shape), positions)
        return x + turned.to(dtype)

    if op != "write":
        at = torch.arange(max(lengths), device=device).repeat(len(lengths))
        for part, positions in zip(slots.flatten().split(APPEND_CHUNK), at.split(APPEND_CHUNK), strict=True):
            k, v = keys(positions), rows(len(part), shape.kv_heads)
            triton.append(cache, 0, k, v, part, positions, exact)
    total = sum(news)
    new = torch.arange(total if op == "write" else 0, device=device)
    k, v = keys(new), rows(len(new), shape.kv_heads)
    made = Batch(
        torch.tensor([0, *news], device=device).cumsum(0).to(torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        torch.cat([own[length - new : length] for own, length, new in zip(slots, lengths, news, strict=True)]),
        shape.page_size,
    )
    nbytes = _nbytes(request, scheme, lengths, total, dtype) + (table.nbytes if op != "write" else 0)
    return Work(cache, exact, made, rows(total if op != "write" else 0, shape.query_heads), k, v, nbytes)


def _nbytes(request: KernelRequest, scheme: Scheme, lengths: list[int], new: int, dtype: torch.dtype) -> int:
    """What is read: codes, scales and exact rows, each once; of a write also what is written."""
    shape = request.shape
    packed = int(scheme.row_bytes(shape.head_dim) * shape.kv_heads)
    exact = int(scheme.exact(dtype).row_bytes(shape.head_dim) * shape.kv_heads) if scheme.window else 0
    if request.op == "write":  # new keys and values in, codes, scales and exact rows out
        return new * (packed + exact + 2 * shape.kv_heads * shape.head_dim * dtype.itemsize)
    total = 0
    for length in lengths:
        kept = 0
        if scheme.window:
            start = int(scheme.window.starts(torch.tensor([length - 1])))
            kept = length - start + min(scheme.window.sinks, start)
        # a prompt's rows are read both ways, for its queries have windows of their own
        total += (length - kept) * packed + kept * exact if new == len(lengths) else length * (packed + exact)
    return total


def _rope(head_dim: int, device: torch.device | str = "cpu") -> Rope:
    """Frequencies as most models have them."""
    half = head_dim // 2
    return Rope(10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half))


def _learned(scheme: Scheme, bias: Tensor, longest: int) -> Learned:
    """What the scheme's transforms learn of keys with this bias."""
    rope = _rope(bias.shape[-1])
    positions = torch.arange(LEARNED)
    keys = rope.turn(bias.expand(LEARNED, *bias.shape), positions)
    keys += torch.randn(keys.shape)
    sample = Sample(keys, keys, positions, rope, longest)
    return [(scheme.key.learn(sample), scheme.value.learn(sample))]
