"""The backend vllm: what it takes, what is refused, and that requests and answers keep their meaning on the way.

CI has no vLLM: a stand-in answers in vLLM's words by the toy model. The last tests ask vLLM itself, where it is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvbench.runners.backends import Asked, all_backends
from kvbench.runners.backends.vllm import cache_dtype, vllm
from kvbench.runners.base import GenerateRequest, ModelInfo, NextRequest, ScoreRequest
from kvbench.runners.catalog import resolve
from kvbench.runners.model_files import ModelError
from kvbench.runners.toy import ToyRunner
from kvbench.runners.vllm import VllmModel
from kvbench.runners.vllm.engine import VARIABLES, Engine, Kind
from kvbench.runners.vllm.worker import CacheWorker
from kvbench.schemes import Scheme
from kvbench.sweep.config import parse_sweep
from kvbench.sweep.plan import plan
from kvbench.tasks import make_task
from kvbench.yaml_text import ConfigError

# ---- what it takes


@pytest.mark.parametrize(
    ("scheme", "compute_dtype", "expected"),
    [
        ("auto", "float32", "auto"),
        ("fp16", "float16", "auto"),
        ("fp16", "bfloat16", "float16"),
        ("bf16", "bfloat16", "auto"),
        ("fp8_per_tensor", "bfloat16", "fp8"),
        ("int8", "bfloat16", "int8_per_token_head"),
        ("int4", "bfloat16", "int4_per_token_head"),
        (("int4", "none"), "bfloat16", None),
        (("int4", "hadamard"), "bfloat16", None),
        (("int8", "hadamard"), "bfloat16", None),
        ("int8:int4", "bfloat16", None),
        ("int8+w64s4", "bfloat16", None),
        ("int8+l0=fp16", "bfloat16", None),
        ("int2", "bfloat16", None),
    ],
)
def test_a_scheme_is_the_cache_dtype_that_stores_alike(scheme, compute_dtype, expected):
    """
    vLLM rotates int4 by a randomized Hadamard and nothing else, has one dtype for keys and values, and no window.
    """
    pair = (scheme, None) if isinstance(scheme, str) else scheme
    assert cache_dtype(Scheme.parse(*pair), compute_dtype) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": Scheme.parse("int2")}, "no kv_cache_dtype for it; take auto · none, "),
        ({"scheme": Scheme.parse("int8")}, "needs a GPU"),
        ({"scoring": "prefill_exact"}, "take fused or replay"),
        ({"attention": "triton"}, "vLLM chooses its own"),
        ({"generation": {"repetition_penalty": 1.1, "min_length": 3}}, "sets min_length"),
    ],
)
def test_what_it_can_not_do_is_said_in_a_line(changes, said):
    """
    And what it can is not refused: int8 on a GPU, and a setting that vLLM follows.
    """
    plain = Asked(Scheme.parse("auto"), "float32")
    assert said in vllm.refuses(replace(plain, **changes))
    assert "\n" not in vllm.refuses(replace(plain, **changes))
    assert vllm.refuses(plain) == ""
    assert vllm.refuses(replace(plain, scheme=Scheme.parse("int8"), device="NVIDIA H100")) == ""
    assert vllm.refuses(replace(plain, generation={"repetition_penalty": 1.1})) == ""


# ---- a plan of it

TEXT = json.dumps(
    {
        "name": "t",
        "model": {"name": "toy", "backend": "vllm"},
        "baseline": "auto",
        "dtypes": ["auto", "fp8_per_tensor"],
        "tasks": [{"task": "divergence", "tokens": 64, "context": 32, "top": 8}],
    }
)


@pytest.fixture
def planned(toy):
    """The cells of a YAML with settings, of the toy on the backend that it names."""

    def find(spec):
        return replace(toy.find_model(spec), name=all_backends()[spec.backend].called(spec.name), backend=spec.backend)

    parts = replace(toy.PARTS, find_model=find, make_task=make_task)
    return lambda *settings: plan(parse_sweep(TEXT, "t.yaml", settings, parts=parts), parts=parts)


def test_controls_are_those_that_it_gives(planned):
    """
    vLLM has a canary and an A/A cell, and no low-bit scheme under noise; its cells are others than kvbench's own.
    """
    of_vllm = planned()
    own = planned("model=toy")

    assert [cell.role for cell in of_vllm] == ["baseline", "canary", "repeat", "cell"]
    assert [cell.role for cell in own] == ["baseline", "canary", "repeat", "cell", "repeat", "repeat"]
    assert of_vllm[0].model.name == "toy (vllm)"
    assert of_vllm[0].identity["model"]["backend"] == "vllm"
    assert "backend" not in own[0].identity["model"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dtypes=[int4]", "model toy (vllm), scheme int4_per_token_head · randomized_hadamard: vLLM's kv_cache_dtype"),
        ("dtypes=[int2]", "model toy (vllm), scheme int2_per_token_head · hadamard: vLLM has no kv_cache_dtype for it"),
        (
            "tasks=[divergence]",
            "model toy (vllm), task divergence: it needs hidden states, which backend vllm does not give; divergence "
            "with `top: 64` needs none",
        ),
        ("tasks=[layers]", "it needs hidden states"),
        ("tasks=[throughput]", "it needs clock, which backend vllm does not give"),
        ("model.backend=vlm", "unknown backend 'vlm': did you mean vllm?"),
    ],
)
def test_a_plan_refuses_what_it_does_not_give(planned, setting, said):
    """
    In one line, before anything is loaded.
    """
    with pytest.raises(ConfigError) as error:
        planned(setting)
    assert said in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_without_vllm_a_plan_says_how_to_have_it(monkeypatch):
    """
    The package, and that it wants an environment of its own.
    """
    monkeypatch.setattr("kvbench.runners.backends.vllm.find_spec", lambda name: None)
    assert "pip install 'kvbench[vllm]'" in vllm.missing()


# ---- a stand-in for vLLM, over the toy


@dataclass
class Logprob:
    logprob: float
    rank: int


class StandIn:
    """Of vLLM's LLM what the runner asks of it. ids_scored: as the newer model runner."""

    def __init__(self, toy, ids_scored):
        self.toy = toy
        config = SimpleNamespace(use_v2_model_runner=ids_scored)
        self.llm_engine = SimpleNamespace(vllm_config=config)
        self.asked: list[Any] = []

    def _row(self, log_p, token, many):
        shown = {*log_p.topk(many).indices.tolist()} if many else set()
        return {one: Logprob(float(log_p[one]), int((log_p > log_p[one]).sum()) + 1) for one in sorted({*shown, token})}

    def generate(self, prompts, params, use_tqdm):
        assert use_tqdm is False
        return [self._answer(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, params, strict=True)]

    def _answer(self, prompt, params):
        self.asked.append(params)
        assert params.stop is None or "" not in params.stop
        out = SimpleNamespace(prompt_logprobs=None, prompt_token_id_logprobs=None)
        trace = params.trace_decode_token_ids
        if params.prompt_logprobs is not None:
            log_p = self.toy.log_probs(self.toy.hidden_states([prompt])[0])
            rows = zip(log_p, prompt[1:], strict=False)
            out.prompt_logprobs = [None, *(self._row(row, token, params.prompt_logprobs) for row, token in rows)]
            if params.prompt_logprob_token_ids is not None:
                assert self.llm_engine.vllm_config.use_v2_model_runner
                ids = torch.tensor(params.prompt_logprob_token_ids)
                out.prompt_token_id_logprobs = log_p[:-1].gather(1, ids).numpy()
        if trace:
            tokens = [*prompt, *trace]
            log_p = self.toy.log_probs(self.toy.hidden_states([tokens])[0])[len(prompt) - 1 :]
            rows = zip(log_p, trace, strict=False)
            made = SimpleNamespace(logprobs=[self._row(row, token, params.logprobs) for row, token in rows])
            out.outputs = [made]
        elif params.prompt_logprobs is None:
            (made,) = self.toy.generate([GenerateRequest(tuple(prompt), params.max_tokens, tuple(params.stop or ()))])
            ended = len(made.tokens) < params.max_tokens and not any(stop in made.text for stop in params.stop)
            ids = [*made.tokens, *([self.toy.tokenizer.eos_token_id] if ended else [])]
            out.outputs = [
                SimpleNamespace(token_ids=ids, finish_reason="stop" if ended else "length", stop_reason=None)
            ]
        return out


