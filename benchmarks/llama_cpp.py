"""llama.cpp's own KL divergence for its cache types beside kvbench's, from the same weights and the same tokens.

    kvbench sweep configs/llama-cpp.yaml --output RUN
    python benchmarks/llama_cpp.py RUN

Needs `pip install ik-llama-cpp-python==0.1.5`, a build of ik_llama.cpp (llama.cpp's cache types, and a rotation of
keys) for CPUs. Each pair of types runs in a process of its own, since some abort, and is held against the 16-bit cache
of the same program. It does so twice: on the weights written out in float32, which is what kvbench computes with, and
on the file's own, whose products llama.cpp takes with activations in 8 bits. Two rows say how far the program is from
itself: the 16-bit cache again, and once more without flash attention. With --alike kvbench's keys are measured once
more, with queries in 8 bits and channels in the file's order, as llama.cpp has both. Rows go to RUN/llama-cpp.json,
one after the other; those that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from kvbench.dtypes import Dtype
from kvbench.environment import describe
from kvbench.measured import read
from kvbench.runners import catalog
from kvbench.runners.load import prepare
from kvbench.runners.model_files import file_sha256
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme, Side, find_dtype
from kvbench.tasks import RunContext, of_identity, text
from kvbench.tasks.divergence import Divergence, compare, split

PACKAGE = "ik-llama-cpp-python"
INSTALL = f"pip install {PACKAGE}==0.1.5"
TYPES = {"fp16": 1, "q8_0": 8, "q5_1": 7, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}  # ggml's numbers
QUANTIZED = tuple(TYPES)[1:]
WEIGHTS = ("float32", "file")
CHUNK = 256  # tokens of a pass; their logits are kept


@dataclass(frozen=True)
class Cache:
    """How keys and values are stored. flash: attention in one operation, which quantized values need."""

    keys: str
    values: str
    hadamard: bool = False
    flash: bool = True

    @property
    def scheme(self) -> tuple[str, str]:
        """dtype and rotation, as kvbench's tables have them."""
        dtype = self.keys if self.keys == self.values else f"{self.keys}:{self.values}"
        return dtype, "hadamard:none" if self.hadamard else "none"


CACHES = (
    Cache("fp16", "fp16"),
    Cache("fp16", "fp16", flash=False),
    *(
        cache
        for name in QUANTIZED
        for cache in (
            Cache(name, name),
            Cache(name, name, hadamard=True),
            Cache(name, "fp16"),
            Cache(name, "fp16", hadamard=True),
            Cache("fp16", name),
        )
    ),
    # of a type that this build's flash attention has no code for
    Cache("q5_1", "fp16", flash=False),
    Cache("q5_1", "fp16", hadamard=True, flash=False),
)


# ---- one pair of types, in a process of its own


def logits(model: str, cache: Cache, documents: list[list[int]]) -> Iterator[np.ndarray]:
    """[n, V] float32 after the tokens of each piece of the documents, one after the other, by llama.cpp."""
    from ik_llama_cpp import _ctypes_api as llama

    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    if not loaded:
        raise ValueError(f"llama.cpp cannot read {Path(model).name}")
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))
    options = llama.llama_context_default_params()
    options.n_ctx = max(map(len, documents))
    options.n_batch = options.n_ubatch = CHUNK
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.type_k, options.type_v = TYPES[cache.keys], TYPES[cache.values]
    options.k_cache_hadamard, options.v_cache_hadamard = cache.hadamard, False
    options.flash_attn = cache.flash
    context = llama.llama_init_from_model(loaded, options)
    if not context:
        raise ValueError("llama.cpp makes no context of these types")
    for tokens in documents:
        llama.llama_kv_cache_clear(context)
        for start, piece in pieces(tokens):
            batch = llama.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := llama.llama_decode(context, batch):
                raise ValueError(f"llama_decode gives {status}")
            rows = [llama.llama_get_logits_ith(context, i) for i in range(len(piece))]
            yield np.stack([np.ctypeslib.as_array(row, (width,)) for row in rows])
            llama.llama_batch_free(batch)


