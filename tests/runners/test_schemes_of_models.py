"""Whole schemes under tiny models: centred keys, windows and layers of their own, learned from a text."""

import pytest
import torch
import transformers

from kvbench.runners.base import GenerateRequest, ModelInfo, ScoreRequest
from kvbench.runners.calibrate import _ropes
from kvbench.runners.learned import digest, unpack
from kvbench.runners.transformers import TransformersModel, observed
from kvbench.schemes import Scheme

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
}
# biased keys, a softcap, sink logits, two rotary embeddings, half a head turned, frequencies that the length changes
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, sliding_window=90, query_pre_attn_scalar=16),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, sliding_window=70, num_local_experts=4, num_experts_per_tok=2
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, sliding_window=90, query_pre_attn_scalar=16),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **COMMON, rope_parameters=LONGROPE, original_max_position_embeddings=512
    ),
}
CALIBRATION = {"tokens": 900}
CENTRED = {"key": "center+hadamard", "value": "hadamard"}
SPECS = {
    "window": {"dtype": "int4", "rotation": CENTRED, "window": {"sinks": 4, "recent": 1}, "calibration": CALIBRATION},
    "sinks": {"dtype": "int2", "window": {"sinks": 2}},
    "near": {"dtype": "int2", "rotation": CENTRED, "window": {"recent": 0}, "calibration": CALIBRATION},
    "layers": {"dtype": "int4", "layers": {0: "int8", "-1": {"key": "fp16"}}},
    "transforms": {
        "dtype": "int4",
        "window": {"recent": 0},
        "layers": {1: {"key": {"dtype": "int8", "rotation": "center"}, "value": {"dtype": "int2", "rotation": "none"}}},
        "calibration": CALIBRATION,
    },
    "sealed": {"dtype": "uint2_per_channel_64", "window": {"sinks": 4, "recent": 1}},
    "sealed-tiers": {
        "key": "tiers421_per_channel_128",
        "value": "midrise2",
        "rotation": {"key": "center+rank", "value": "hadamard"},
        "window": {"sinks": 4},
        "calibration": CALIBRATION,
    },
    "sealed-keys": {
        "key": "uint4_per_channel_128",
        "value": "int2",
        "rotation": {"key": "center+hadamard", "value": "hadamard"},
        "calibration": CALIBRATION,
    },
    "learned": {
        "key": "nuq3_per_channel",
        "value": "nuq3_per_token_head",
        "rotation": {"key": "center+reorder", "value": "reorder"},
        "window": {"sinks": 1},
        "calibration": CALIBRATION,
    },
    "balance": {
        "dtype": "int4",
        "rotation": {"key": "center+balance_full+hadamard", "value": "hadamard"},
        "window": {"sinks": 2},
        "calibration": CALIBRATION,
    },
}


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def encode(self, text, **_):
        return [1 + ord(letter) % 96 for letter in text]

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


def tiny(name, dtype=None):
    """A random model whose tokens depend on their context; key biases, where it has them, outweigh all else."""
    torch.manual_seed(0)
    # torch multiplies experts in no more than 32 bits
    dtype = dtype or (torch.float32 if name == "gpt_oss" else torch.float64)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            torch.nn.init.normal_(parameter)
        elif "k_proj.bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=20)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    info = ModelInfo(name, "random", str(dtype).removeprefix("torch."), ((2, 16),) * 3, 512)
    return TransformersModel(model, Letters(), info)


@pytest.fixture(scope="module")
def qwen():
    return tiny("qwen2")


