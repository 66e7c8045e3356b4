"""Every causal language model that transformers knows, tiny and random, and what plain transformers makes of a request.

Nothing here uses kvbench: what its runner gives is held against this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 5  # of every sliding, local or chunked attention: shorter than the requests
VOCABULARY = 300
POSITIONS = 256

# what a configuration's fields are called, and how small they can be
SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group num_kv_shared_layers",
    2: "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "moe_topk encoder_layers num_encoder_layers moe_k top_k_experts num_global_key_value_heads n_groups mamba_n_groups",
    4: "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads "
    "linear_num_heads num_experts num_query_groups n_routed_experts num_local_experts moe_num_experts index_n_heads "
    "index_topk_blocks zero_expert_num laurel_rank conv_kernel linear_conv_kernel_dim",
    8: "mamba_n_heads mamba_num_heads n_mamba_heads",
    16: "head_dim swa_head_dim global_head_dim attention_head_dim attention_head_size dim_head d_head kv_channels "
    "v_head_dim swa_v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank index_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim mamba_d_state "
    "ssm_state_size state_size qk_head_dim query_pre_attn_scalar hidden_size_per_layer_input o_lora_rank "
    "gated_norm_rank mamba_dt_rank time_step_rank adapter_rank chunk_size mamba_chunk_size rotary_dim "
    "index_block_size hc_lowrank router_hidden_size",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
    "input_embedding_size output_embedding_size dim_model_base attention_hidden_size image_size ple_embed_dim",
    96: "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner n_inner "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size ffn_hidden_size "
    "expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size moe_shared_expert_intermediate_size "
    "feed_forward_size",
    128: "mamba_d_ssm",
    WINDOW: "sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size "
    "local_attention_window_len keep_window_size index_topk",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 24}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}

# the same architectures under options that change what attention sees: name -> (model type, fields)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe-window": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 1}),
    "llama-bidirectional": ("llama", {"is_causal": False}),
    "gemma3_text-bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "qwen3-dynamic": ("qwen3", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "llama-longrope": ("llama", {"rope_parameters": LONG}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 24}),
    "llama-yarn": ("llama", {"rope_parameters": {**PLAIN, "rope_type": "yarn", "factor": 4.0}}),
    "gemma3_text-dynamic": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN}, "max_position_embeddings": 24},
    ),
    "gemma3_text-longrope": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}},
    ),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "bert-decoder": ("bert", {"is_decoder": True}),
    "roberta-decoder": ("roberta", {"is_decoder": True}),
}


def names() -> list[str]:
    """The model types of transformers' causal language models, then the variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def fields(defaults: dict[str, Any]) -> dict[str, Any]:
    """What makes a configuration with these defaults tiny."""
    small = {name: SIZE_OF[name] for name, value in defaults.items() if name in SIZE_OF and isinstance(value, int)}
    # as many KV heads as query heads where there are so by default
    if defaults.get("num_attention_heads") == defaults.get("num_key_value_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "head_dim" in defaults:
        small["head_dim"] = SIZE_OF["head_dim"]
    kinds = defaults.get("layer_types")
    layers = 3
    if kinds:
        # each kind of layer, and the first again
        small["layer_types"] = [*dict.fromkeys(kinds), kinds[0]]
        layers = len(small["layer_types"])
        small["layer_types"] += [kinds[0]] * max(0, 3 - layers)
        layers = max(3, layers)
    small |= {name: layers for name in LAYERS if isinstance(defaults.get(name), int)}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(defaults.get(name), int) and defaults[name] >= VOCABULARY:
            small[name] = VOCABULARY - 1
    return small


def tiny_config(name: str) -> Any:
    """The configuration of an architecture, or of a variant, at its smallest."""
    model_type, options = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[model_type]
    try:
        defaults = kind().to_dict()
    except Exception:  # transformers' own defaults contradict each other
        defaults = {}
    small = fields(defaults) | OWN.get(model_type, {}) | options
    for part, inner in defaults.items():
        if isinstance(inner, dict) and "model_type" in inner:
            small[part] = fields(inner) | OWN.get(f"{model_type}.{part}", {}) | {"model_type": inner["model_type"]}
    return kind(**small)


# fields that follow no rule
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"d_model": 64, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 96}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": False},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, large enough in its weights that each token depends on all before it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.12)
        elif "sink" in name:
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)


@torch.inference_mode()
def log_probs(model: Any, tokens: Sequence[int]) -> Tensor:
    """[tokens, vocabulary]: the distribution after each token, by one pass without a cache."""
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