def pieces(tokens: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Where each pass begins, and its tokens."""
    for start in range(0, len(tokens), CHUNK):
        yield start, tokens[start : start + CHUNK]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What kvbench's divergence has, of llama.cpp's logits, held to those that the first request leaves in a folder."""
    documents, base = request["documents"], Path(request["base"])
    places = [(d, start, piece) for d, tokens in enumerate(documents) for start, piece in pieces(tokens)]
    columns: list[list[dict[str, torch.Tensor]]] = [[] for _ in documents]
    given = logits(request["model"], Cache(**request["cache"]), documents)
    for (d, start, piece), after in zip(places, given, strict=True):
        file = base / f"{d}-{start}.npy"
        if not file.exists():
            np.save(file, after)
        # the token after the piece is what its last position predicts
        following = torch.tensor(documents[d][start : start + len(piece) + 1])
        runner: Any = SimpleNamespace(tokenizer=range(after.shape[1]), log_probs=lambda rows: rows.log_softmax(-1))
        columns[d].append(compare(runner, torch.from_numpy(np.load(file)), torch.from_numpy(after), following))
    of_document = [{name: torch.cat([c[name] for c in each]) for name in each[0]} for each in columns]
    every = {name: torch.cat([each[name] for each in of_document]) for name in of_document[0]}
    first, last = request["positions"]
    return {
        "kld": float(every["kld"].mean()),
        "kld_by_document": [float(each["kld"].mean()) for each in of_document],
        f"kld@{first}-{last}": float(torch.cat([each["kld"][first:last] for each in of_document]).mean()),
        "kld_max": float(every["kld"].max()),
        "same_top": 100 * float(every["same_top"].mean()),
        "ppl": float(every["nll"].mean().exp()),
        "ppl_baseline": float(every["nll_baseline"].mean().exp()),
    }


# ---- kvbench, with what llama.cpp's attention does otherwise


@contextmanager
def as_llama(key: Dtype, pairs: bool) -> Iterator[None]:
    """Inside, queries are rounded to blocks of 8 bits before they meet keys of this dtype.

    pairs: both have a rotary pair's two channels side by side, which a GGUF file of a Llama has and kvbench undoes, so
    that a block holds other channels.
    """
    apply, query, rounded = Side.apply, Side.query, find_dtype("q8_0")

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if pairs else x

    def stored(side: Side, x: torch.Tensor, *known: Any) -> torch.Tensor:
        return apply(side, ordered(x) if side.dtype.name == key.name else x, *known)

    def asked(side: Side, q: torch.Tensor, *known: Any) -> torch.Tensor:
        return rounded.dequantize(rounded.quantize(query(side, ordered(q), *known)))

    with mock.patch.object(Side, "apply", stored), mock.patch.object(Side, "query", asked):
        yield


def alike(task: Divergence, source: catalog.ModelSource, types: Collection[str]) -> Iterator[dict[str, Any]]:
    """A row for keys alone of each type, as they are and rotated: the divergence that kvbench gives so."""
    loaded = TransformersModel.load(source, "float32", "cpu")
    kept: dict[str, Any] = {}

    def baseline(key: str, compute: Any) -> Any:
        if key not in kept:
            kept[key] = compute(loaded.runner(Scheme.parse("fp16")))
        return kept[key]

    pairs = loaded.info.extra["model_type"] == "llama"
    # the baseline is what it is without a change
    task.run(loaded.runner(Scheme.parse("fp16")), RunContext(baseline, lambda *_: None))
    for name, rotation in product(types, ("none", "hadamard:none")):
        scheme = Scheme.parse(f"{name}:fp16", rotation)
        with as_llama(scheme.key.dtype, pairs):
            found = task.run(loaded.runner(scheme), RunContext(baseline, lambda *_: None))
        kld = next(metric.value for metric in found.metrics if metric.name == "kld")
        yield {**scheme.columns(), "pairs": pairs, "kld": kld}


# ---- all pairs


def apart(request: dict[str, Any]) -> dict[str, Any]:
    """What `measure` gives in a new process, or {"error": …} where that ends without an answer."""
    command = [sys.executable, __file__, "--measure"]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if ran.returncode == 0:
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return found
    # the last words before a debugger's: "…/iqk_flash_attn.cpp:188: Fatal error", without the folders of who built it
    lines = [line for line in ran.stderr.splitlines() if "ASSERT" in line or "rror" in line]
    return {"error": lines[0].rpartition("/")[2] if lines else f"exit status {ran.returncode}"}


def whole_file(source: catalog.ModelSource, folder: Path) -> Path:
    """The GGUF file, its slices joined where it comes in several."""
    if len(source.slices) < 2:
        assert source.path is not None
        return source.path
    file = folder / f"{source.name}.gguf"
    with file.open("wb") as joined:
        for part in source.slices:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, joined)
    return file


