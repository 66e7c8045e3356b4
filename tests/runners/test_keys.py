"""How a model's keys and values are spread."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import transformers
from typer.testing import CliRunner

from kvbench.calibration import Calibration
from kvbench.cli.app import app
from kvbench.runners.base import ModelInfo
from kvbench.runners.keys import LayerSpread, Spread, key_spreads, prediction, spread
from kvbench.runners.load import NoTokenizer
from kvbench.runners.transformers import TransformersModel


@pytest.fixture
def biased():
    """A small model, and the bias of its values in layer 1."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=128,
    )
    model = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    bias = model.model.layers[1].self_attn.v_proj.bias
    bias[3] = 500.0
    info = ModelInfo("small", "r", "float32", ((2, 16),) * 2, 128)
    return TransformersModel(model, NoTokenizer(100), info)


def test_spreads_are_those_of_what_the_cache_receives(biased):
    """Layer by layer, they are those of the keys and values in transformers' own cache, its positions turned."""
    tokens = torch.randint(100, (1, 75))
    cache = biased.model(tokens, use_cache=True).past_key_values

    found = key_spreads(biased, tokens[0].tolist())

    assert [one.layer for one in found] == [0, 1]
    for one, layer in zip(found, cache.layers, strict=True):
        for ours, theirs in ((one.keys, layer.keys), (one.values, layer.values)):
            wanted = spread(theirs[0].transpose(0, 1))
            assert ours.std == pytest.approx(wanted.std, rel=1e-4)
            assert ours.mean == pytest.approx(wanted.mean, rel=1e-4)
            assert ours.int4_noise == pytest.approx(wanted.int4_noise, rel=1e-3)
    assert found[1].values.mean == pytest.approx(500, abs=5)
    assert found[0].values.mean < 5


def test_a_spread_is_exact_beside_a_large_mean():
    """Mean, deviation and kurtosis of a known distribution, a million times its spread away from zero."""
    signs = torch.tensor([1.0, -1.0]).repeat(50)[:, None, None].expand(100, 2, 16)
    x = 1e6 + 0.5 * signs

    found = spread(x)

    assert (found.mean, found.std, found.kurtosis) == (1e6, 0.5, 1.0)
    assert spread(torch.zeros(4, 1, 8)).kurtosis == 0


def test_noise_is_that_of_an_int4_row():
    """A row of 0 to 15 has steps of 1, so noise of 1/sqrt(12), and a constant mean adds none once centred."""
    x = torch.stack([torch.arange(16.0), torch.arange(16.0).flip(0)])[:, None]  # [2, 1, 16]
    deviation = (x - x.mean(0)).square().mean().sqrt()

    assert spread(x).int4_noise == pytest.approx((12**-0.5 / deviation).item())
    far = torch.randn(500, 1, 64) + torch.tensor([0.0] * 3 + [100.0] + [0.0] * 60)
    near = torch.randn(500, 1, 64)
    assert spread(far).int4_noise_centred == pytest.approx(spread(near).int4_noise, rel=0.05)
    assert spread(far).int4_noise > 10 * spread(near).int4_noise
    assert spread(far).int4_noise_rotated > 3 * spread(near).int4_noise


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("plain", "No layer's keys are out of a low-bit cache's reach"),
        ("bias", "Keys have a bias: low-bit caches fail unless they are centred"),
        ("one channel", "low-bit caches need a rotation"),
    ],
)
def test_a_prediction_names_what_helps(keys, expected):
    """A mean in many channels is for centring, in one for a rotation too, none for neither."""
    x = torch.randn(500, 1, 64)
    if keys == "bias":
        x[..., ::2] += 100 * torch.randn(32)
    elif keys == "one channel":
        x[..., 5] += 30

    found = [LayerSpread(0, spread(x), spread(torch.randn(500, 1, 64)))]

    assert expected in prediction(found)


def test_the_table_fits_a_terminal_and_json_has_all(biased, monkeypatch):
    """A row a layer in 80 columns at most, of the calibration text's first tokens; and every field as JSON."""

    class Letters(NoTokenizer):
        def encode(self, text, **_):
            return [ord(letter) % 100 for letter in text]

    model = TransformersModel(biased.model, Letters(100), biased.info)
    monkeypatch.setattr(TransformersModel, "load", lambda *_: model)
    tokens = [ord(letter) % 100 for letter in Calibration().read()[:128]]
    layers = key_spreads(model, tokens)

    shown = CliRunner().invoke(app, ["doctor", "--keys", "smollm2-135m-instruct"]).stdout.splitlines()
    record = json.loads(
        CliRunner().invoke(app, ["doctor", "--keys", "smollm2-135m-instruct", "--format", "json"]).stdout
    )

    assert shown[0] == "small · float32 · 128 tokens of the calibration text"
    assert max(map(len, shown[:-1])) <= 80
    assert shown[-1] == record["prediction"] == prediction(layers)
    keys, values = layers[1].keys, layers[1].values
    noise = [keys.int4_noise, keys.int4_noise_rotated, keys.int4_noise_centred]
    assert shown[5].split() == [
        "1",
        *(f"{keys.mean:.2f}", f"{keys.std:.2f}", f"{keys.kurtosis:.1f}"),
        *(f"{one:.2f}" for one in noise),
        *(f"{values.mean:.2f}", f"{values.std:.2f}", f"{values.kurtosis:.1f}"),
    ]
    assert record["layers"] == [asdict(one) for one in layers]
    assert record["calibration"] == Calibration(tokens=128).identity()


def test_a_prediction_contradicts_no_committed_result():
    """SmolLM2's keys have int4 noise of 0.23, rotated 0.15: perplexity x 1.18 and x 1.07, which both lose accuracy."""
    keys = Spread(9.0, 1.0, 3.0, 0.23, 0.15, 0.11)

    said = prediction([LayerSpread(0, keys, keys)])

    assert "as they are 0.23 (loses accuracy), rotated 0.15 (loses accuracy), centred 0.11 (may hold)" in said
