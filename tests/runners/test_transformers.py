"""Transformers models through the paged cache, against the same models through transformers' own attention."""

import gc
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers

from kvbench.cache import OutOfPages
from kvbench.dtypes import all_dtypes
from kvbench.runners.base import GenerateRequest, ModelInfo, ScoreRequest, ScoreRequests
from kvbench.runners.transformers import Limits, TransformersModel
from kvbench.runners.transformers.decode import DecodeBatch
from kvbench.runners.transformers.forward import Forward
from kvbench.runners.transformers.schedule import Scheduler
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

ROWS = [
    name
    for name, dtype in all_dtypes().items()
    if not (dtype.page_tokens or dtype.learns) and 16 % dtype.head_dim_multiple == 0
]
# each dtype under its own rotation, and each rotation
SCHEMES = [*map(Scheme.parse, ROWS), *(Scheme.parse("int4", rotation) for rotation in all_rotations())]
SCHEMES.append(Scheme.parse("int4:int2"))
IDS = [f"{s.dtype_name}-{s.rotation_name}" for s in SCHEMES]

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 8.0,
    "original_max_position_embeddings": 45,  # between the lengths of the requests below
}
# every sliding window is shorter than the prompts below
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, sliding_window=5, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, sliding_window=5, query_pre_attn_scalar=16),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "phi3": lambda: transformers.Phi3Config(**COMMON, sliding_window=6),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **COMMON, rope_parameters=LONGROPE, original_max_position_embeddings=45
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**COMMON, **LINEAR),
}


class NumberTokenizer:
    """Token 7 is the text "7"."""

    eos_token_id = 0

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


def tiny(name, dtype=torch.float32):
    """A random model of this architecture, large enough in its weights that tokens depend on their context."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            torch.nn.init.normal_(parameter)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = tuple((2, 16) for kind in kinds if kind != "linear_attention")
    info = ModelInfo(name, "random", str(dtype).removeprefix("torch."), layers, 256)
    return TransformersModel(model, NumberTokenizer(), info)


@pytest.fixture(scope="module")
def llama64():
    return tiny("llama", torch.float64)


def tokens(count, seed):
    """Random token ids, none of them the end token."""
    return tuple(torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def score_requests():
    """Choices of one question, a common prefix of 20 tokens, one token of context, a long context, one twice."""
    prefix = tokens(20, 1)
    contexts = [prefix + tokens(count, count) for count in (1, 4, 9, 30)]
    requests = [ScoreRequest(context, tokens(3, 50 + i)) for i, context in enumerate(contexts)]
    requests += [ScoreRequest(contexts[0], tokens(length, 60 + length)) for length in (1, 4, 12)]
    return [*requests, ScoreRequest((3,), (4,)), requests[0]]


def expected_scores(model, requests):
    """Log-probabilities and greediness by transformers' own eager attention, a request at a time."""
    scores = []
    for request in requests:
        with torch.no_grad():
            logits = model(torch.tensor([(request.context + request.continuation)[:-1]])).logits[0]
        rows = logits.double().log_softmax(-1)[len(request.context) - 1 :]
        target = torch.tensor(request.continuation)
        scores.append((rows.gather(1, target[:, None])[:, 0], bool((rows.argmax(-1) == target).all())))
    return scores


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_cache_scores_as_the_model_itself(name):
    """
    With `auto` every log-probability is that of the unpatched model, for every kind of attention layer.
    """
    loaded = tiny(name)
    requests = score_requests()
    scores = loaded.runner(Scheme.parse("auto"), page_size=4).score(requests)

    for score, (logprobs, greedy) in zip(scores, expected_scores(loaded.model, requests), strict=True):
        torch.testing.assert_close(score.logprobs, logprobs.float(), rtol=0, atol=1e-4)
        assert score.greedy == greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_cache_generates_as_the_model_itself(name):
    """
    Greedy tokens are those of transformers' generate, though here all requests run together.
    """
    loaded = tiny(name)
    prompts = [request.context for request in score_requests()]
    answers = loaded.runner(Scheme.parse("auto"), page_size=4).generate([GenerateRequest(p, 12) for p in prompts])

    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        expected = out[0, len(prompt) :].tolist()
        assert list(answer.tokens) == (expected[: expected.index(0)] if 0 in expected else expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_one_pass_is_replay(llama64, scheme):
    """
    Scoring in one pass = feeding token by token through the cache, for every dtype × rotation.

    In float64, for in float32 a key that lies on the boundary of two codes may be rounded to either side by the
    order of a matrix product's sums, which is another for one token than for many.
    """
    requests = score_requests()
    fused = llama64.runner(scheme, page_size=4).score(requests)
    replay = llama64.runner(scheme, page_size=4, scoring="replay").score(requests)

    for a, b in zip(fused, replay, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_batches_and_page_sizes_change_nothing(llama64, scheme):
    """
    Many requests together, with shared prefixes, = each alone; another page size gives the same.
    """
    requests = score_requests()
    together = llama64.runner(scheme, page_size=4).score(requests)
    others = {page_size: llama64.runner(scheme, page_size=page_size).score(requests) for page_size in (1, 64)}
    others["alone"] = [llama64.runner(scheme, page_size=16).score([request])[0] for request in requests[:5]]
    for scores in others.values():
        for a, b in zip(scores, together, strict=False):
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.key.dtype.code_bits < 16], ids=str)
def test_quantized_caches_are_read(llama64, scheme):
    """
    Every quantized cache changes the scores of its prompt: nothing attends to keys and values that it did not store.
    """
    requests = score_requests()
    exact = llama64.runner(Scheme.parse("auto"), page_size=4).score(requests)
    quantized = llama64.runner(scheme, page_size=4).score(requests)
    change = [(a.logprobs - b.logprobs).abs().max() for a, b in zip(exact, quantized, strict=True)]

    assert min(change) > 1e-5


