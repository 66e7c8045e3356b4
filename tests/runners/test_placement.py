"""A model over several devices, beside the same model on one.

A machine without GPUs has one device, so "cpu:0" and "cpu:1" stand for two: torch computes both on the CPU, and `Apart`
watches over every operation, that none has operands of two devices.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from kvbench.cache import PagedCache
from kvbench.cache.paged import fitting_tokens
from kvbench.runners import catalog, placement
from kvbench.runners.base import GenerateRequest, ModelInfo, ScoreRequest
from kvbench.runners.model_files import RefusedError
from kvbench.runners.placement import Places, divide, spread, weight_bytes
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.parts import REAL
from kvbench.sweep.spec import ModelSpec

ONE, TWO, THREE = (torch.device("cpu", number) for number in range(3))
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    # a head that shares the embedding's weights, two kinds of rotary embeddings, windows
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, sliding_window=5, query_pre_attn_scalar=16),
    # layers with a state, which run one sequence at a time
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **COMMON,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}


class Tokenizer:
    """A text is its letters."""

    eos_token_id = 0
    bos_token_id = None

    def encode(self, text, **_):
        return [1 + ord(letter) % 96 for letter in text]

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


class Apart(TorchDispatchMode):
    """Tensors remember the numbered device that they were made on or moved to; an operation on two of them fails."""

    def __init__(self):
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.crossed = 0

    def of(self, values, found):
        for value in values:
            if isinstance(value, torch.Tensor) and value in self.places:
                found.add(self.places[value])
            elif isinstance(value, (list, tuple)):
                self.of(value, found)
        return found

    def mark(self, value, device):
        if isinstance(value, torch.Tensor):
            self.places[value] = device
        elif isinstance(value, (list, tuple)):
            for one in value:
                self.mark(one, device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        target = kwargs.get("device")
        at = self.of([*args, *kwargs.values()], set())
        if target is not None and torch.device(target).index is not None:
            self.crossed += bool(at - {target.index})
            self.mark(out, target.index)
            return out
        assert len(at) < 2, f"{func} has operands on {sorted(at)}"
        if at:
            self.mark(out, *at)
        return out


def tiny(name):
    """A random model of this architecture, whose tokens depend on their context."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    layers = tuple((2, 32) for kind in kinds if kind != "linear_attention")
    return TransformersModel(
        model.requires_grad_(False), Tokenizer(), ModelInfo(name, "random", "float32", layers, 256)
    )


def over(loaded, *devices):
    """The model, spread over them."""
    places = divide(loaded.model, devices, [1.0] * len(devices))
    spread(loaded.model, places)
    return replace(loaded, places=places)


def tokens(count, seed):
    """Random token ids, none of them the end token."""
    return tuple(torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def answers(runner):
    """What a runner says of prompts that share a prefix."""
    prefix = tokens(20, 1)
    scores = runner.score([ScoreRequest(prefix + tokens(n, n), tokens(3, 50 + n)) for n in (1, 4, 30)])
    made = runner.generate([GenerateRequest(prefix + tokens(n, n), 12, temperature=0.1 * n) for n in (1, 4, 30)])
    states = runner.hidden_states([tokens(70, 2)])
    return [score.logprobs for score in scores], made, states


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "int4"),
        # what is learned of rotary embeddings, a ring of exact rows, pages that are sealed whole
        ("llama", "int4_centered_window"),
        ("llama", "kivi2"),
        ("gemma3", "auto"),
        ("qwen3_5", "int8"),
    ],
)
def test_a_model_over_two_devices_is_the_model_on_one(name, scheme):
    """
    Scores, answers and hidden states are equal to the bit, and no operation mixes tensors of two devices.
    """
    scheme, other = Scheme.of(scheme), tiny(name)
    expected = answers(tiny(name).runner(scheme))
    apart = Apart()
    with apart:
        split = over(other, ONE, TWO)
        for unit in placement._units(split.model):  # a module's own tensors are no others after it has moved
            apart.mark([*unit.module.parameters(), *unit.module.buffers()], placement._device(unit, split.places).index)
    learned = split.learn(scheme) if scheme.learns else None  # on the CPU, where both devices' tensors come to
    with apart:
        found = answers(split.runner(scheme, learned=learned))

    assert set(split.places.layers) == {ONE, TWO}
    assert apart.crossed > 20
    assert found[1] == expected[1]
    assert all(torch.equal(*pair) for i in (0, 2) for pair in zip(found[i], expected[i], strict=True))


