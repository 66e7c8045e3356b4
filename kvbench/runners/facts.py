"""What is known of a model without its weights: the shape of its KV cache, its longest sequence, its revision.

Imports neither torch nor transformers where a configuration says all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.runners.catalog import EMBEDDED, ModelSource, hub_models, resolve, weights_size
from kvbench.runners.gguf import CONVERTER, read_gguf
from kvbench.runners.model_files import (
    Layers,
    ModelError,
    RefusedError,
    file_sha256,
    one_error,
    read_json,
    transformers_config,
)
from kvbench.runners.settings import PROCESSED, REFUSED

# what a model's numbers depend on, in a folder
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# layer types of transformers' configurations; the others (linear attention, convolutions) keep a state, not a KV cache
KV_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
STATE_LAYER_TYPES = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# model types whose config.json can be read as it is; a missing head_dim is hidden_size / heads, as in their classes
NO_INTERFACE = (
    "models of type '{}' compute attention without transformers' attention interface, where this runner stands: their "
    "cache would never be read"
)
PLAIN_TYPES = {"llama", "mistral", "qwen2", "qwen3", "phi3"}


def cache_layers(config: Any) -> Layers:
    """(KV heads, head_dim) of each layer that has a KV cache, in order.

    config: a config.json as a dict, or a transformers configuration. Of a multi-modal model, its text part. A dict of
    a type that leaves facts to transformers' defaults is read through transformers, which is slow to import.

    Raises:
        ModelError: a cache that is no plain list of keys and values, or an unknown kind of layer.
    """
    text = text_config(config)
    name = value_of(text, "model_type")
    indices = cache_layer_indices(text)
    # multi-head latent attention; and layers that differ in head_dim
    if any(value_of(text, key) for key in ("kv_lora_rank", "global_head_dim")):
        raise RefusedError(f"models of type '{name}' keep no keys and values of one shape per layer")
    heads = value_of(text, "num_attention_heads")
    if not indices or not isinstance(heads, int):
        raise RefusedError(f"models of type '{name}' have no layer that keeps keys and values")
    head_dim = int(value_of(text, "head_dim") or value_of(text, "hidden_size") // heads)
    if (value_dim := value_of(text, "v_head_dim") or head_dim) != head_dim:
        raise RefusedError(
            f"models of type '{name}' have values of {value_dim} beside keys of {head_dim}: a page keeps one size"
        )
    return ((int(value_of(text, "num_key_value_heads") or heads), head_dim),) * len(indices)


def cache_layer_indices(config: Any) -> tuple[int, ...]:
    """The decoder layers that have a KV cache, in order: all, but for a hybrid only those with attention."""
    text = text_config(config)
    name, layers = value_of(text, "model_type"), value_of(text, "num_hidden_layers")
    types: Sequence[str] = value_of(text, "layer_types") or ["attention"] * (layers if isinstance(layers, int) else 0)
    if unknown := sorted(set(types) - KV_LAYER_TYPES - STATE_LAYER_TYPES):
        raise RefusedError(f"unknown layer type '{unknown[0]}' in a model of type '{name}'")
    # the last layers of some models read the cache of an earlier one
    own = len(types) - int(value_of(text, "num_kv_shared_layers") or 0)
    return tuple(index for index, kind in enumerate(types[:own]) if kind in KV_LAYER_TYPES)


def refuse(config: Any, *, known: bool = True) -> None:
    """Raises RefusedError for a model that this runner can't be right about, as far as its configuration says.

    config: the whole model's, a config.json as a dict, or a transformers configuration. known: its class is one of
    transformers' own.
    """
    name = value_of(config, "model_type")
    if value_of(config, "is_encoder_decoder"):
        raise RefusedError(f"models of type '{name}' are encoders with a decoder: use a decoder alone")
    parts = [config, value_of(config, "text_config") or {}]
    if any(value_of(part, "is_causal") is False or value_of(part, "use_bidirectional_attention") for part in parts):
        raise RefusedError(f"this model of type '{name}' reads tokens that follow: it is no decoder")
    if isinstance(config, Mapping):
        if _is_plain(config):
            return
        config = transformers_config(config)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    if value_of(text, "num_kv_shared_layers") or "chunked_attention" in (value_of(text, "layer_types") or ()):
        raise RefusedError(
            f"models of type '{name}' have layers that share a cache or attend in chunks: this runner has neither; "
            f"use a model of full, sliding or linear attention"
        )
    if not known:
        return
    # a configuration's class that has no such model raises KeyError; one whose code lacks a package, ImportError
    with one_error(f"transformers has no causal language model of type '{name}' here"):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not all(one._can_set_attn_implementation() for one in (kind if isinstance(kind, tuple) else (kind,))):
        raise RefusedError(NO_INTERFACE.format(name))


def shape(source: ModelSource) -> tuple[Layers, int]:
    """(cache_layers, longest sequence) of a model, from its configuration alone; of an embedded one, even if missing.

    Raises:
        ModelError: a hub model that isn't on this machine, or a configuration that can't be read.
    """
    if source.kind == "embedded":
        return EMBEDDED[source.name].layers, EMBEDDED[source.name].max_length
    if source.path is None:
        raise ModelError(f"model '{source.name}': {source.missing}")
    config: Any
    with one_error(f"model '{source.name}': its configuration cannot be read"):
        if source.kind == "gguf":
            config = read_gguf(source.path).config
            if not config:
                config = transformers_config(source.path.parent, gguf_file=source.path.name)
        elif source.trusted and source.kind in ("folder", "hub"):
            config = transformers_config(source.path, trust_remote_code=True)
        else:
            config = read_json(source.path if source.kind == "shape" else source.path / "config.json")
        refuse(config, known=not source.trusted)
        text = text_config(config)
        return cache_layers(text), max_length(text)


def text_config(config: Any) -> Any:
    """The decoder's part, as a dict where config.json says all we read, else as a transformers configuration."""
    if not isinstance(config, Mapping):
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return config if _is_plain(config) else transformers_config(config).get_text_config(decoder=True)


