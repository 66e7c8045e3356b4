"""What kernels compute of a decoder around its attention: norms, rotary positions, gates, and its logits' peaks."""

from kvbench_kernels.pointwise import GELU, GELU_TANH, SILU, gated, peaks, rms_norm, rotary

GATES = (SILU.value, GELU_TANH.value, GELU.value)

__all__ = ["GATES", "gated", "peaks", "rms_norm", "rotary"]
