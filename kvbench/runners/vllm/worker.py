"""What is done in vLLM's worker, beside its model: vLLM mixes this class into it (`worker_extension_cls`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class CacheWorker:
    """A worker that also says what its cache is, zeroes it for good, and lets its memory go."""

    def kvbench_cache(self) -> tuple[float, list[str]]:
        """Bytes of one token over all layers, as allocated, and the names of what reads them."""
        layers = list(self._layers())
        # its blocks are of as many tokens in every layer
        tokens = self.cache_config.num_gpu_blocks * self.cache_config.block_size  # type: ignore[attr-defined]
        storages = {one.data_ptr(): one.nbytes() for layer in layers for one in [layer.kv_cache.untyped_storage()]}
        return sum(storages.values()) / tokens, sorted({layer.attn_backend.get_name() for layer in layers})

    def kvbench_destroy(self) -> None:
        """Nothing is written to the cache any more, and all that it gives back is zero.

        Raises:
            ValueError: a layer's attention writes the cache itself.
        """
        for layer in self._layers():
            if layer.attn_backend.forward_includes_kv_cache_update:
                raise ValueError(
                    f"vLLM's {layer.attn_backend.get_name()} writes its cache while it reads it, so there is no canary"
                )
            layer.impl.do_kv_cache_update = _nothing
            layer.kv_cache.zero_()

    def kvbench_release(self) -> None:
        """The memory of cache and weights is free, whoever still holds the tensors."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        # not of buffers: vLLM keeps rotary tables for the next engine
        for tensor in [*(layer.kv_cache for layer in self._layers()), *model.parameters()]:
            tensor.untyped_storage().resize_(0)

    def _layers(self) -> Iterator[Any]:
        """The attention layers that have a cache."""
        config = self.vllm_config.compilation_config  # type: ignore[attr-defined]
        for layer in config.static_forward_context.values():
            if hasattr(layer, "impl") and getattr(layer, "kv_cache", None) is not None:
                yield layer


def _nothing(*_: Any, **__: Any) -> None:
    """Takes the place of writing to the cache."""
