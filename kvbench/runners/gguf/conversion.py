"""Converting a GGUF file to an ordinary model folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.environment import cache_dir
from kvbench.files import discard
from kvbench.runners.gguf.base import GGUFFile, Tokenizer
from kvbench.runners.gguf.read import architectures, read_gguf, tokenizers
from kvbench.runners.model_files import (
    ComputeDtype,
    ModelError,
    file_sha256,
    one_error,
    one_line,
    read_json,
    read_sha256,
    transformers_config,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor

CONVERTER = 1  # part of a converted model's revision: raise it when the same file would give other numbers or tokens
FOLDER = 2  # of a converted folder's name: raise it when an earlier conversion may be wrong in some environment
SHARD_BYTES = 2**30
SLICE_BYTES = 2**26
SUMS = "checksums.json"  # of a converted folder: the SHA-256 of each other file in it

logger = logging.getLogger(__name__)


def convert(
    files: Sequence[Path], stem: str, dtype: ComputeDtype = "float32", sha256: str | None = None
) -> Path | None:
    """The folder that a GGUF file was, or now is, converted to; None where only transformers' loader reads it.

    files: the file, or the slices that it is once they are joined. stem: how the folder's name begins.
    dtype: what the weights are stored in, each as casting the float32 one gives it: a model is loaded in one dtype,
    and in 16 bits takes half the disk and half the time. A float32 folder serves all.
    sha256: what the file must be.

    A conversion is written to a draft and renamed, one process at a time; what a killed one left is removed. One whose
    files are not as they were written, or that is from before there were checksums, is replaced, with a line.

    Raises:
        ModelError: another file, a broken one, or one that has more in it than its architecture.
    """
    from filelock import FileLock

    home = cache_dir() / "models"
    whole = home / f"{stem}-{(sha256 or file_sha256(*files))[:16]}-c{CONVERTER}.{FOLDER}"
    folder = whole if dtype == "float32" else whole.with_name(f"{whole.name}-{dtype}")
    for known in (folder, whole):
        if known.is_dir() and not _damage(known):
            return known
    if sha256 and (found := file_sha256(*files)) != sha256:
        raise ModelError(f"has sha256 {found[:16]}…, not {sha256[:16]}…")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the cache directory {home}, set KVBENCH_CACHE: {one_line(error)}") from error
    with one_error(f"{files[0].name} cannot be converted"), FileLock(home / f"{folder.name}.lock"):
        if folder.exists():
            if not (damage := _damage(folder)):
                return folder
            logger.warning("%s: %s; converted again", folder, damage)
        draft = home / f".draft-{folder.name}"  # of this name only under the lock: any that is there was abandoned
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            file = _joined(files, draft)
            opened = read_gguf(file)
            if not opened.config:
                return None
            _write_folder(opened, _tensor_names(opened, file.name), file, draft, dtype)
            if file.parent == draft:
                file.unlink()
            write_json(draft / SUMS, {path.name: read_sha256(path) for path in draft.iterdir()})
            discard(folder)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _damage(folder: Path) -> str:
    """Why a converted folder is not as it was written; empty where it is. What has not changed is hashed once."""
    if not (folder / SUMS).exists():
        return "it has no checksums"
    try:
        sums = read_json(folder / SUMS)
        # what begins with a dot no loader reads
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {SUMS}
        if odd := sorted(names ^ sums.keys()):
            return f"it {'has another file' if odd[0] in names else 'lacks the file'}, {odd[0]}"
        for name in sorted(names):
            if file_sha256(folder / name) != sums[name]:
                return f"{name} was changed after it was written: its checksum is another"
    except (OSError, ModelError) as error:
        return one_line(error)
    return ""


def _joined(files: Sequence[Path], draft: Path) -> Path:
    """The one file, or a file in the draft folder that the slices are joined to."""
    if len(files) == 1:
        return files[0]
    joined = draft / "joined.gguf"
    with joined.open("wb") as out:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, out, 2**20)
    return joined


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


def _write_folder(
    file: GGUFFile, names: Mapping[str, tuple[str, tuple[int, ...]]], path: Path, folder: Path, dtype: ComputeDtype
) -> None:
    """Weights, configuration and tokenizer, as transformers reads them."""
    import torch
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        shard_file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / shard_file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shard_file))
        shard.clear()

    for tensor in file.reader.tensors:
        name, expected = names[tensor.name]
        weight = _weight(tensor, file, getattr(torch, dtype))
        if tuple(weight.shape) != expected:
            raise ModelError(f"{path.name}: {tensor.name} has shape {tuple(weight.shape)}, expected {expected}")
        shard[name] = weight
        total += weight.nbytes
        if sum(part.nbytes for part in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", file.config | {"dtype": dtype})
    ends = [file.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    if rules := _rules(file):
        tokens = file.get("tokenizer.ggml.tokens")
        ends += [tokens.index(end) for end in rules.ends if end in tokens]
    generation: dict[str, Any] = {
        key: file.config[key] for key in ("bos_token_id", "pad_token_id") if key in file.config
    }
    if known := sorted({end for end in ends if end is not None}):
        generation["eos_token_id"] = known if len(known) > 1 else known[0]
    write_json(folder / "generation_config.json", generation)
    _tokenizer(file, path).save_pretrained(folder)


def _weight(tensor: ReaderTensor, file: GGUFFile, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's values in `dtype`. Dequantized in slices: all at once, a large vocabulary's take twice their size."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    weight = np.empty(tuple(reversed(tensor.shape)), np.float32)
    slices = max(1, weight.nbytes // SLICE_BYTES)
    for part, data in zip(np.array_split(weight, slices), np.array_split(tensor.data, slices), strict=True):
        part[...] = dequantize(data, tensor.tensor_type)
    weight = architectures()[file.architecture].weight(tensor.name, weight, file.config)
    return torch.from_numpy(np.ascontiguousarray(weight)).to(dtype)


def _rules(file: GGUFFile) -> Tokenizer | None:
    """How the file's tokenizer is built here; None where it is transformers' conversion."""
    kind = str(file.get("tokenizer.ggml.model"))
    if file.get("tokenizer.ggml.add_eos_token", False):
        return None
    return tokenizers().get(f"{kind}/{file.get('tokenizer.ggml.pre') if kind == 'gpt2' else file.architecture}")


def _tokenizer(file: GGUFFile, path: Path) -> Any:
    """The file's tokenizer.

    The known ones are built here: transformers' conversion is slow, and is wrong for some. It (5.23) leaves out that
    SmolLM's splits off every digit, and so cuts spaces before a number in another way than the model was trained with;
    of Gemma's transformers before 5.23 makes one that knows single characters alone.
    """
    from transformers import AutoTokenizer

    rules = _rules(file)
    tokenizer: Any = (
        rules.build(file)
        if rules
        else AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    )
    tokenizer.model_max_length = file.config["max_position_embeddings"]
    return tokenizer