def tokens(count, seed):
    return tuple(torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests():
    """A long prefix that three share and leave within a page of 64, one alone, one shorter than any window."""
    prefix = tokens(135, 1)
    found = [ScoreRequest(prefix + tokens(count, count), tokens(5, 50 + count)) for count in (1, 20, 60)]
    return [*found, ScoreRequest(tokens(150, 9), tokens(9, 10)), ScoreRequest((3,), (4,))]


def assert_same(scores, others, atol):
    for a, b in zip(scores, others, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("center", ["center", "center_constant", "center+balance", "balance_full"])
def test_an_exact_cache_stays_one(name, center):
    """
    Centred or balanced, q·k is what it was, through softcaps, sink logits, two rotary embeddings and partial ones.
    """
    loaded = tiny(name)
    spec = {"dtype": "auto", "rotation": {"key": f"{center}+hadamard", "value": "none"}, "calibration": CALIBRATION}

    centred = loaded.runner(Scheme.of(spec), page_size=16).score(requests())

    # what is learned is float32; so is all of gpt_oss, whose routing is far from smooth
    exact = loaded.runner(Scheme.parse("auto"), page_size=16).score(requests())
    assert_same(centred, exact, 1e-3 if name == "gpt_oss" else 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mean_by_page_is_learned_where_the_rotary_embedding_is_known(name):
    """
    The biased model has one mean a page of 64 positions up to its longest; one whose frequencies change has one in all.
    """
    loaded = tiny(name)
    scheme = Scheme.of({"dtype": "int4", "rotation": "center:none", "calibration": CALIBRATION})

    shapes = {len(tensor) for tensor in loaded.learn(scheme).values()}

    if name == "phi3-longrope":
        assert shapes == {1}
    if name == "qwen2":
        assert shapes == {512 // 64}


def test_a_deep_model_s_last_layers_know_their_rotary_embedding():
    """
    One pass over the text tells it of each of forty layers, as a mean by page needs it.
    """
    config = CONFIGS["qwen2"]()
    config.num_hidden_layers = 40
    config.layer_types = ["full_attention"] * 40
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    loaded = TransformersModel(model, Letters(), ModelInfo("deep", "random", "float32", ((2, 16),) * 40, 512))

    runner = loaded.runner(Scheme.parse("auto"))

    with observed(lambda *_: None), _ropes(model) as ropes:
        runner.hidden_states([list(tokens(20, 1))])

    assert sorted(ropes) == list(range(40))


@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_is_replay(qwen, spec):
    """
    Scoring in one pass = feeding token by token through the cache, in float64.
    """
    scheme = Scheme.of(SPECS[spec])
    fused, replay = (qwen.runner(scheme, page_size=16, scoring=s).score(requests()) for s in ("fused", "replay"))

    assert_same(fused, replay, 1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen2"])
def test_sealed_pages_in_one_pass_are_replay(name):
    """
    Through softcaps, sink logits, sliding windows and partial rotary embeddings too.
    """
    loaded = tiny(name)
    scheme = Scheme.of({"dtype": "uint4_per_channel_64", "window": {"sinks": 3, "recent": 0}})
    asked = requests()[1:4]

    fused, replay = (loaded.runner(scheme, scoring=s).score(asked) for s in ("fused", "replay"))

    # gpt_oss computes in float32, and routes by it
    assert_same(fused, replay, 1e-3 if name == "gpt_oss" else 1e-4)


@pytest.mark.parametrize("spec", ["window", "sealed"])
def test_an_exact_context_is_sealed_all_the_same(qwen, spec):
    """
    With prefill_exact a context's first prediction is the exact model's; requests together are each alone.
    """
    scheme = Scheme.of(SPECS[spec])
    exact = qwen.runner(Scheme.parse("auto"), page_size=16).score(requests())

    together = qwen.runner(scheme, page_size=16, scoring="prefill_exact").score(requests())

    alone = [qwen.runner(scheme, page_size=16, scoring="prefill_exact").score([one])[0] for one in requests()]
    assert_same(alone, together, 1e-6)
    for one, other in zip(together, exact, strict=True):
        torch.testing.assert_close(one.logprobs[:1], other.logprobs[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", ["window", "sealed"])
def test_only_the_window_takes_sixteen_bits(qwen, spec):
    """
    While long answers are made, rows in 16 bits are those of the windows, whatever the sequences' length; bytes are
    those allocated.
    """
    scheme, asked = Scheme.of(SPECS[spec]), [GenerateRequest(tokens(20, i), 400) for i in range(3)]
    runner = qwen.runner(scheme, page_size=16)
    runner.generate(asked)
    exact, token_bytes = runner.memory.caches[1], scheme.exact(torch.float64).token_bytes(qwen.info.layers)

    # a window begins up to a page late, pages in 16 bits have 16 tokens, and a half more are made at a time
    most = 1.5 * 3 * (scheme.window.tokens(420) + scheme.window.page + 2 * 16)
    assert runner.stats()["kv_window_bytes"] == exact.nbytes == exact.pages * 16 * token_bytes
    assert exact.pages * 16 <= most < 3 * 420
    # an answer ends with the runner's last call: nothing is left in a ring
    assert len(runner.memory.rings._free) == runner.memory.rings.pages


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "learned"])
def test_batches_pages_and_passes_change_nothing(qwen, monkeypatch, spec):
    """
    Requests together, sharing prefixes, = each alone = another page size = passes of 70 tokens.
    """
    scheme = Scheme.of(SPECS[spec])
    together = qwen.runner(scheme, page_size=16).score(requests())

    assert_same([qwen.runner(scheme, page_size=16).score([one])[0] for one in requests()], together, 1e-6)
    assert_same(qwen.runner(scheme, page_size=64).score(requests()), together, 1e-6)
    cut = qwen.runner(scheme, page_size=16)
    monkeypatch.setattr(cut.memory, "limits", type(cut.memory.limits)(tokens=70, sequences=2, logits=2**16, memory=0.0))
    assert_same(cut.score(requests()), together, 1e-6)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "learned"])
def test_answers_made_together_are_those_made_alone(qwen, spec):
    """
    Sequences that come and go in one batch give the tokens of each alone.
    """
    scheme = Scheme.of(SPECS[spec])
    asked = [GenerateRequest(r.context, 9) for r in requests()]
    runner = qwen.runner(scheme, page_size=16)

    assert runner.generate(asked) == [qwen.runner(scheme, page_size=16).generate([one])[0] for one in asked]


def test_a_window_reads_nearly_exactly_what_centring_alone_does_not(qwen):
    """
    Two bits with a window over the whole sequence are the 16-bit cache; without, they are not.
    """
    request = [ScoreRequest(tokens(100, 3), tokens(20, 4))]
    exact = qwen.runner(Scheme.parse("auto")).score(request)[0].logprobs

    def off(window):
        spec = {"dtype": "int2", "rotation": CENTRED, "calibration": CALIBRATION, **window}
        return float((qwen.runner(Scheme.of(spec)).score(request)[0].logprobs - exact).abs().max())

    assert off({"window": {"recent": 2}}) < 0.02  # float16's rounding, through three layers
    assert off({}) > 0.1


def test_what_was_learned_is_kept_and_read_back(qwen):
    """
    A runner given what was learned is the runner that learned it; the same text teaches the same bytes.
    """
    scheme = Scheme.of(SPECS["window"])
    learned = qwen.learn(scheme)
    fresh, given = qwen.runner(scheme).score(requests()), qwen.runner(scheme, learned=learned).score(requests())

    assert_same(given, fresh, 0)
    assert digest(learned) == digest(qwen.learn(scheme))
    assert [len(sides[0]) for sides in unpack(learned, scheme, 3)] == [2, 2, 2]


def test_a_layer_learns_what_its_own_transforms_need(qwen):
    """
    Of three layers the one with centred keys has a mean, the same as where all are centred.
    """
    learned = qwen.learn(Scheme.of(SPECS["transforms"]))
    everywhere = qwen.learn(Scheme.of({"dtype": "int8", "rotation": "center:none", "calibration": CALIBRATION}))

    assert set(learned) == {"1.0.0.offset"}
    assert torch.equal(learned["1.0.0.offset"], everywhere["1.0.0.offset"])


def test_a_text_that_is_too_short_is_refused(qwen, tmp_path):
    """
    The message has both numbers, and what to do.
    """
    text = tmp_path / "short.txt"
    text.write_text("a" * 100)
    scheme = Scheme.of({**SPECS["window"], "calibration": {"text": str(text), "tokens": 100}})
    text.write_text("a" * 60)
    scheme = type(scheme)(scheme.key, scheme.value, calibration=type(scheme.calibration)(text, 101))

    with pytest.raises(
        ValueError, match=r"short\.txt has 100 tokens, expected 101: give a longer text or `tokens: 100`"
    ):
        qwen.learn(scheme)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"dtype": "int4", "layers": {3: "int8"}},
            "there is no layer 3: the model's go from 0 to 2, or from -1 back to -3",
        ),
        (
            {"dtype": "int4", "window": {"recent": 8}},
            "at least 513 tokens in 16 bits are more than the model's 512 positions",
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused(qwen, spec, message):
    """
    A layer that is not there, and a window longer than the model's positions.
    """
    with pytest.raises(ValueError, match=message):
        qwen.runner(Scheme.of(spec))


def test_the_kernels_refuse_what_they_cannot_compute(qwen):
    """
    With `attention: triton` one line says why; `auto` takes the reference.
    """
    late = {"dtype": "int4", "rotation": "hadamard+center_constant:hadamard", "calibration": CALIBRATION}
    with pytest.raises(ValueError, match="attention: triton can't serve this cell: no kernel computes hadamard"):
        tiny("qwen2", torch.float16).runner(Scheme.of(late), attention="triton")
    assert qwen.runner(Scheme.of(SPECS["window"])).attention == "reference"