@pytest.mark.parametrize(("tokens_", "sequences", "pages"), [(64, 64, 400), (64, 2, 400), (64, 64, 14)])
def test_prompts_go_before_answers_and_none_waits_for_good(tokens_, sequences, pages):
    """
    In many passes, with few rows or few pages at a time: the answers of one device. A pass has a part of its tokens.
    """
    requests = [GenerateRequest(tokens(20 + 7 * n, n), 3 + n % 4) for n in range(9)]
    found = []
    for loaded in (tiny("llama"), over(tiny("llama"), ONE, TWO)):
        runner = loaded.runner(Scheme.parse("int8"))
        assert runner.memory.limits.tokens == (256 if len(loaded.places.devices) == 2 else 2048)
        runner.memory.limits = replace(runner.memory.limits, tokens=tokens_, sequences=sequences)
        runner.memory.reserve(pages * 16 // 4 - tokens_, pages, pages)
        assert runner.memory.caches[0].pages == pages
        runner.memory.reserve = lambda *_: None
        found.append(runner.generate(requests))

    assert found[0] == found[1]


def test_operands_of_two_devices_are_noticed():
    """
    What watches over the test above sees a tensor that was left behind.
    """
    with Apart(), pytest.raises(AssertionError, match="operands on"):
        torch.ones(3, device=ONE) + torch.ones(3, device=TWO)


@pytest.mark.parametrize("tied", [False, True])
def test_a_shape_has_the_same_weights_wherever_they_are(tmp_path, monkeypatch, tied):
    """
    Drawn on one device, two or three: equal scores, and no device is more than a layer fuller than another.
    """
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({"model_type": "llama", **COMMON, "tie_word_embeddings": tied}))
    source = replace(catalog.resolve(str(shape)), spread=True)
    found = []
    for devices in ([ONE], [ONE, TWO], [ONE, TWO, THREE]):
        monkeypatch.setattr(placement, "devices_of", lambda _, devices=devices: (devices, [1.0] * len(devices)))
        loaded = TransformersModel.load(source)
        found.append(loaded.runner(Scheme.parse("int8")).score([ScoreRequest(tokens(9, 1), tokens(4, 2))])[0].logprobs)
        sizes = weight_bytes(loaded.model, loaded.places)
        assert list(sizes) == devices
        assert max(sizes.values()) - min(sizes.values()) <= 172_544  # of a layer

    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert loaded.info.revision.endswith("-by-layer"), "drawn in one go they are others"


def test_layers_go_where_there_is_room():
    """
    A device with three times the room gets the more layers, each a run of them; one that is not needed gets none.
    """
    model = tiny("llama").model

    assert divide(model, [ONE, TWO], [1.0, 3.0]).layers.count(ONE) == 1
    assert divide(model, [ONE, TWO], [3.0, 1.0]).layers.count(ONE) == 3
    many = [torch.device("cpu", number) for number in range(8)]
    assert divide(model, many, [1.0] * 8).layers == tuple(many[:4])


def test_a_model_whose_layers_are_in_no_list_is_refused():
    """
    It says so in a line, before anything is moved.
    """
    model = tiny("llama").model
    model.config.num_hidden_layers = 7

    with pytest.raises(RefusedError, match="device_map: models of type 'llama' have their layers in no one list"):
        divide(model, [ONE, TWO], [1.0, 1.0])


def test_the_fullest_device_decides_what_fits(monkeypatch):
    """
    Of the pages that each device has room for, for its own layers, the fewest count.
    """
    layers, devices = ((2, 32),) * 4, (ONE, TWO, TWO, TWO)
    scheme = Scheme.parse("int8").resolve(torch.float32)
    one = int(scheme.layer_bytes(layers)[0])
    tokens_, _ = fitting_tokens(layers, scheme, {ONE: 10**6, TWO: 3 * one * 64 + 24}, page_size=16, device=devices)
    cache = PagedCache(layers, scheme, pages=4, page_size=16, device=devices)

    assert tokens_ == 64
    assert cache.nbytes_on(TWO) == 3 * cache.nbytes_on(ONE)

    loaded = over(tiny("llama"), ONE, TWO)
    loaded = replace(loaded, places=Places((ONE, TWO, TWO, TWO)))
    runner = loaded.runner(scheme)
    runner.memory.limits = replace(runner.memory.limits, memory=1.0)
    free = {ONE: 10**6, TWO: 3 * one * 16 * 9}
    monkeypatch.setattr("kvbench.runners.transformers.memory.free_memory", lambda device: free[device])
    runner.memory.reserve(32, 100, 3)
    assert runner.memory.caches[0].pages == 9


def test_a_plan_divides_a_model_as_loading_does(tmp_path, monkeypatch):
    """
    By its configuration alone: each GPU's layers and bytes are those of the model that is then made.
    """
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({"model_type": "llama", **COMMON}))
    monkeypatch.setattr(placement, "devices_of", lambda _: ([ONE, TWO], [3e6, 1e6]))
    monkeypatch.setattr("kvbench.sweep.parts.default_device", lambda: "cuda")
    shares = REAL.divide(ModelSpec(name=str(shape), device_map="auto"), "float32")
    loaded = TransformersModel.load(replace(catalog.resolve(str(shape)), spread=True))

    assert [len(share.layers) for share in shares] == [3, 1]
    assert [share.weights for share in shares] == list(weight_bytes(loaded.model, loaded.places).values())
    assert [share.free for share in shares] == [3e6, 1e6]
    assert loaded.places.layers == (ONE,) * 3 + (TWO,)
