"""One vLLM engine at a time, in this process: started for a kv_cache_dtype, and ended before another one starts."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.runners.model_files import ComputeDtype, one_error

# before vLLM is imported; what a person has set stays
VARIABLES = {
    # its memory is free when this process ends, however that ends
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_CACHE_BYTES = 2**30  # at least
GPU_SHARE = 0.8  # of its memory: what an engine before left must have room beside it
WORKER = "kvbench.runners.vllm.worker.CacheWorker"


@dataclass(frozen=True)
class Kind:
    """What an engine is started for. replay: tokens are fed one by one. destroyed: its cache gives back zeros."""

    cache_dtype: str
    replay: bool = False
    destroyed: bool = False


@dataclass
class Engine:
    """A model's engine. bytes_per_token: of its cache, as allocated. attention: the names of what reads it."""

    name: str
    folder: Path
    dtype: ComputeDtype
    device: str
    longest_bytes: int  # of the model's longest sequence in 16 or 32 bits
    trusted: bool = False
    kind: Kind | None = None
    llm: Any = None
    bytes_per_token: float = 0.0
    attention: str = ""
    defaults: Any = field(default=None, repr=False)  # SamplingParams of the model's generation_config.json

    def start(self, kind: Kind) -> Any:
        """vLLM's LLM of this kind, started where another one runs.

        Raises:
            ModelError: it does not start.
        """
        if kind == self.kind:
            return self.llm
        self.end()
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
        on_cpu = self.device == "cpu"
        what = f"model '{self.name}': vLLM does not start with kv_cache_dtype {kind.cache_dtype}"
        with one_error(what), warnings.catch_warnings(action="ignore"):
            from vllm import LLM

            self.llm = LLM(
                str(self.folder),
                dtype=self.dtype,
                kv_cache_dtype=kind.cache_dtype,
                trust_remote_code=self.trusted,
                enable_prefix_caching=False,
                max_logprobs=-1,
                gpu_memory_utilization=GPU_SHARE,
                # compiling takes minutes on a CPU, and a graph that was captured would still write the cache
                enforce_eager=on_cpu or kind.destroyed,
                kv_cache_memory_bytes=max(CPU_CACHE_BYTES, self.longest_bytes * 9 // 8) if on_cpu else None,
                worker_extension_cls=WORKER,
                enable_trace_replay=kind.replay,
                use_tqdm_on_load=False,
            )
            self.defaults = self.llm.get_default_sampling_params()
            ((self.bytes_per_token, names),) = self.llm.collective_rpc("kvbench_cache")
            self.attention = " + ".join(names)
            if kind.destroyed:
                self.llm.collective_rpc("kvbench_destroy")
            self.kind = kind  # now it is that, and none where something was raised
        return self.llm

    def end(self) -> None:
        """No engine runs, and its memory is free."""
        if self.llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.collective_rpc("kvbench_release")
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.kind = self.defaults = None
        cleanup_dist_env_and_memory()
        gc.collect()

    def __del__(self) -> None:
        """Ends it with the model: the next one needs the memory."""
        with contextlib.suppress(Exception):  # at the end of the process there is nothing left to end it with
            self.end()

    @property
    def ids_scored(self) -> bool:
        """Whether it scores tokens that are named for each position of a prompt; vLLM's older model runner does not."""
        return bool(self.llm.llm_engine.vllm_config.use_v2_model_runner)
