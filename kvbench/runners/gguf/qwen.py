"""Qwen 2, 2.5 and 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvbench.runners.gguf.base import Architecture, GGUFFile, Tokenizer, byte_level, common_config, words


def _qwen_config(get: Callable[..., Any], kind: str, name: str) -> dict[str, Any]:
    config = common_config(get)
    return config | {
        "architectures": [name],
        "model_type": kind,
        "head_dim": int(get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10_000.0))},
    }


def _qwen2_config(get: Callable[..., Any]) -> dict[str, Any]:
    return _qwen_config(get, "qwen2", "Qwen2ForCausalLM")


def _qwen3_config(get: Callable[..., Any]) -> dict[str, Any]:
    return _qwen_config(get, "qwen3", "Qwen3ForCausalLM")


def _qwen_tokenizer(file: GGUFFile) -> Any:
    from tokenizers import normalizers

    return byte_level(file, words(r"\p{N}"), normalizer=normalizers.NFC())


QWEN2 = Architecture("qwen2", _qwen2_config)
QWEN3 = Architecture("qwen3", _qwen3_config)
# what its models on the hub end with, instructed or not; the file names one of the two
QWEN_TOKENIZER = Tokenizer("gpt2/qwen2", _qwen_tokenizer, ends=("<|im_end|>", "<|endoftext|>"))
