"""Converting a GGUF file to an ordinary model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.environment import cache_dir
from kvbench.runners.gguf.base import GGUFFile
from kvbench.runners.gguf.read import architectures, read_gguf, tokenizers
from kvbench.runners.model_files import ModelError, file_sha256, one_error, one_line, transformers_config, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONVERTER = 1  # part of a converted model's revision: raise it when the same file would give other numbers or tokens
FOLDER = 2  # of a converted folder's name: raise it when an earlier conversion may be wrong in some environment
SHARD_BYTES = 2**31


def convert(file: Path) -> Path | None:
    """The folder that this GGUF file was, or now is, converted to; None where only transformers' loader reads it.

    A conversion is written to a draft and renamed, one process at a time; what a killed one left is removed.
    """
    from filelock import FileLock

    home = cache_dir() / "models"
    folder = home / f"{file.stem}-{file_sha256(file)[:16]}-c{CONVERTER}.{FOLDER}"
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the cache directory {home}, set KVBENCH_CACHE: {one_line(error)}") from error
    with one_error(f"{file.name} cannot be converted"), FileLock(home / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        opened = read_gguf(file)
        if not opened.config:
            return None
        names = _tensor_names(opened, file.name)
        draft = home / f".draft-{folder.name}"  # of this name only under the lock: any that is there was abandoned
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            _write_folder(opened, names, file, draft)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _tensor_names(file: GGUFFile, file_name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """From the file's tensor names to the model's, with their shapes. Both have the same, or it is a ModelError."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers_config(file.config))
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(arch, file.config["num_hidden_layers"])
    names = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and file.config["tie_word_embeddings"]:
            continue
        names[str(table.get_name(name, try_suffixes=(".weight", ".bias")))] = name, tuple(tensor.shape)
    found = {tensor.name for tensor in file.reader.tensors}
    if odd := sorted(found ^ set(names)):
        what = "has a tensor {} that its architecture has not" if odd[0] in found else "lacks the tensor {}"
        raise ModelError(f"{file_name} {what.format(odd[0])}; use the model's original folder or hub id")
    return names


def _write_folder(file: GGUFFile, names: Mapping[str, tuple[str, tuple[int, ...]]], path: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer, as transformers reads them."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    shard: dict[str, NDArray[np.float32]] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        shard_file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / shard_file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shard_file))
        shard.clear()

    for tensor in file.reader.tensors:
        name, expected = names[tensor.name]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        weight = architectures()[file.architecture].weight(tensor.name, weight, file.config)
        if weight.shape != expected:
            raise ModelError(f"{path.name}: {tensor.name} has shape {weight.shape}, expected {expected}")
        shard[name] = np.ascontiguousarray(weight)
        total += weight.nbytes
        if sum(part.nbytes for part in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", file.config)
    ends = [file.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    generation: dict[str, Any] = {
        key: file.config[key] for key in ("bos_token_id", "pad_token_id") if key in file.config
    }
    if known := sorted({end for end in ends if end is not None}):
        generation["eos_token_id"] = known if len(known) > 1 else known[0]
    write_json(folder / "generation_config.json", generation)
    _tokenizer(file, path).save_pretrained(folder)


def _tokenizer(file: GGUFFile, path: Path) -> Any:
    """The file's tokenizer.

    Two are built here. SmolLM's, since transformers (5.23) leaves out that it splits off every digit, and so cuts
    spaces before a number in another way than the model was trained with; and Gemma's, of which transformers before
    5.23 makes one that knows single characters alone. Others are transformers' conversion.
    """
    from transformers import AutoTokenizer

    kind = str(file.get("tokenizer.ggml.model"))
    adds = file.get("tokenizer.ggml.add_bos_token", False) or file.get("tokenizer.ggml.add_eos_token", False)
    ours = tokenizers().get(f"{kind}/{file.get('tokenizer.ggml.pre') if kind == 'gpt2' else file.architecture}")
    if ours and not (kind == "gpt2" and adds):
        tokenizer = ours.build(file)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.model_max_length = file.config["max_position_embeddings"]
    return tokenizer