def _is_plain(config: Mapping[str, Any]) -> bool:
    """A config.json that says all we read, of a type whose attention is known."""
    needed = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    if config.get("model_type") in PLAIN_TYPES and all(config.get(key) for key in needed):
        return True
    gemma = config.get("model_type") == "gemma3_text"
    return bool(gemma and config.get("head_dim") and config.get("layer_types"))


def value_of(config: Any, key: str) -> Any:
    """A configuration's value, None where it has none."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def max_length(config: Any, tokenizer: Any = None) -> int:
    """The model's positions, or fewer where the tokenizer says so."""
    lengths = [value_of(text_config(config), "max_position_embeddings"), getattr(tokenizer, "model_max_length", None)]
    # a tokenizer that doesn't know says 1e30
    known = [int(length) for length in lengths if length and length < 1e9]
    if not known:
        raise ModelError("neither the model's configuration nor its tokenizer says how long a sequence may be")
    return min(known)


def key_bias(source: ModelSource) -> bool | None:
    """Whether the projection that makes keys has a bias; None where the model's configuration does not say."""
    config: Any = None
    if source.kind == "embedded":
        return EMBEDDED[source.name].key_bias
    if source.path is not None and source.path.exists():
        if source.kind == "gguf":
            config = read_gguf(source.path).config
        else:
            config = read_json(source.path if source.kind == "shape" else source.path / "config.json")
    config = value_of(config or {}, "text_config") or config or {}
    kind = str(value_of(config, "model_type"))
    if kind.startswith("qwen2"):  # always, and no key of the configuration says so
        return True
    said = [value_of(config, flag) for flag in ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")]
    known = [bool(flag) for flag in said if flag is not None]
    return known[0] if known else False if kind in PLAIN_TYPES else None


def revision(source: ModelSource) -> str:
    """What the model's numbers depend on: the hub's commit, else a hash of weights, configuration and tokenizer.

    The hash of a file that has not changed is remembered in the cache directory.

    Raises:
        ModelError: the model isn't on this machine.
    """
    if source.missing or source.path is None:
        raise ModelError(f"model '{source.name}': {source.missing}")
    if source.kind == "hub":
        return source.path.name
    if source.kind == "folder":
        patterns = (*MODEL_FILES, "*.py") if source.trusted else MODEL_FILES
        files = sorted({file for pattern in patterns for file in source.path.glob(pattern)})
        lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
        return f"sha256-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    if source.kind == "shape":
        # drawn layer by layer, they are others than drawn in one go
        return f"random-{file_sha256(source.path)[:16]}{'-by-layer' if source.spread else ''}"
    # the file decides; an embedded model's is the pinned one, or it isn't loaded
    digest = EMBEDDED[source.name].sha256 if source.kind == "embedded" else file_sha256(source.path)
    return f"gguf-{digest[:16]}-c{CONVERTER}"


def has_chat_template(source: ModelSource) -> bool | None:
    """Whether its tokenizer makes a prompt of a conversation; None where only the model itself could say."""
    if source.kind == "embedded":
        return EMBEDDED[source.name].chat_template
    if source.kind == "shape":
        return False
    if source.path is None or not source.path.exists():
        return None
    if source.path.is_file():
        return bool(read_gguf(source.path).get("tokenizer.chat_template"))
    if any(source.path.glob("chat_template*.j*")) or (source.path / "additional_chat_templates").is_dir():
        return True
    file = source.path / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def parameters(source: ModelSource) -> int | None:
    """How many weights it has, by the size of its files; None where these are no plain numbers of one dtype.

    Of a shape those that would be drawn, which takes seconds of imports the first time.

    Raises:
        ModelError: a shape of which transformers can make no model.
    """
    if source.kind == "embedded":
        return EMBEDDED[source.name].parameters
    if source.kind == "shape":
        import torch

        from kvbench.runners.placement import skeleton

        return sum(int(weight.numel()) for weight in skeleton(source, torch.bfloat16).parameters())
    if source.kind not in ("folder", "hub") or source.path is None or not source.path.is_dir():
        return None
    config = read_json(source.path / "config.json")
    width = WEIGHT_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
    size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    return size // width if width and size and "quantization_config" not in config else None


def quantization(source: ModelSource) -> str:
    """How its files hold quantized weights, by transformers' name for it; empty where they are plain numbers."""
    if source.kind not in ("folder", "hub") or source.path is None:
        return ""
    config = read_json(source.path / "config.json")
    held = config.get("quantization_config") or config.get("compression_config") or {}
    return str(held.get("quant_method", "quantized")) if held else ""


def generation_settings(source: ModelSource) -> dict[str, Any]:
    """What its generation_config.json sets that changes an answer, or can't be followed.

    A GGUF file has none: transformers reads its end tokens alone, and none of its metadata on sampling.
    """
    file = source.path / "generation_config.json" if source.kind in ("folder", "hub") and source.path else None
    if file is None or not file.is_file():
        return {}
    config = read_json(file)
    neutral = {**PROCESSED, **REFUSED}
    return {name: config[name] for name in sorted(config) if name in neutral and config[name] not in neutral[name]}


def list_models() -> list[dict[str, Any]]:
    """A row a model that this machine knows by name: the embedded ones, and the hub's that are in its cache.

    parameters, license: None where only the weights or the hub could say. kv_bytes_per_token: at 16 bits a value.
    """
    rows = []
    for model in EMBEDDED.values():
        found = resolve(model.name)
        row = {"name": model.name, "available": found.available, "license": model.license, "size_bytes": model.size}
        row |= {"source": model.source, "parameters": model.parameters}
        rows.append(row | _shape_row(model.layers, model.max_length) | {"missing": found.missing})
    for found in hub_models():
        row = {"name": found.name, "available": True, "license": None, "size_bytes": weights_size(found)}
        row |= {"source": "hub cache", "parameters": None}
        try:
            row |= _shape_row(*shape(found))
        except ModelError:
            continue  # no decoder with a KV cache
        rows.append(row | {"missing": ""})
    return rows


def _shape_row(layers: Layers, max_length: int) -> dict[str, Any]:
    kinds = sorted(set(layers), key=layers.index)
    text = " + ".join(f"{layers.count(kind)} × {kind[0]} × {kind[1]}" for kind in kinds)
    return {
        "layers_kv_heads_head_dim": text,
        "kv_bytes_per_token": sum(2 * 2 * heads * head_dim for heads, head_dim in layers),
        "max_length": max_length,
    }
