"""Gemma 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvbench.runners.gguf.base import Architecture, GGUFFile, Tokenizer, as_transformers, common_config, first_bos

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _gemma3_config(get: Callable[..., Any]) -> dict[str, Any]:
    config = common_config(get)
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


def _gemma3_weight(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Gemma's norms multiply by 1 + w; llama.cpp stores 1 + w."""
    return weight - 1 if name.endswith("norm.weight") else weight


def _gemma_tokenizer(file: GGUFFile) -> Any:
    """BPE over text with its spaces as "▁", bytes for what is not in the vocabulary, and bos first.

    The file has no merges: every pair of pieces that joins to a piece is one, in the order of the wholes, and of one
    whole's that with the longer left piece first. Source: the merges that transformers 5.23 reads off such a file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

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
        backend.post_processor = first_bos(file)
    return as_transformers(file, backend)


GEMMA3 = Architecture("gemma3", _gemma3_config, _gemma3_weight)
GEMMA3_TOKENIZER = Tokenizer("llama/gemma3", _gemma_tokenizer)