class SamplingParams(SimpleNamespace):
    """Of vLLM's what is read here, with vLLM's own defaults."""

    def __init__(self, **given):
        defaults = {"stop": None, "prompt_logprobs": None, "prompt_logprob_token_ids": None, "logprobs": None}
        super().__init__(**{**defaults, "trace_decode_token_ids": None, **given})


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """The runner over a stand-in, as `scoring` and the model runner of vLLM have it."""
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)

    def made(scoring="fused", ids_scored=True):
        toy = ToyRunner()
        engine = Engine("toy", tmp_path, "float32", "cpu", 0)
        kind = Kind("auto", scoring == "replay")
        engine.llm, engine.kind = StandIn(toy, ids_scored), kind
        engine.defaults = SimpleNamespace(top_k=50, top_p=0.9, repetition_penalty=1.0)
        monkeypatch.setattr(engine, "end", lambda: None)
        model = VllmModel(engine, toy.tokenizer, ModelInfo("toy (vllm)", "r", "float32", ((1, 16),), 4094))
        return toy, model.runner(Scheme.parse("auto"), scoring=scoring)

    return made


DOCUMENTS = [tuple(b"A quick fox"), tuple(b"It is"), tuple(range(40, 60))]


@pytest.mark.parametrize("scoring", ["fused", "replay"])
def test_scores_come_back_as_they_are(runner, scoring):
    """
    The continuation's log-probabilities and whether it is greedy, whole prompts scored or tokens fed one by one.
    """
    toy, asked = runner(scoring)
    best = toy.generate([GenerateRequest(DOCUMENTS[0], 3)])[0].tokens
    requests = [ScoreRequest(one[:2], one[2:]) for one in DOCUMENTS] + [ScoreRequest(DOCUMENTS[0], best)]

    for mine, its in zip(toy.score(requests), asked.score(requests), strict=True):
        torch.testing.assert_close(its.logprobs, mine.logprobs)
        assert its.greedy == mine.greedy
    assert asked.score(requests)[-1].greedy


