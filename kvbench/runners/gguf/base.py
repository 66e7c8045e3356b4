"""What a GGUF file holds, and how one of llama.cpp's architectures, or tokenizers, is told in transformers' terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray


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


def _as_it_is(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    return weight


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures becomes a transformers model.

    name: llama.cpp's. config: the config.json, from what reads the file's metadata. weight: undoes what llama.cpp
    changed in a tensor.
    """

    name: str
    config: Callable[[Callable[..., Any]], dict[str, Any]]
    weight: Callable[[str, NDArray[np.float32], Mapping[str, Any]], NDArray[np.float32]] = _as_it_is


@dataclass(frozen=True)
class Tokenizer:
    """How one of llama.cpp's tokenizers becomes a transformers tokenizer.

    name: `tokenizer.ggml.model`, a slash, and for byte-level BPE (gpt2) its `pre`, for others the architecture.
    ends: tokens that end an answer beside those that the file names; it has room for one or two.
    """

    name: str
    build: Callable[[GGUFFile], Any]
    ends: tuple[str, ...] = ()


def common_config(get: Callable[..., Any]) -> dict[str, Any]:
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


def words(digits: str) -> Any:
    """Cuts a text into contractions, words with a sign or space before them, numbers, runs of signs, and spaces.

    digits: the pattern of a number.

    Source: llama.cpp's pre-tokenizers "llama-bpe" and "qwen2", which are those of the models' tokenizer.json.
    """
    from tokenizers import Regex, pre_tokenizers

    before = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    after = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(before + digits + after), "isolated"), to_bytes])


def byte_level(
    file: GGUFFile, cut: Any, *, normalizer: Any = None, ignore_merges: bool = False, add_bos: bool = False
) -> Any:
    """A tokenizer of byte-level BPE (gpt2) over the pieces that `cut` makes.

    ignore_merges: a piece that is a token is that token, whatever the merges say. add_bos: where the file doesn't say.
    """
    from tokenizers import Tokenizer, decoders, models

    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    if file.get("tokenizer.ggml.add_bos_token", add_bos):
        backend.post_processor = first_bos(file)
    return as_transformers(file, backend)


def first_bos(file: GGUFFile) -> Any:
    """Puts the file's bos token before a text."""
    from tokenizers import processors

    index = file.get("tokenizer.ggml.bos_token_id")
    bos = file.get("tokenizer.ggml.tokens")[index]
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


def as_transformers(file: GGUFFile, backend: Any) -> Any:
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