@pytest.mark.parametrize(
    "dtype", [name for name, one in all_dtypes().items() if not one.learns and 16 % one.head_dim_multiple == 0]
)
def test_a_destroyed_cache_wrecks_every_score(llama64, dtype):
    """
    With all codes zero, the scores are as far from the exact ones as those after an unrelated context are.
    """
    requests = score_requests()
    exact = llama64.runner(Scheme.parse("auto")).score(requests)
    destroyed = llama64.runner(Scheme.parse(dtype), destroyed=True).score(requests)
    unrelated = [
        ScoreRequest(tokens(len(r.context) - 1, 90 + i) + r.context[-1:], r.continuation)
        for i, r in enumerate(requests)
    ]
    other = llama64.runner(Scheme.parse("auto")).score(unrelated)

    def change(scores):
        return torch.cat([a.logprobs - b.logprobs for a, b in zip(exact, scores, strict=True)]).abs().mean()

    assert change(destroyed) > 0.7 * change(other)


def test_hidden_states_give_the_next_token_distributions():
    """
    log_probs(hidden_states(document)) are the model's own distributions, softcapped logits included.
    """
    loaded = tiny("gemma2")
    runner = loaded.runner(Scheme.parse("auto"))
    documents = [tokens(40, 1), tokens(7, 2), tokens(40, 1)]
    for document, hidden in zip(documents, runner.hidden_states(documents), strict=True):
        with torch.no_grad():
            expected = loaded.model(torch.tensor([document])).logits[0].log_softmax(-1)
        torch.testing.assert_close(runner.log_probs(hidden), expected, rtol=0, atol=1e-4)


