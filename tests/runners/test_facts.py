"""What is known of a model without its weights."""

from __future__ import annotations

import hashlib
import json
import os
import time

import pytest
import torch
import transformers

from kvbench.runners import catalog, facts, model_files
from kvbench.runners.catalog import ModelSource
from kvbench.runners.model_files import ModelError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}


def test_an_unchanged_file_is_hashed_once(tmp_path, cache, monkeypatch):
    """A hash is remembered, until the file changes; it is right without a cache too, and of a file just written."""
    file = tmp_path / "weights"
    now = time.time_ns()
    for content in (b"xyz", b"abc"):
        file.write_bytes(content)
        os.utime(file, ns=(now, now))
        assert model_files.file_sha256(file) == hashlib.sha256(content).hexdigest()
    os.utime(file, (1e9, 1e9))
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert model_files.file_sha256(file) == digest
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *args: 1 / 0)
        assert model_files.file_sha256(file) == digest
    file.write_bytes(b"abcd")
    assert model_files.file_sha256(file) != digest
    file.write_bytes(b"abc")
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "no-folder"))

    assert model_files.file_sha256(file) == digest


def text_config(name, **options):
    """A small configuration of a transformers class."""
    options = SMALL | {"vocab_size": 64, "pad_token_id": 0, "tie_word_embeddings": False} | options
    return getattr(transformers, name)(**options)


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]} | LINEAR
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
NO_HEAD_DIM = {"head_dim": None}
CONFIGS = {
    "llama": text_config("LlamaConfig"),
    "llama without head_dim": text_config("LlamaConfig", **NO_HEAD_DIM),
    "mistral": text_config("MistralConfig", sliding_window=8),
    "qwen2": text_config("Qwen2Config"),
    "qwen3": text_config("Qwen3Config", head_dim=32),
    "gemma2": text_config("Gemma2Config", num_hidden_layers=3),
    "gemma3": text_config("Gemma3TextConfig", num_hidden_layers=7),
    "phi": text_config("PhiConfig"),
    "phi3": text_config("Phi3Config"),
    "gpt-oss": text_config("GptOssConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-next": text_config("Qwen3NextConfig", **HYBRID | EXPERTS),
    "qwen3.5": text_config("Qwen3_5TextConfig", **HYBRID),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_layers_are_what_the_model_caches(name):
    """Head counts and widths are those of the keys and values that a model of this configuration really keeps."""
    config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    kept = {
        index: (layer.keys.shape[1], layer.keys.shape[3])
        for index, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    }

    assert kept
    assert facts.cache_layers(config) == tuple(kept.values())
    assert facts.cache_layer_indices(config) == tuple(kept)
    assert facts.cache_layers(config.to_dict()) == facts.cache_layers(config)


def test_a_wrapper_of_several_parts_has_its_text_part_s_cache():
    """Of a multi-modal configuration the decoder counts, also where config.json leaves its heads to the class."""
    written = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 7}}
    plain = transformers.Gemma3TextConfig(num_hidden_layers=7)

    assert facts.cache_layers(written) == ((plain.num_key_value_heads, plain.head_dim),) * 7


def test_layers_that_share_a_cache_have_none_of_their_own():
    """The last layers of a model may read an earlier layer's keys and values."""
    config = transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=4)

    assert facts.cache_layer_indices(config) == tuple(range(6))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3.*keep no keys and values"),
        ({"model_type": "llama", **SMALL, "layer_types": ["full_attention", "telepathy"]}, "layer type 'telepathy'"),
        ({"model_type": "nobody-knows"}, "nobody-knows"),
        ({}, "configuration"),
    ],
)
def test_a_cache_of_another_kind_is_refused(config, expected):
    """Memory is not estimated for a cache that we do not know."""
    with pytest.raises(ModelError, match=expected):
        facts.cache_layers(config)


def test_parameters_are_counted_without_loading(tmp_path):
    """By the size of the weights and their dtype; unknown where they are quantized or the dtype is not said."""
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))
    source = ModelSource("some", "folder", tmp_path)

    counts = []
    for config in (
        {"dtype": "bfloat16"},
        {"torch_dtype": "float32"},
        {},
        {"dtype": "bfloat16", "quantization_config": {}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        counts.append(facts.parameters(source))

    assert counts == [1000, 500, None, None]
    assert facts.parameters(catalog.resolve("smollm2-135m-instruct")) == 134_515_008
