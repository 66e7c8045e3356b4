"""Floating-point caches of 16 bits, and the model's own dtype: values as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Cast, Dtype, Rows


@dataclass(frozen=True)
class Float(Dtype):
    """Values cast to a floating-point type, without a scale.

    NaN and ±inf are kept; fp16 makes values beyond 65504 infinite.
    """

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        assert isinstance(self.decode, Cast)
        storage = x.dtype if self.decode.storage is None else self.decode.storage
        return Rows(x.to(storage).contiguous().view(torch.uint8), None)


auto = Float("auto", 16, Cast(None), "none", source="the model's own dtype: exact")
fp16 = Float("fp16", 16, Cast(torch.float16), "none", source="IEEE 754 binary16")
bf16 = Float("bf16", 16, Cast(torch.bfloat16), "none", source="bfloat16")