def test_documents_longer_than_a_pass_are_cut(monkeypatch):
    """
    A small token budget for a pass changes no score and no answer.
    """
    loaded = tiny("gemma3")
    requests = score_requests()
    prompts = [GenerateRequest(request.context, 6) for request in requests]
    runner = loaded.runner(Scheme.parse("auto"), page_size=4)
    scores, answers = runner.score(requests), runner.generate(prompts)

    monkeypatch.setattr("kvbench.runners.transformers.memory.CPU_LIMITS", Limits(8, 3, 2**24, 0.0))
    runner = loaded.runner(Scheme.parse("auto"), page_size=4)
    for a, b in zip(scores, runner.score(requests), strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
    assert runner.generate(prompts) == answers


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("scoring", ["fused", "prefill_exact"])
def test_requests_asked_again_are_scored_without_a_plan(kind, scoring, monkeypatch):
    """
    Other schemes' runners score the same requests in the passes of the first, to the bit as if asked for the first
    time; one of other limits, or whose rows lie in rings, plans its own.
    """
    if (kind, scoring) == ("qwen3_5", "prefill_exact"):
        pytest.skip("it runs one sequence at a time")
    loaded, requests = tiny(kind), score_requests()

    def runner(text, **more):
        return loaded.runner(Scheme.parse(text), page_size=4, scoring=scoring, **more)

    def logprobs(one, asked):
        return torch.cat([score.logprobs for score in one.score(asked)])

    expected = {text: logprobs(runner(text), requests) for text in ("auto", "int8", "int4+s4")}
    asked = ScoreRequests.of(requests)
    generating = runner("auto")
    generating.generate([GenerateRequest(request.context, 3) for request in requests])
    assert torch.equal(logprobs(generating, asked), expected["auto"])  # in a larger pool
    assert torch.equal(logprobs(runner("auto"), asked), expected["auto"])
    planned = []
    take = Scheduler.take
    monkeypatch.setattr(Scheduler, "take", lambda *given, **more: planned.append(1) or take(*given, **more))

    for text in ("int8", "auto"):
        assert torch.equal(logprobs(runner(text), asked), expected[text])
    assert not planned
    if kind == "gemma3":
        assert torch.equal(logprobs(runner("int4+s4"), asked), expected["int4+s4"])
        assert planned
    planned.clear()
    monkeypatch.setattr("kvbench.runners.transformers.memory.CPU_LIMITS", Limits(64, 3, 2**24, 0.0))
    torch.testing.assert_close(logprobs(runner("int8"), asked), expected["int8"], rtol=0, atol=0.01)
    assert planned


def test_answers_end_at_a_stop_string():
    """
    The text ends before the first stop string, and generation soon after it.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"))
    prompt = tokens(9, 3)
    [free] = runner.generate([GenerateRequest(prompt, 20)])
    stop = f" {free.tokens[5]}"
    [stopped] = runner.generate([GenerateRequest(prompt, 20, stop=(stop,))])

    assert stopped.text == free.text.split(stop)[0]
    assert len(stopped.tokens) <= 6 < len(free.tokens)


def test_sampling_depends_on_the_seed_alone():
    """
    A sampled answer is the same alone and in a batch, another with another seed; top_k=1 is greedy.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"))
    requests = [GenerateRequest(tokens(9, 3), 12, temperature=1.5, seed=seed) for seed in range(6)]
    together = runner.generate(requests)

    assert [runner.generate([request])[0] for request in requests] == together
    assert len({answer.tokens for answer in together}) == 6
    greedy = GenerateRequest(tokens(9, 3), 12)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}):
        sampled = GenerateRequest(tokens(9, 3), 12, temperature=1.5, **narrow)
        assert runner.generate([sampled]) == runner.generate([greedy])


