"""One ulp of noise: no more, the same wherever a token stands, and gone afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from kvbench.runners.base import ModelInfo, ScoreRequest
from kvbench.runners.nudge import nudged, one_ulp
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
REQUESTS = [ScoreRequest(tuple(range(3, 3 + count)), (5, 6, 7)) for count in (2, 9, 30)]


@pytest.fixture(scope="module")
def model():
    """A random model whose tokens depend on their context."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    return model


@pytest.fixture
def loaded(model):
    return TransformersModel(
        model, SimpleNamespace(eos_token_id=0), ModelInfo("llama", "random", "float32", ((2, 32),) * 2, 256)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_number_becomes_a_neighbour(dtype):
    """
    The next number of its dtype, half of them up and half down, and 0 stays; another seed moves others.
    """
    x = torch.cat([torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 96)]).to(dtype)
    wide = x.double()

    moved = one_ulp(x, 1)

    gap = (moved.double() - wide).abs()
    exponent = wide.abs().clamp_min(torch.finfo(dtype).tiny).log2()
    step = torch.where(x == 0, 0.0, torch.finfo(dtype).eps * 2.0 ** exponent.floor())
    assert moved.dtype == dtype
    # a power of two has a neighbour below at half the distance
    assert ((gap == step) | (gap == step / 2) & (exponent % 1 == 0)).all()
    assert abs((moved > x).double().mean() - 0.5) < 0.05
    assert abs((one_ulp(x, 2) == moved)[:-1].double().mean() - 0.5) < 0.05


def test_a_token_is_the_same_wherever_it_stands():
    """
    The noise of a row does not depend on its place nor on the others: what prompts share stays shared.
    """
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))

    assert torch.equal(one_ulp(x, 1)[1, 3], one_ulp(x[1, 3], 1))
    assert torch.equal(one_ulp(x.transpose(0, 1), 1), one_ulp(x, 1).transpose(0, 1))


def test_the_noise_is_in_the_block_alone(model):
    """
    Inside, the embedding is that of `one_ulp`; after it, and after an error in it, as before.
    """
    tokens = torch.arange(20)[None]
    embedding = model.get_input_embeddings()
    before = embedding(tokens)

    with nudged(model, 3):
        assert torch.equal(embedding(tokens), one_ulp(before, 3))
    with pytest.raises(KeyboardInterrupt), nudged(model, 3):
        raise KeyboardInterrupt
    assert torch.equal(embedding(tokens), before)


def test_a_model_that_reads_no_embedding_has_no_repeat(model):
    """
    Where the embedding is not what the model reads, the cell fails: a floor of 0 would be none.
    """
    wrong = r"LlamaForCausalLM read no token through its embedding.*again: false"

    with pytest.raises(ValueError, match=wrong), nudged(model, 1):
        pass


def test_a_runner_computes_under_its_noise_and_no_other_does(loaded):
    """
    Each seed gives its own answers, and the same ones each time; the model's other runners have none of it.
    """

    def scores(dtype, nudge=0):
        runner = loaded.runner(Scheme.parse(dtype, "none"), nudge=nudge)
        return torch.cat([score.logprobs for score in runner.score(REQUESTS)])

    exact, low_bit = scores("fp16"), scores("int4")
    one, other = scores("int4", 1), scores("int4", 2)

    assert torch.equal(scores("int4", 1), one)
    assert len({tuple(found.tolist()) for found in (low_bit, one, other)}) == 3
    assert torch.equal(scores("int4"), low_bit)
    assert 0 < (scores("fp16", 1) - exact).abs().max() < 1e-3
