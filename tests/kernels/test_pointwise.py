"""What kernels compute around attention: what transformers' own modules give, and of which models they compute what."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from kvbench_kernels import pointwise
from torch import nn
from torch.nn import functional

from kvbench.runners.base import ModelInfo, ScoreRequest
from kvbench.runners.transformers import TransformersModel
from kvbench.runners.transformers.fused import Fused, nearly
from kvbench.runners.transformers.joined import Joined
from kvbench.schemes import Scheme

SIZES = {
    "vocab_size": 61,
    "hidden_size": 72,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "max_position_embeddings": 256,
}


def random_model(kind, device, **settings):
    """A random model in half precision, whose norms weigh channels differently."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.to(device, torch.float16)


@pytest.mark.parametrize(
    ("kind", "norms", "gates", "functions"),
    [
        # a layer has two norms, one gate; behind the last layer stands one norm more
        ("llama", 5, 2, 1),
        # norms of queries and keys beside
        ("qwen3", 9, 2, 1),
        # norms of 1 + weight, before and behind; a gate of another kind
        ("gemma3_text", 13, 2, 1),
        # LayerNorm, no gate, rotary positions of a part of each head
        ("phi", 0, 0, 1),
        # rotary positions of neighbouring channels
        ("cohere", 0, 2, 0),
    ],
)
def test_a_module_is_replaced_where_the_kernel_gives_the_same(kind, norms, gates, functions, device):
    """
    Inside the block a model's hidden states are its own up to rounding, and after it no module is changed.
    """
    model = random_model(kind, device)
    tokens = torch.arange(1, 30, device=device)[None]
    found = Fused(model, {SIZES["head_dim"]})
    before = [module.forward for module in found.forwards]
    with torch.inference_mode():
        own = model.model(tokens).last_hidden_state
        with found.applied():
            fused = model.model(tokens).last_hidden_state
        again = model.model(tokens).last_hidden_state

    named = [type(module).__name__ for module in found.forwards]
    assert sum("Norm" in name for name in named) == norms
    assert sum("MLP" in name for name in named) == gates
    assert named.count("Linear") == 3 * SIZES["num_hidden_layers"]
    assert len(found.functions) == functions
    assert [module.forward for module in found.forwards] == before
    torch.testing.assert_close(fused.float(), own.float(), rtol=0.02, atol=0.02)
    assert torch.equal(again, own)


@pytest.mark.parametrize("change", ["norm", "gate", "rotary"])
def test_what_computes_something_else_stays(change, device, monkeypatch):
    """
    A module or function of a known name that gives other numbers is not replaced.
    """
    model = random_model("llama", device)
    modeling = transformers.models.llama.modeling_llama
    if change == "norm":
        monkeypatch.setattr(
            modeling.LlamaRMSNorm, "forward", lambda self, x: functional.rms_norm(x, x.shape[-1:], self.weight) * 1.01
        )
    elif change == "gate":
        monkeypatch.setattr(
            modeling.LlamaMLP, "forward", lambda self, x: self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))
        )
    else:
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    found = Fused(model, {24})

    names = {type(module).__name__ for module in found.forwards}
    kinds = {kind for kind, part in (("norm", "Norm"), ("gate", "MLP")) if any(part in name for name in names)}
    assert kinds | ({"rotary"} if found.functions else set()) == {"norm", "gate", "rotary"} - {change}


@pytest.mark.parametrize("head_dim", [64, 576, 5000])
def test_a_norm_of_any_width(head_dim, device):
    """
    Rows of any width, few or many, of tiny and of large numbers.
    """
    x = (
        torch.randn(2, 5, head_dim, device=device)
        * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 200.0], device=device)[:, None]
    )
    x, weight = x.half(), torch.randn(head_dim, device=device).half()
    norm = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).half()

    assert nearly(pointwise.rms_norm(x, weight, 1e-6), weight * norm)


