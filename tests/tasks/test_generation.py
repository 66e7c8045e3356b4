"""What a model's generation_config.json and stop strings do to answers, against lm-eval's own HFLM, one at a time."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken

from kvbench.runners.base import GenerateRequest, ModelInfo
from kvbench.runners.settings import PROCESSED, REFUSED, REFUSED_SAMPLED, processed, refusal
from kvbench.runners.toy import toy_tokenizer
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks.runner_lm import RunnerLM

MAX_LENGTH = 96
PROMPTS = ["Tell me", "a", "one two one two one", "#### 42 and so on"]
# settings of transformers' GenerationConfig that change no answer of one greedy sequence, or that HFLM sets itself
WITHOUT_EFFECT = {
    "do_sample", "temperature", "top_k", "top_p", "max_length", "length_penalty", "early_stopping",
    "renormalize_logits", "_from_model_config",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "use_mtp",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "compile_config", "disable_compile",
    "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "transformers_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    made = copy.deepcopy(toy_tokenizer())
    made.add_tokens(
        [AddedToken("<|im_end|>", special=True, normalized=False), AddedToken("<|said|>", normalized=False)]
    )
    return made


@pytest.fixture
def make(tokenizer, tiny_llama):
    """HFLM and our model over the same weights in float64, under these generation settings."""

    def made(**settings):
        torch.manual_seed(1)
        model = tiny_llama(tokenizer, MAX_LENGTH).double()
        model.generation_config.update(**settings)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=MAX_LENGTH)
        info = ModelInfo("tiny", "random", "float64", ((2, 8), (2, 8)), MAX_LENGTH)
        ours = TransformersModel(model, tokenizer, info).runner(Scheme.parse("auto"))
        return theirs, RunnerLM(ours)

    return made


def answers(models, until=(), tokens=16):
    options = {"until": list(until), "max_gen_toks": tokens}
    requests = [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(PROMPTS)]
    return [model.generate_until(copy.deepcopy(requests), disable_tqdm=True) for model in models]


def likely(make, count=1):
    """The tokens that the first prompt's answer begins with."""
    _, ours = make()
    [made] = ours.runner.generate([GenerateRequest(tuple(ours.tok_encode(PROMPTS[0])), 16)])
    return list(made.tokens[:count])


SETTINGS = {
    "repetition_penalty": lambda first: 1.3,
    "no_repeat_ngram_size": lambda first: 1,
    "suppress_tokens": lambda first: first,
    "begin_suppress_tokens": lambda first: first[:1],
    "bad_words_ids": lambda first: [first[:2], [first[2]]],
    "sequence_bias": lambda first: [[first[:1], -9.0]],
    "min_length": lambda first: 24,
    "min_new_tokens": lambda first: 14,
    "forced_bos_token_id": lambda first: 65,
    "forced_eos_token_id": lambda first: 66,
    "exponential_decay_length_penalty": lambda first: (2, 1.5),
    "encoder_repetition_penalty": lambda first: 2.0,
    "encoder_no_repeat_ngram_size": lambda first: 1,
    "remove_invalid_values": lambda first: True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_followed_as_by_hflm(name, make):
    """
    Each setting that changes logits gives HFLM's answers, in a batch of ours; all but two of them differ without it.
    """
    first = likely(make, 3)
    # that ends may be forbidden, the likeliest token is one
    ends = (
        {"eos_token_id": first[:1]}
        if name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
        else {}
    )

    theirs, ours = answers(make(**ends, **{name: SETTINGS[name](first)}))

    assert ours == theirs
    if name not in ("remove_invalid_values", "forced_bos_token_id"):  # of logits that are no numbers, and of no prompt
        assert ours != answers(make(**ends))[1]


def test_settings_together_are_followed_as_by_hflm(make):
    """
    Several settings apply in transformers' order.
    """
    first = likely(make, 2)
    settings = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": first, "min_new_tokens": 5}

    theirs, ours = answers(make(**settings), tokens=30)

    assert ours == theirs


def test_every_setting_is_followed_refused_or_without_effect():
    """
    What transformers' GenerationConfig knows is in one list here: a new setting fails this until it is looked at.
    """
    known = set(transformers.GenerationConfig().to_dict())

    assert known - {*PROCESSED, *REFUSED, *REFUSED_SAMPLED} <= WITHOUT_EFFECT
    assert set(SETTINGS) == set(PROCESSED)
    assert processed(transformers.GenerationConfig().to_dict()) == {}
    assert refusal(transformers.GenerationConfig().to_dict(), sampled=True) == ""


@pytest.mark.parametrize(
    ("name", "value", "sampled"), [("num_beams", 4, 0.0), ("max_new_tokens", 9, 0.0), ("min_p", 0.1, 1.0)]
)
def test_a_setting_that_is_not_followed_is_refused_by_name(name, value, sampled, make):
    """
    An answer that HFLM would give otherwise is not given: the setting is named, and only where it would matter.
    """
    runner = make(**{name: value})[1].runner
    request = GenerateRequest((65, 66), 3, temperature=sampled)

    with pytest.raises(ValueError, match=f"generation_config.json sets {name} to {value}"):
        runner.generate([request])
    if sampled:
        assert runner.generate([replace(request, temperature=0.0)])


def test_draws_follow_the_models_own_top_k(make):
    """
    Where a task leaves top_k to the model, it is that of generation_config.json: with 1 a draw is the likeliest token.
    """
    runner = make(top_k=1)[1].runner
    greedy = GenerateRequest((65, 66), 12)

    [drawn, open_] = runner.generate([replace(greedy, temperature=2.0, top_k=k, top_p=None) for k in (None, 0)])

    assert [drawn] == runner.generate([greedy])
    assert open_ != drawn


@pytest.mark.parametrize("until", [[""], ["", "e"], ["<|im_end|>"], ["\n<|im_end|>"], ["<|said|>"]], ids=repr)
def test_odd_stop_strings_stop_as_in_hflm(until, make, tokenizer):
    """
    An empty stop string ends an answer at its first token; one that is a special token's text ends it there although
    the text has it not; the token that ends answers is another.
    """
    # the model says these tokens, after the likeliest one
    said = tokenizer.encode("\n<|im_end|><|said|>", add_special_tokens=False)
    models = make()
    model = models[0].model
    chain = [*likely(make), *said, 80]
    with torch.no_grad():
        # what follows a token is decided by the token alone: its embedding is the row that the head looks for
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(zip([ord("t"), *chain], [*chain, 80], strict=False)):
            model.model.embed_tokens.weight[token, place] = 1e3
            model.lm_head.weight[following, place] += 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    theirs, ours = answers(models, until)

    assert ours == theirs
    if until[0]:
        runs = models[1].runner.generate([GenerateRequest((ord("t"),), 16, stop=tuple(until))])
        assert len(runs[0].tokens) < 16


def test_an_end_token_that_is_not_special_is_in_the_text(make, tokenizer):
    """
    HFLM leaves special tokens alone out of a text, so an end token of generation_config.json that is none stays in.
    """
    first = likely(make, 4)

    theirs, ours = answers(make(eos_token_id=[tokenizer.eos_token_id, first[3]]))

    assert ours == theirs
    assert tokenizer.decode(first[3]) in ours[0]
