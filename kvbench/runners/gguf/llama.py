"""Llama, and the models of its shape: SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvbench.runners.gguf.base import Architecture, GGUFFile, Tokenizer, byte_level, common_config, words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _llama_config(get: Callable[..., Any]) -> dict[str, Any]:
    config = common_config(get)
    head_dim = get("attention.key_length") or get("rope.dimension_count")
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": int(head_dim or config["hidden_size"] // config["num_attention_heads"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10_000.0))},
    }


def _llama_weight(name: str, weight: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of q and k: it puts the two halves of a head, which rotate together, side by side."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(config[heads], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _smollm_tokenizer(file: GGUFFile) -> Any:
    """Byte-level BPE over text cut at every digit.

    Source: llama.cpp's pre-tokenizer "smollm"; the same two steps stand in the tokenizer.json of SmolLM2 on the hub.
    """
    from tokenizers import pre_tokenizers

    by_digit = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(file, pre_tokenizers.Sequence(by_digit))


def _llama3_tokenizer(file: GGUFFile) -> Any:
    return byte_level(file, words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)


LLAMA = Architecture("llama", _llama_config, _llama_weight)
SMOLLM = Tokenizer("gpt2/smollm", _smollm_tokenizer)
LLAMA3_TOKENIZER = Tokenizer("gpt2/llama-bpe", _llama3_tokenizer, ends=("<|end_of_text|>", "<|eot_id|>"))