def test_peaks_are_those_of_a_log_softmax(device):
    """
    The largest logit, the first place of it, and the logarithm of the sum, over a vocabulary of no power of two.
    """
    logits = torch.randn(7, 5003, device=device).half() * 5
    logits[1, [17, 4000]] = 60.0  # twice the largest
    logits[2, :3000] = float("-inf")
    logits[3, 100] = float("nan")
    peak, best, total = pointwise.peaks(logits)
    log_p = logits.float().log_softmax(-1)
    whole = torch.tensor([0, 1, 2, 4, 5, 6], device=device)

    assert best[1] == 17
    assert torch.equal(best[whole], logits[whole].float().argmax(-1))
    found = logits.float() - peak[:, None] - total.log()[:, None]
    torch.testing.assert_close(found[whole], log_p[whole], rtol=0, atol=1e-5)
    assert bool(found[3].isnan().all())


def test_scores_are_those_of_a_plain_model(device):
    """
    With kernels around attention log-probabilities are plain transformers' within half precision.
    """
    model = random_model("llama", device, head_dim=64)
    loaded = TransformersModel(
        model, SimpleNamespace(eos_token_id=0), ModelInfo("tiny", "random", "float16", ((1, 64),) * 2, 256)
    )
    tokens = [1 + 7 * i % 60 for i in range(20)]
    [score] = loaded.runner(Scheme.parse("auto"), attention="triton").score([ScoreRequest(tokens[:12], tokens[12:])])
    with torch.inference_mode():
        log_p = model(torch.tensor([tokens], device=device)).logits[0, 11:-1].float().log_softmax(-1).cpu()

    assert loaded.fused.forwards
    torch.testing.assert_close(score.logprobs, log_p[range(8), tokens[12:]], rtol=0, atol=0.05)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_one_product(bias):
    """
    Each gets its own output of the tensor that the first was given, once; of another tensor it computes its own. No
    output is kept when all are taken, and the weights are what they were, in one tensor.
    """
    torch.manual_seed(0)
    sizes = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
    module = nn.ModuleDict({name: nn.Linear(8, size, bias=bias, dtype=torch.float64) for name, size in sizes.items()})
    weights = {name: part.weight.clone() for name, part in module.items()}
    x, other = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.inference_mode():
        own = {name: (part(x), part(other)) for name, part in module.items()}
        joined = Joined.of(module, tuple(sizes), torch.float64)
        q, k, v = joined.forwards().values()
        for given, which in ((x, 0), (other, 1)):
            for name, forward in zip(sizes, (q, k, v), strict=True):
                torch.testing.assert_close(forward(given), own[name][which])
        assert joined._given is None
        assert joined._made == [None] * 3
        q(x)
        torch.testing.assert_close(v(other), own["v_proj"][1])
        torch.testing.assert_close(v(x), own["v_proj"][0])
        torch.testing.assert_close(v(x), own["v_proj"][0])

    assert {part.weight.untyped_storage().data_ptr() for part in module.values()} == {
        joined._weight.untyped_storage().data_ptr()
    }
    assert all(torch.equal(part.weight, weights[name]) for name, part in module.items())
    module["k_proj"](x).sum().backward()  # outside of inference mode, as ever


def test_layers_that_differ_are_no_product():
    """
    One that is missing, of another dtype or kind, alone in having a bias, or that a library of quantized weights has
    given a forward of its own, or taken the weight from.
    """
    parts = {"q_proj": nn.Linear(8, 4), "k_proj": nn.Linear(8, 4, bias=False), "v_proj": nn.Linear(8, 4).half()}
    parts |= {"calling": nn.Linear(8, 4), "packed": nn.Linear(8, 4), "gate_proj": nn.Linear(8, 4)}
    parts["calling"].forward = torch.relu
    del parts["packed"].weight
    module = nn.ModuleDict(parts)

    for name in ("up_proj", "k_proj", "v_proj", "calling", "packed"):
        assert Joined.of(module, ("q_proj", name), torch.float32) is None
    assert Joined.of(module, ("q_proj", "gate_proj"), torch.float32)


@pytest.mark.parametrize("width", [40, 13])
def test_a_gate_reads_rows_that_lie_apart(width, device):
    """
    Two halves of one product's rows give what copies of them give.
    """
    both = torch.randn(1, 300, 2 * width, device=device).half()
    gate, up = both.split(width, -1)

    for kind in (pointwise.SILU.value, pointwise.GELU.value):
        made = pointwise.gated(gate, up, kind)
        assert torch.equal(made, pointwise.gated(gate.contiguous(), up.contiguous(), kind))
    assert nearly(pointwise.gated(gate, up, pointwise.SILU.value), functional.silu(gate) * up)
