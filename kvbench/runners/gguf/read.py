"""Reading a GGUF file's header."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import kvbench.runners.gguf as package
from kvbench.registry import walk
from kvbench.runners.gguf.base import Architecture, GGUFFile, Tokenizer
from kvbench.runners.model_files import ModelError, one_error


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture that is converted, by llama.cpp's name."""
    return {found.name: found for found in walk(package.__name__, package.__path__, Architecture)}


@cache
def tokenizers() -> dict[str, Tokenizer]:
    """Every tokenizer that is built here, by name."""
    return {found.name: found for found in walk(package.__name__, package.__path__, Tokenizer)}


def read_gguf(file: Path) -> GGUFFile:
    """The header of a GGUF file, its weights mapped but not read. Takes seconds, for the vocabulary.

    Raises:
        ModelError: no GGUF file, or not all of one.
    """
    from gguf import GGUFReader

    with one_error(f"{file.name} is not a whole GGUF file"):
        reader = GGUFReader(file)
        bare = GGUFFile("", {}, reader)
        architecture = str(bare.get("general.architecture"))
        rules = architectures().get(architecture)
        config = rules.config(partial(_prefixed, bare, architecture)) if rules else {}
        if rules:
            _refuse_extras(bare, architecture, file.name)
        if config:
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            ids = {key: bare.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
            ids["pad_token_id"] = bare.get("tokenizer.ggml.padding_token_id")
            config |= {key: value for key, value in ids.items() if value is not None}
            config["tie_word_embeddings"] = "output.weight" not in tensors
            config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
            config["dtype"] = "float32"
        return GGUFFile(architecture, config, reader)


def _prefixed(file: GGUFFile, architecture: str, key: str, default: Any = None) -> Any:
    return file.get(f"{architecture}.{key}", default)


def _refuse_extras(file: GGUFFile, architecture: str, name: str) -> None:
    """Nothing is left out in silence: transformers' own loader would drop what these say."""
    extras = [
        (f"{architecture}.rope.scaling.type", "none"),
        (f"{architecture}.expert_count", 0),
    ]
    for key, plain in extras:
        if (value := file.get(key, plain)) != plain:
            raise ModelError(f"{name}: {key} = {value} is not converted; use the model's original folder or hub id")