def test_the_model_is_put_back():
    """
    After scoring, and after an error in the middle of it, the model attends as before and no page is lost.
    """
    loaded = tiny("llama")
    runner = loaded.runner(Scheme.parse("int2"))
    requests = score_requests()
    before = expected_scores(loaded.model, requests)
    scores = runner.score(requests)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.score(requests, progress=interrupt)
    assert loaded.model.config._attn_implementation == "eager"
    for (a, _), (b, _) in zip(expected_scores(loaded.model, requests), before, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(runner.score(requests), scores, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


def test_progress_ends_at_the_total():
    """
    Progress counts requests, up to all of them, in scoring, in hidden states and in generation.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"))
    requests = score_requests()
    for call, arguments in (
        (runner.score, requests),
        (runner.hidden_states, [request.context for request in requests]),
        (runner.generate, [GenerateRequest(request.context, 3) for request in requests]),
    ):
        seen = []
        call(arguments, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (len(requests), len(requests))
        assert seen == sorted(seen)


def test_no_requests_no_answers():
    """
    Empty lists are answered by empty lists.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"))

    assert runner.score([]) == runner.hidden_states([]) == runner.generate([]) == []


def test_a_head_dim_that_the_dtype_cannot_take_is_refused():
    """
    The message names the head_dim and the dtype, before anything runs.
    """
    loaded = tiny("llama")
    loaded.info = ModelInfo("odd", "random", "float32", ((2, 20),) * 3, 256)

    with pytest.raises(ValueError, match="head_dim 20 does not fit int2_per_token_head"):
        loaded.runner(Scheme.parse("int2"))


def test_a_model_that_runs_out_of_memory_computes_less_at_once(monkeypatch):
    """
    Out of memory halves the tokens of a pass until it fits, and changes nothing else; what never fits is raised.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"), page_size=4)
    requests = score_requests()
    prompts = [GenerateRequest(request.context, 6) for request in requests]
    scores, answers = runner.score(requests), runner.generate(prompts)
    forward, fits = Forward.hidden, 20

    def limited(self, tokens, positions, parts):
        if len(tokens) > fits:
            raise torch.OutOfMemoryError(f"{len(tokens)} tokens")
        return forward(self, tokens, positions, parts)

    monkeypatch.setattr(Forward, "hidden", limited)
    monkeypatch.setattr("kvbench.runners.transformers.memory.SMALLEST_BATCH", 8)
    runner = tiny("llama").runner(Scheme.parse("auto"), page_size=4)
    for a, b in zip(runner.score(requests), scores, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
    assert runner.memory.limits.tokens == 16
    assert runner.generate(prompts) == answers
    fits = 3
    with pytest.raises(torch.OutOfMemoryError, match="tokens"):
        tiny("llama").runner(Scheme.parse("auto")).score(requests)


def test_pages_come_from_the_memory_there_is(monkeypatch):
    """
    Little memory makes requests wait and changes no answer; a smaller dtype has more pages in the same memory; a
    sequence that it can't hold is refused.
    """
    loaded = tiny("llama")
    requests = [GenerateRequest(tokens(40, i), 6) for i in range(8)]
    scored = [ScoreRequest(request.prompt, tokens(3, 70 + i)) for i, request in enumerate(requests)]
    exact = loaded.runner(Scheme.parse("auto"), page_size=4)
    answers, scores = exact.generate(requests), exact.score(scored)
    monkeypatch.setattr("kvbench.runners.transformers.memory.CPU_LIMITS", Limits(64, 8, 2**24, 0.5))
    page_bytes = 4 * exact.scheme.resolve(torch.float32).token_bytes(loaded.info.layers)
    monkeypatch.setattr("kvbench.runners.transformers.memory.free_memory", lambda device: 2 * 60 * page_bytes)

    pages = {}
    for dtype in ("auto", "int4"):
        runner = loaded.runner(Scheme.parse(dtype), page_size=4)
        found = runner.generate(requests)
        pages[dtype] = runner.stored.pages
        if dtype == "auto":
            assert found == answers
            for a, b in zip(runner.score(scored), scores, strict=True):
                torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
    assert pages["auto"] <= 60 < pages["int4"]
    with pytest.raises(OutOfPages, match="free memory holds 480 tokens of auto, and a sequence of 480 takes 484"):
        loaded.runner(Scheme.parse("auto"), page_size=4).generate([GenerateRequest(tokens(470, 1), 10)])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_exact_prefill_reads_the_cache_only_after_the_context(name):
    """
    With prefill_exact, scores are those of exact keys and values in the context and quantized ones after it; the first
    token after a context is the exact model's.
    """
    loaded = tiny(name, torch.float64)
    requests = score_requests()
    scheme = Scheme.parse("int4")
    scores = loaded.runner(scheme, page_size=4, scoring="prefill_exact").score(requests)
    exact = loaded.runner(Scheme.parse("auto"), page_size=4).score(requests)
    fused = loaded.runner(scheme, page_size=4).score(requests)

    for a, b, c in zip(scores, exact, fused, strict=True):
        torch.testing.assert_close(a.logprobs[0], b.logprobs[0], rtol=0, atol=1e-6)
        if len(a.logprobs) > 1:
            assert (a.logprobs[1:] - b.logprobs[1:]).abs().max() > 1e-5
            assert (a.logprobs[1:] - c.logprobs[1:]).abs().max() > 1e-6
    alone = [loaded.runner(scheme, page_size=64, scoring="prefill_exact").score([r])[0] for r in requests[:4]]
    for a, b in zip(alone, scores, strict=False):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


def test_stats_count_what_was_computed():
    """
    A shared prefix counts once, decoding counts the tokens that are part of answers, and bytes are those of the cache.
    """
    runner = tiny("llama").runner(Scheme.parse("int8"), page_size=4)
    prefix = tokens(20, 1)
    answers = runner.generate([GenerateRequest(prefix + tokens(9, i), 5) for i in (2, 3)])
    stats = runner.stats()

    assert stats["prefill_tokens"] == 20 + 9 + 9
    assert stats["decode_tokens"] == sum(len(answer.tokens) - 1 for answer in answers)
    assert min(stats["prefill_seconds"], stats["decode_seconds"]) > 0
    assert stats["kv_bytes_per_token"] == runner.scheme.token_bytes(runner.info.layers)


class EagerBlocks(DecodeBatch):
    """Blocks of steps over a padded batch, looked at one block late, as on a GPU; but a graph computes when played."""

    captures: ClassVar = []

    def __init__(self, *, graphed, **options):
        super().__init__(graphed=True, **options)

    def _captured(self, size, compute):
        self.captures.append((self._pages.shape[1], self._sampler.sampled, size))
        caches = compute.__self__.memory.caches

        def replay():
            assert compute.__self__.memory.caches is caches, "a graph outlived the cache that it reads"
            self._advance(size, compute(*self._inputs(size)))

        return SimpleNamespace(replay=replay)


@pytest.fixture
def captures(monkeypatch):
    """The graphs that are made: (pages of a sequence, whether tokens are drawn, rows)."""
    monkeypatch.setattr("kvbench.runners.transformers.generation.DecodeBatch", EagerBlocks)
    monkeypatch.setattr(EagerBlocks, "captures", [])
    return EagerBlocks.captures


@pytest.mark.parametrize("most", [1, 3, 64])
def test_blocks_of_steps_change_no_answer(monkeypatch, most):
    """
    Tokens seen a block of steps late, idle rows and rows that move give the answers of one step at a time, whether
    they end by length, by an end token or by a stop string; and no page is lost.
    """
    monkeypatch.setattr("kvbench.runners.transformers.memory.CPU_LIMITS", Limits(64, most, 2**24, 0.0))
    loaded = tiny("llama", torch.float64)
    prompts = [request.context for request in score_requests()]
    requests = [GenerateRequest(prompt, 3 + 7 * i, stop=(" 5",) if i % 2 else ()) for i, prompt in enumerate(prompts)]
    requests += [GenerateRequest(prompts[1], 20, temperature=1.2, top_k=9, top_p=0.8, seed=3)]
    one = loaded.runner(Scheme.parse("int4"), page_size=4).generate(requests)
    monkeypatch.setattr("kvbench.runners.transformers.generation.DecodeBatch", EagerBlocks)
    runner = loaded.runner(Scheme.parse("int4"), page_size=4)

    assert runner.generate(requests) == one
    assert runner.generate(requests) == one
    assert runner.memory.pool.free_pages == runner.stored.pages
    assert {len(answer.tokens) < request.max_new_tokens for answer, request in zip(one, requests, strict=True)} == {
        True,
        False,
    }


def test_graphs_are_made_once_for_as_long_as_their_cache_lives(captures):
    """
    The next call plays the graphs of the one before, with other prompts and lengths too; drawn tokens have graphs of
    their own; a larger cache has new ones. A graph has fewer than twice the rows that run, and answers stay the same.
    """
    loaded = tiny("llama", torch.float64)
    runner = loaded.runner(Scheme.parse("int4"), page_size=4)
    greedy = [GenerateRequest(tokens(9 + i, i), 20) for i in range(3)]
    others = [GenerateRequest(tokens(8 + i, 9 + i), 18) for i in range(3)]
    drawn = [GenerateRequest(request.prompt, 20, temperature=1.0, seed=4) for request in greedy]
    answers = [runner.generate(requests) for requests in (greedy, others, drawn, greedy)]
    assert captures == [(8, False, 4), (8, True, 4)]

    runner.generate([GenerateRequest(tokens(2400, 1), 2)])
    assert captures[2:] == [(1024, False, 1)]
    assert [runner.generate(requests) for requests in (greedy, others, drawn, greedy)] == answers
    assert captures[3:] == captures[:2]
    assert runner.memory.pool.free_pages == runner.stored.pages


def test_making_a_graph_is_no_decoding(captures, monkeypatch):
    """
    Its seconds stand apart, and are paid by the first call alone.
    """
    captured, now = EagerBlocks._captured, [0.0]

    def slow(*args):
        now[0] += 100
        return captured(*args)

    monkeypatch.setattr("kvbench.runners.transformers.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(EagerBlocks, "_captured", slow)
    runner = tiny("llama").runner(Scheme.parse("auto"))
    runner.generate([GenerateRequest(tokens(9, 3), 3)])
    first = runner.stats()
    runner.generate([GenerateRequest(tokens(9, 4), 3)])

    # a clock that only the making of graphs moves
    assert first["capture_seconds"] == 100 * len(captures)
    assert first["decode_seconds"] == 0
    assert runner.stats()["capture_seconds"] == first["capture_seconds"]
    assert "capture_tokens" not in first


def test_an_error_drops_the_graphs(captures, monkeypatch):
    """
    After a call that raised, the next makes cache and graphs anew.
    """
    runner = tiny("llama").runner(Scheme.parse("auto"))
    requests = [GenerateRequest(tokens(9, 3), 3)]
    runner.generate(requests)
    with monkeypatch.context() as broken:
        broken.setattr(runner.tokenizer, "decode", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.generate(requests)
    runner.generate(requests)

    assert len(captures) == 2


def test_nothing_keeps_a_runner_but_its_user(captures, monkeypatch):
    """
    With its last name go its cache and its graphs, which hold most of a GPU's memory, and wait for no collector.
    """
    monkeypatch.setattr(EagerBlocks, "_captured", lambda *_: SimpleNamespace(replay=lambda: None))
    runner = tiny("llama").runner(Scheme.parse("int4"))
    runner.score(score_requests())
    runner.generate([GenerateRequest(tokens(9, 3), 5)])
    held = [weakref.ref(one) for one in (runner, runner.memory.caches[0], *runner.memory.graphed.values())]
    gc.collect()
    gc.disable()
    try:
        del runner
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_a_few_pages_more_are_not_worth_a_new_cache(captures, monkeypatch):
    """
    Where memory limits the pages, a cache is kept until a quarter more would fit; where it does not, all that were
    asked for come.
    """
    monkeypatch.setattr("kvbench.runners.transformers.memory.CPU_LIMITS", Limits(64, 64, 2**24, 0.5))
    runner = tiny("llama").runner(Scheme.parse("auto"), page_size=4)
    page = 4 * runner.scheme.resolve(torch.float32).token_bytes(runner.info.layers)
    requests = [GenerateRequest(tokens(9, i), 7) for i in range(30)]
    sizes = []
    for spare in (100, 110, 130, 2000):  # pages of which half are taken, besides those of the cache
        held = runner.memory.caches[0].nbytes if runner.memory.caches else 0
        monkeypatch.setattr("kvbench.runners.transformers.memory.free_memory", lambda _, n=spare * page - held: n)
        runner.generate(requests)
        sizes.append(runner.stored.pages)

    assert sizes == [50, 50, 65, 30 * 5]
    assert [rows for _, _, rows in captures] == [16, 16, 4, 32]


def test_a_prompt_without_tokens_is_refused():
    """
    The message says what to give.
    """
    with pytest.raises(ValueError, match="a prompt has no tokens: give it one"):
        tiny("llama").runner(Scheme.parse("auto")).generate([GenerateRequest((), 3)])


def test_graphs_are_made_anew_where_rows_are_few_or_too_many():
    """
    While sequences end a graph is run on until a quarter of its rows has one, and the next call begins afresh.
    """
    batch = DecodeBatch(most=256, pages=1, page_size=4, draws=0, device=torch.device("cpu"), graphed=True)
    sizes = []
    for running in (200, 130, 65, 64, 17, 16, 3, 5, 1):
        batch.running = [None] * running
        assert not batch.choose()
        sizes.append(batch._size)
    batch.running = []
    batch.begin(256)
    batch.running = [None] * 40

    batch.choose()

    assert sizes == [256, 256, 256, 64, 64, 16, 4, 8, 1]
    assert batch._size == 64
