"""What a model's generation_config.json says of how it answers, as lm-eval's HFLM follows it. Imports nothing heavy.

HFLM asks for greedy decoding, but transformers' `generate` still applies what changes the logits, such as a repetition
penalty: see `kvbench.runners.processors`. What this runner has no like of is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# a setting, and the values of it that change nothing
PROCESSED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "remove_invalid_values": (None, False),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_new_tokens": (None,),  # it overrules a task's own number in HFLM
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}
# of answers that are drawn; `top_k` and `top_p` are followed
REFUSED_SAMPLED: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}


def processed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change a model's next-token logits, by name."""
    return {name: config[name] for name, neutral in PROCESSED.items() if config.get(name) not in neutral}


def refusal(config: Mapping[str, Any], sampled: bool = False) -> str:
    """Why a model can't answer as HFLM would let it; empty where it can. sampled: some answers are drawn."""
    for name, neutral in {**REFUSED, **(REFUSED_SAMPLED if sampled else {})}.items():
        if config.get(name) not in neutral:
            return (
                f"generation_config.json sets {name} to {config[name]!r}, which lm-eval's HFLM follows and kvbench "
                "does not: take it out of the model's folder to answer without it"
            )
    return ""
