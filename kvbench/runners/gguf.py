"""GGUF files: read, and converted once to an ordinary model folder.

A file of a known architecture is converted in float32: a dequantized weight is scale x code + offset and fits no
16-bit type. So each compute dtype gets the weights that transformers' own GGUF loader would give it, bit for bit, at a
tenth of its time. Stored as bfloat16, the embedded model would lose the low bits of all but its norms: mean KL 5e-5
nats a token, perplexity 12.020 to 12.027 (2048 tokens of pydoc's topics, float32 compute).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.environment import cache_dir
from kvbench.runners.model_files import ModelError, file_sha256, one_error, one_line, transformers_config, write_json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray

CONVERTER = 1  # part of a converted model's revision: raise it when the same file would give other numbers or tokens
FOLDER = 2  # of a converted folder's name: raise it when an earlier conversion may be wrong in some environment
SHARD_BYTES = 2**31


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file as read. config: a config.json, empty where only transformers' own loader knows the architecture."""

    architecture: str
    config: dict[str, Any]
    reader: GGUFReader

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata under `key`."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()


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
        rules = ARCHITECTURES.get(architecture)
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


def _common_config(get: Callable[..., Any]) -> dict[str, Any]:
    """What llama.cpp calls the same in every decoder."""
    heads = int(get("attention.head_count"))
    return {
        "hidden_size": int(get("embedding_length")),
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
    }


def _llama_config(get: Callable[..., Any]) -> dict[str, Any]:
    config = _common_config(get)
    head_dim = get("attention.key_length") or get("rope.dimension_count")
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": int(head_dim or config["hidden_size"] // config["num_attention_heads"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10_000.0))},
    }


def _gemma3_config(get: Callable[..., Any]) -> dict[str, Any]:
    config = _common_config(get)
    layers = config["num_hidden_layers"]
    kinds = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(layers)]
    head_dim = int(get("attention.key_length"))
    # the 27B model alone scales its scores by a head's share of the hidden state, as llama.cpp knows too
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": int(get("attention.sliding_window")),
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 1_000_000.0))},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def _llama_weight(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of q and k: it puts the two halves of a head, which rotate together, side by side."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(config[heads], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gemma3_weight(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Gemma's norms multiply by 1 + w; llama.cpp stores 1 + w."""
    return weight - 1 if name.endswith("norm.weight") else weight


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures becomes a transformers model.

    config: the config.json, from what reads the file's metadata. weight: undoes what llama.cpp changed in a tensor.
    """

    config: Callable[[Callable[..., Any]], dict[str, Any]]
    weight: Callable[[str, NDArray[np.float32], Mapping[str, Any]], NDArray[np.float32]]


ARCHITECTURES = {
    "llama": Architecture(_llama_config, _llama_weight),
    "gemma3": Architecture(_gemma3_config, _gemma3_weight),
}


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
        weight = ARCHITECTURES[file.architecture].weight(tensor.name, weight, file.config)
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

    kind = file.get("tokenizer.ggml.model")
    adds = file.get("tokenizer.ggml.add_bos_token", False) or file.get("tokenizer.ggml.add_eos_token", False)
    if kind == "gpt2" and file.get("tokenizer.ggml.pre") == "smollm" and not adds:
        tokenizer = _smollm_tokenizer(file)
    elif kind == "llama" and file.architecture == "gemma3":
        tokenizer = _gemma_tokenizer(file)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.model_max_length = file.config["max_position_embeddings"]
    return tokenizer


def _smollm_tokenizer(file: GGUFFile) -> Any:
    """Byte-level BPE over text cut at every digit.

    Source: llama.cpp's pre-tokenizer "smollm"; the same two steps stand in the tokenizer.json of SmolLM2 on the hub.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _as_transformers(file, backend)


def _gemma_tokenizer(file: GGUFFile) -> Any:
    """BPE over text with its spaces as "▁", bytes for what is not in the vocabulary, and bos first.

    The file has no merges: every pair of pieces that joins to a piece is one, in the order of the wholes, and of one
    whole's that with the longer left piece first. Source: the merges that transformers 5.23 reads off such a file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # runs of spaces stand in the file as they are read, not as they are matched
    tokens: list[str] = [token.replace(" ", "▁") for token in file.get("tokenizer.ggml.tokens")]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if file.get("tokenizer.ggml.add_bos_token", True):
        bos = tokens[file.get("tokenizer.ggml.bos_token_id")]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return _as_transformers(file, backend)


def _as_transformers(file: GGUFFile, backend: Any) -> Any:
    """A transformers tokenizer with the file's special tokens, their roles and its chat template."""
    from gguf import TokenType
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, types, strict=True) if found == kind and token.strip(" ")]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: file.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    tokenizer = make(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in ids.items() if index is not None},
    )
    tokenizer.chat_template = file.get("tokenizer.chat_template")
    return tokenizer
