"""Models in vLLM: `worker` runs beside its model, `engine` starts and ends one, `runner` asks it. None imports vLLM."""

from kvbench.runners.vllm.runner import VllmModel, VllmRunner

__all__ = ["VllmModel", "VllmRunner"]