@pytest.mark.parametrize(("scoring", "ids_scored"), [("fused", True), ("fused", False), ("replay", True)])
@pytest.mark.parametrize("named", [False, True])
def test_next_tokens_come_back_as_they_are(runner, scoring, ids_scored, named):
    """
    At its own likeliest tokens, and at those that are named, which vLLM scores or which are among its likeliest.
    """
    toy, asked = runner(scoring, ids_scored)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.rand(len(one) - 1, 256, generator=draw).argsort(-1)[:, :5] for one in DOCUMENTS]
    requests = [NextRequest(one, 5, name if named else None) for one, name in zip(DOCUMENTS, ids, strict=True)]

    its = asked.next_tokens(requests)
    for one, other in zip(toy.next_tokens(requests), its, strict=True):
        for name in ("logprobs", "following", "best"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), check_dtype=False)


def test_a_token_that_vllm_does_not_name_is_unknown(runner, monkeypatch):
    """
    Where it can't score tokens by name those that are not among its likeliest are NaN, but for the next one, which it
    always names.
    """
    monkeypatch.setattr("kvbench.runners.vllm.runner.WIDE", 4)
    toy, asked = runner(ids_scored=False)
    (whole,) = toy.next_tokens([NextRequest(DOCUMENTS[2], 15)])
    (its,) = asked.next_tokens([NextRequest(DOCUMENTS[2], 10, whole.ids[:, 5:])])

    torch.testing.assert_close(its.logprobs[:, :5], whole.logprobs[:, 5:10])
    assert its.logprobs[:, 5:].isnan().sum() >= its.logprobs[:, 5:].numel() - len(DOCUMENTS[2])


def test_answers_end_as_ours_do(runner):
    """
    At a stop string, before an end token, and after one token where the stop string is empty, which vLLM refuses.
    """
    toy, asked = runner()
    whole = toy.generate([GenerateRequest(one, 12) for one in DOCUMENTS])
    stop = whole[0].text[3:5]
    requests = [GenerateRequest(one, 12) for one in DOCUMENTS]
    requests += [GenerateRequest(DOCUMENTS[0], 12, (stop,)), GenerateRequest(DOCUMENTS[0], 12, ("",))]

    its = asked.generate(requests)
    assert [one.text for one in its[:4]] == [one.text for one in toy.generate(requests[:4])]
    assert [one.tokens for one in its[:3]] == [one.tokens for one in whole]
    assert len(its[4].tokens) == 1
    drawn = GenerateRequest(DOCUMENTS[0], 2, temperature=0.7, top_k=None, top_p=0.5, seed=3)
    asked.generate([drawn])
    params = asked.loaded.engine.llm.asked[-1]
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.7, 50, 0.5, 3)


# ---- its worker, and starting it


class Worker(CacheWorker):
    """Two layers that share a cache of 6 blocks of 4 tokens, and one of its own; bytes a token: 2 × 32."""

    def __init__(self, inside=False):
        shared = torch.ones(6, 4, 8)
        backend = SimpleNamespace(get_name=lambda: "ATTN", forward_includes_kv_cache_update=inside)
        self.layers = {
            str(i): SimpleNamespace(impl=SimpleNamespace(), kv_cache=cache, attn_backend=backend)
            for i, cache in enumerate([shared, shared, torch.ones(6, 4, 8)])
        }
        self.layers["no attention"] = SimpleNamespace()
        self.cache_config = SimpleNamespace(num_gpu_blocks=6, block_size=4)
        context = SimpleNamespace(static_forward_context=self.layers)
        self.vllm_config = SimpleNamespace(compilation_config=context)
        self.model_runner = SimpleNamespace(model=torch.nn.Linear(3, 3))


