"""The kernels under a model: compiled and in CUDA graphs on a GPU, interpreted without one."""

from itertools import chain
from unittest import mock

import pytest
import torch
import transformers

from kvbench.runners import parity as parity_module
from kvbench.runners.base import GenerateRequest, ModelInfo, ScoreRequest
from kvbench.runners.parity import parity
from kvbench.runners.transformers import TransformersModel
from kvbench.runners.transformers.sampler import uniform
from kvbench.schemes import Scheme

SCHEMES = ["auto", "fp8_per_tensor", "fp8_per_token_head", "int8", "int4", "int2", "int4:int2", "int4+s4"]
LAYERS, HEAD_DIM = 2, 64


class NumberTokenizer:
    eos_token_id = 0

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def model(device):
    """A random half-precision model of three query heads a KV head, with a sliding window in its first layer."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=0,
    )
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    made = made.to(device, torch.float16)
    return TransformersModel(made, NumberTokenizer(), ModelInfo("tiny", "random", "float16", ((1, 64),) * LAYERS, 256))


def tokens(count, seed):
    return tuple(torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


REQUESTS = [
    *(ScoreRequest(tokens(21, 1) + tokens(n, 2), tokens(3, n)) for n in (1, 4)),
    *(ScoreRequest(tokens(21, 1), tokens(n, n)) for n in (1, 3)),
    ScoreRequest((3,), tokens(40, 5)),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_score_as_the_reference_does(model, scheme):
    """
    Every log-probability of prompts that share a prefix is the reference's within half precision, and far from the
    exact cache's where the reference's is.
    """
    scheme = Scheme.parse(scheme)
    reference = model.runner(scheme, attention="reference").score(REQUESTS)
    by_kernels = model.runner(scheme, attention="triton").score(REQUESTS)

    a, b = (torch.cat([score.logprobs for score in scores]) for scores in (by_kernels, reference))
    # a key on the boundary of two codes may be rounded to either side
    assert (a - b).abs().mean() < 0.01 * b.abs().mean()
    assert (a - b).abs().max() < 0.3


@pytest.mark.parametrize("scoring", ["replay", "prefill_exact"])
def test_scoring_modes_hold_through_the_kernels(model, scoring):
    """
    Replay scores as one pass does; with an exact prefill, a continuation of one token scores as the exact cache.
    """
    requests = REQUESTS if torch.cuda.is_available() or scoring != "replay" else REQUESTS[2:4]
    other = model.runner(Scheme.parse("int4"), attention="triton", scoring=scoring).score(requests)
    if scoring == "replay":
        same = zip(other, model.runner(Scheme.parse("int4"), attention="triton").score(requests), strict=True)
    else:
        exact = model.runner(Scheme.parse("auto"), attention="triton").score(REQUESTS)
        same = [
            pair for pair, r in zip(zip(other, exact, strict=True), REQUESTS, strict=True) if len(r.continuation) == 1
        ]
    for a, b in same:
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=0.05)


@pytest.mark.parametrize("scheme", ["int4", "q4_1", *(["auto"] if torch.cuda.is_available() else [])])
def test_decoded_tokens_are_the_likeliest(model, scheme):
    """
    Each greedy token, made in one batch of prompts that come and go, is the reference's likeliest within rounding.
    """
    prompts = [GenerateRequest(r.context, count) for r, count in zip(REQUESTS, (2, 9, 5, 7, 11), strict=True)]
    answers = model.runner(Scheme.parse(scheme), attention="triton").generate(prompts)
    reference = model.runner(Scheme.parse(scheme), attention="reference")
    for request, answer in zip(prompts, answers, strict=True):
        assert 0 < len(answer.tokens) <= request.max_new_tokens
        [hidden] = reference.hidden_states([request.prompt + answer.tokens])
        log_p = reference.log_probs(hidden)[len(request.prompt) - 1 : -1]
        chosen = log_p[range(len(answer.tokens)), answer.tokens]
        assert (log_p.amax(-1) - chosen).max() < 0.1
        if len(answer.tokens) < request.max_new_tokens:  # it ended by itself
            [hidden] = reference.hidden_states([request.prompt + answer.tokens])
            assert (reference.log_probs(hidden[-1:])[0].amax() - reference.log_probs(hidden[-1:])[0, 0]) < 0.1


def test_a_repetition_penalty_knows_every_token_of_a_lane(model):
    """
    Under a penalty that no logit outweighs no token of a prompt or an answer comes again, in CUDA graphs too.
    """
    graphs = torch.cuda.is_available()  # which a second call replays
    counts = (2, 12, 5, 9, 15) if graphs else (2, 6, 3, 4, 5)
    requests = [GenerateRequest(r.context[-5:], count) for r, count in zip(REQUESTS, counts, strict=True)]
    asked = [requests, requests[::-1]] if graphs else [requests]
    with mock.patch.object(model.model.generation_config, "repetition_penalty", 1e4):
        runner = model.runner(Scheme.parse("fp16"), attention="triton")
        answers = [runner.generate(own) for own in asked]

    for request, answer in zip(chain(*asked), chain(*answers), strict=True):
        assert answer.tokens
        assert len({*request.prompt, *answer.tokens}) == len(set(request.prompt)) + len(answer.tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("scheme", ["int4", "tcq2+w64s4", "q4_1:iq4_nl", "turboquant3_prod:exl3_2bit"])
def test_graphs_hold_over_calls(model, scheme):
    """
    Graphs of an earlier call, whose pages other prompts and scores have had since, give the answers of a new runner;
    those of a trellis and of others too, whose rows definitions write and the kernels read decoded.
    """
    scheme = Scheme.parse(scheme)
    requests = [GenerateRequest(r.context, 9) for r in REQUESTS]
    drawn = [GenerateRequest(r.context, 9, temperature=1.2, seed=5) for r in REQUESTS]
    expected = [model.runner(scheme, attention="triton").generate(own) for own in (requests, drawn)]
    runner = model.runner(scheme, attention="triton")
    runner.generate(requests[::-1] + drawn)
    runner.generate(drawn[::-1])
    runner.score(REQUESTS)

    assert [runner.generate(own) for own in (requests, drawn)] == expected
    assert runner.stats()["capture_seconds"] > 0


def test_answers_end_where_they_must(model):
    """
    A stop string, seen up to a block of steps late on a GPU, cuts text and tokens where it stands.
    """
    runner = model.runner(Scheme.parse("auto"), attention="triton")
    [free] = runner.generate([GenerateRequest(tokens(9, 3), 12)])
    stop = f" {free.tokens[4]}"
    first = next(n for n in range(1, 13) if stop in " ".join(map(str, free.tokens[:n])))
    [stopped] = runner.generate([GenerateRequest(tokens(9, 3), 12, stop=(stop,))])

    assert stopped.tokens == free.tokens[:first]
    assert stopped.text == free.text.split(stop)[0]


def test_sampling_depends_on_the_seed_alone(model):
    """
    Sampled answers repeat, differ by their seed, and their random numbers do not depend on how many are drawn.
    """
    runner = model.runner(Scheme.parse("auto"), attention="triton")
    requests = [GenerateRequest(tokens(9, 3), 8, temperature=1.5, seed=seed) for seed in range(3)]
    answers = runner.generate(requests)

    assert runner.generate(requests) == answers
    assert len({answer.tokens for answer in answers}) == 3
    assert torch.equal(uniform(5, 300)[:7], uniform(5, 7))


def test_an_explicit_choice_never_falls_back(model):
    """
    The kernels are refused, not replaced, for a model that computes in 32 bits.
    """
    config = model.model.config
    single = transformers.AutoModelForCausalLM.from_config(config).to(model.model.device)
    single = TransformersModel(single, model.tokenizer, model.info)
    assert single.runner(Scheme.parse("int4")).attention == "reference"
    with pytest.raises(ValueError, match=r"attention: triton can't serve this cell: .*float32"):
        single.runner(Scheme.parse("int4"), attention="triton")


def test_kernels_store_a_models_rows_as_the_definitions_do(model, monkeypatch):
    """
    For every dtype and rotation the bytes are equal in every layer; a row that differs is counted, with its layer.
    """
    found = list(parity(model, list(tokens(5, 1))))
    assert len(found) >= 18
    assert {one.rows for one in found} == {LAYERS * 2 * 5}
    assert not [one for one in found if one.wrong_rows]

    append, seen = parity_module.append, []

    def tamper(cache, layer, k, v, slots, *, impl):
        append(cache, layer, k, v, slots, impl=impl)
        seen.append(impl)
        if impl == "triton" and len(seen) > 2:  # of the first scheme, the second layer
            cache.keys[0].codes[0, 0, 3] ^= 1

    monkeypatch.setattr(parity_module, "append", tamper)
    first = next(parity(model, list(tokens(5, 1))))
    assert (first.wrong_rows, first.first_wrong_layer) == (1, 1)