def in_float32(file: Path, folder: Path) -> Path:
    """The same model with each weight as the float32 that its codes stand for."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    written = folder / "float32.gguf"
    writer = GGUFWriter(written, str(fields.pop("general.architecture").contents()))
    for name, field in fields.items():
        value = 0 if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        size = 4 * math.prod(shape)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:  # one at a time, since all are more than some machines hold
        writer.write_tensor_data(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    writer.close()
    return written


def libraries() -> dict[str, str]:
    """SHA-256 of what computes, by name."""
    spec = find_spec("ik_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parents[1] / "ik_llama_cpp_python.libs"
    files = [*folder.glob("libggml*.so"), *folder.glob("libllama*.so")]
    return {file.name: file_sha256(file) for file in files}


def print_table(rows: list[dict[str, Any]], ours: dict[tuple[str, str], dict[str, float]]) -> None:
    """KLD of each pair of types: llama.cpp's on both kinds of weights, and kvbench's."""
    of = {(row["weights"], Cache(**row["cache"])): row for row in rows}
    print(f"\n{'keys, values':16}{'rotation':24}{'llama.cpp':>12}{'float32':>12}{'kvbench':>12}")
    for cache in CACHES:
        found = [of.get((weights, cache), {}) for weights in ("file", "float32")]
        shown = [row.get("error", "-")[:10] if "kld" not in row else f"{row['kld']:.5f}" for row in found]
        # the 16-bit cache without flash attention is no cache of kvbench's
        own = ours.get(cache.scheme, {}).get("kld") if cache.flash else None
        dtype, rotation = cache.scheme
        name = rotation if cache.flash else f"{rotation}, no flash"
        print(f"{dtype:16}{name:24}{shown[0]:>12}{shown[1]:>12}{'-' if own is None else f'{own:.5f}':>12}")


def main() -> None:
    """Measures what is not in the file yet, and prints the table."""
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("out/llama-cpp"), help="a run of configs/llama-cpp.yaml"
    )
    parser.add_argument("--weights", action="append", choices=WEIGHTS, help="both when not given; repeatable")
    parser.add_argument("--alike", action="store_true", help="kvbench's keys alone too, with llama.cpp's arithmetic")
    parser.add_argument("--type", action="append", choices=QUANTIZED, help="all when not given; repeatable")
    options = parser.parse_args()
    if find_spec("ik_llama_cpp") is None:
        print(f"not run: there is no llama.cpp here: {INSTALL}")
        return
    if not options.run.is_dir():
        sys.exit(f"error: no run folder {options.run}: kvbench sweep configs/llama-cpp.yaml makes one")
    cells = [cell for cell in read(options.run).cells if cell.identity["task"]["task"] == "divergence"]
    ours = {cell.scheme: cell.values for cell in cells}
    identity = cells[0].identity
    task = of_identity(identity["task"])
    assert isinstance(task, Divergence)
    source = catalog.resolve(identity["model"]["name"])

    from transformers import AutoTokenizer

    passage = text.read(None)
    if passage.sha256 != identity["task"]["text_sha256"]:
        sys.exit("error: the run is of another text: run configs/llama-cpp.yaml here, with the text that Python ships")
    tokenizer = AutoTokenizer.from_pretrained(prepare(source), local_files_only=True)
    documents = split(passage.text, tokenizer, task.context, identity["task"]["documents"])

    output = options.run / "llama-cpp.json"
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    record |= {
        "command": f"python benchmarks/llama_cpp.py {options.run.name}",
        "environment": describe(),
        "peer": {"package": PACKAGE, "version": version(PACKAGE), "sha256": libraries()},
        "model": {**identity["model"], "file_sha256": file_sha256(*(source.slices or [source.path]))},
        "task": identity["task"],
        "documents_sha256": text.sha256(" ".join(text.sha256(" ".join(map(str, tokens))) for tokens in documents)),
        "threads": torch.get_num_threads(),
        "pass_tokens": CHUNK,
    }
    rows: list[dict[str, Any]] = record.setdefault("rows", [])
    done = {(row["weights"], Cache(**row["cache"])) for row in rows}
    for weights in options.weights or WEIGHTS:
        asked = {"fp16", *(options.type or QUANTIZED)}
        left = [c for c in CACHES if (weights, c) not in done and {c.keys, c.values} <= asked]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = whole_file(source, folder)
            file = in_float32(file, folder) if weights == "float32" else file
            # the 16-bit cache first, even where its row is there: others are held to it
            for cache in dict.fromkeys((CACHES[0], *left)):
                request = {"model": os.fspath(file), "cache": asdict(cache), "documents": documents, "base": name}
                request["positions"] = identity["task"]["positions"]
                found = apart(request)
                if cache == CACHES[0]:
                    if "error" in found:
                        sys.exit(f"error: llama.cpp does not run with 16 bits here: {found['error']}")
                    found = apart(request)  # once more, in another process
                if cache in left:
                    rows.append({"weights": weights, "cache": asdict(cache), **found})
                    output.write_text(json.dumps(record, indent=1) + "\n")
                    print(weights, *cache.scheme, found.get("kld", found.get("error")), flush=True)
    if options.alike:
        there = {(row["dtype"], row["rotation"]) for row in record.setdefault("alike", [])}
        types = [name for name in options.type or QUANTIZED if (f"{name}:fp16", "none") not in there]
        for row in alike(task, source, types):
            record["alike"].append(row)
            output.write_text(json.dumps(record, indent=1) + "\n")
            print("kvbench, as llama.cpp computes:", row["dtype"], row["rotation"], row["kld"], flush=True)
    print_table(rows, ours)


if __name__ == "__main__":
    main()