def test_a_destroyed_cache_is_zero_and_stays_so():
    """
    What is there is zeroed, nothing more is written, and attention that writes by itself is refused; a storage that
    layers share is counted once.
    """
    worker = Worker()
    assert worker.kvbench_cache() == (64.0, ["ATTN"])
    worker.kvbench_destroy()
    for name in "012":
        assert not worker.layers[name].kv_cache.any()
        assert worker.layers[name].impl.do_kv_cache_update(object(), key=1) is None
    worker.kvbench_release()
    assert worker.layers["0"].kv_cache.untyped_storage().nbytes() == 0

    with pytest.raises(ValueError, match="ATTN writes its cache while it reads it, so there is no canary"):
        Worker(inside=True).kvbench_destroy()


def test_an_engine_that_could_not_be_destroyed_is_none(monkeypatch, tmp_path):
    """
    The next cell that asks for it starts another, and does not get one whose cache is whole; all others run as asked.
    """
    started = []

    class LLM:
        def __init__(self, folder, **options):
            self.worker = Worker(inside=True)
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))
            started.append(options)

        def get_default_sampling_params(self):
            return SimpleNamespace()

        def collective_rpc(self, name):
            return [getattr(self.worker, name)()]

    for name, content in {
        "vllm": {"LLM": LLM},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"cleanup_dist_env_and_memory": lambda: None},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in VARIABLES:
        monkeypatch.setenv(name, VARIABLES[name])
    engine = Engine("toy", tmp_path, "float32", "cpu", 0)

    for _ in range(2):
        with pytest.raises(
            ModelError, match="vLLM does not start with kv_cache_dtype auto: vLLM's ATTN writes its cache"
        ):
            engine.start(Kind("auto", destroyed=True))
    assert engine.start(Kind("fp8")) is engine.start(Kind("fp8"))
    assert [options["kv_cache_dtype"] for options in started] == ["auto", "auto", "fp8"]
    assert (engine.bytes_per_token, engine.attention) == (64.0, "ATTN")


# ---- vLLM itself


@pytest.fixture(scope="module")
def model():
    """A small real model, in vLLM and in transformers."""
    pytest.importorskip(
        "vllm.entrypoints.llm", reason="vLLM is not installed: pip install 'kvbench[vllm]'", exc_type=ImportError
    )
    source = resolve("smollm2-135m-instruct")
    if not source.available:
        pytest.skip(source.missing)
    return vllm.open(source, "float32", "cpu"), all_backends()["transformers"].open(source, "float32", "cpu")


@pytest.mark.slow
def test_vllm_computes_what_we_do(model):
    """
    Under an exact cache log-probabilities agree within float32's noise, and greedy answers are the same; bytes a token
    are what they should be.
    """
    its, ours = (one.runner(Scheme.parse("auto")) for one in model)
    tokens = tuple(ours.tokenizer.encode("The capital of France is Paris, and the capital of Italy is Rome.\n"))
    score = [ScoreRequest(tokens[:4], tokens[4:])]
    torch.testing.assert_close(its.score(score)[0].logprobs, ours.score(score)[0].logprobs, atol=1e-3, rtol=0)
    generate = [GenerateRequest(tokens, 12, ("\n",)), GenerateRequest(tokens[:6], 8)]
    assert its.generate(generate) == ours.generate(generate)
    (mine,) = ours.next_tokens([NextRequest(tokens, 8)])
    (theirs,) = its.next_tokens([NextRequest(tokens, 8, mine.ids)])
    torch.testing.assert_close(theirs.logprobs, mine.logprobs, atol=1e-3, rtol=0)
    assert its.stats()["kv_bytes_per_token"] == Scheme.parse("auto").resolve(torch.float32).token_bytes(its.info.layers)


@pytest.mark.slow
def test_vllm_reads_its_cache(model):
    """
    With a cache that gives back zeros log-likelihoods fall by nats; fp8 moves them, and by less.
    """
    tokens = tuple(model[0].tokenizer.encode("The capital of France is Paris, and the capital of Italy is Rome."))
    request = [ScoreRequest(tokens[:4], tokens[4:])]
    exact, zeroed, fp8 = (
        float(model[0].runner(Scheme.parse(name), destroyed=destroyed).score(request)[0].logprobs.mean())
        for name, destroyed in (("auto", False), ("auto", True), ("fp8_per_tensor", False))
    )
    assert zeroed < exact - 2
    assert 0 < abs(fp8 - exact) < 0.5
