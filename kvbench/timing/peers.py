"""What 16-bit attention costs: torch's scaled_dot_product_attention, each backend by its name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvbench.timing.clock import cold_copies, time_calls
from kvbench.timing.request import Shape

BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def _attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        new, context = q.shape[2], k.shape[2]
        if new in (1, context):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=True)
        mask = causal_lower_right(new, context)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def time_peers(shape: Shape, batch: int, context: int, new: int, samples: int) -> dict[str, float]:
    """Median microseconds in bf16 by backend, of `new` queries at the end of `context` contiguous keys.

    A backend that refuses the shape is left out.
    """
    nbytes = 4 * batch * context * shape.kv_heads * shape.head_dim
    buffers = [
        tuple(
            torch.randn(batch, heads, tokens, shape.head_dim, dtype=torch.bfloat16, device="cuda")
            for heads, tokens in ((shape.query_heads, new), (shape.kv_heads, context), (shape.kv_heads, context))
        )
        for _ in range(cold_copies(nbytes))
    ]
    found = {}
    for name, backend in BACKENDS.items():
        try:
            found[name] = time_calls([partial(_attend, backend, *each) for each in buffers], samples).median
        except RuntimeError:  # torch says "No available kernel"
            continue
    return found
